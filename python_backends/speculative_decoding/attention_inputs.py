"""Give an exported decoder explicit sequence lengths, so that one call takes rows of different pasts and lengths."""

import onnx
from onnx import TensorProto, helper

QUERY_SEQLENS = 16  # position among GroupQueryAttention's inputs, since ONNX Runtime 1.32
SEQLENS_K, TOTAL_LENGTH = 5, 6


def use_explicit_lengths(model: onnx.ModelProto) -> None:
    """Replace the `attention_mask` input of a decoder by three int32 inputs, in place.

    ONNX Runtime GenAI's model builder derives lengths from attention_mask, which cannot say that rows add different
    numbers of tokens. Afterwards the graph takes `seqlens_k` [batch] (last position of each row, its new tokens
    included), `total_sequence_length` [1] (longest row) and `query_seqlens` [batch] (new tokens of each row), as
    com.microsoft.GroupQueryAttention documents them. Raises ValueError when the graph has no such attention.
    """
    graph = model.graph
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not attentions:
        raise ValueError("the model has no GroupQueryAttention: export it with scripts.export_model")
    for node in attentions:
        inputs = list(node.input) + [""] * (QUERY_SEQLENS + 1 - len(node.input))
        inputs[SEQLENS_K], inputs[TOTAL_LENGTH] = "seqlens_k", "total_sequence_length"
        inputs[QUERY_SEQLENS] = "query_seqlens"
        del node.input[:]
        node.input.extend(inputs)
    kept = [value for value in graph.input if value.name not in ("attention_mask", "position_ids")]
    del graph.input[:]
    graph.input.extend(kept)
    for name, shape in (
        ("seqlens_k", ["batch_size"]),
        ("total_sequence_length", []),
        ("query_seqlens", ["batch_size"]),
    ):
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT32, shape))
    _drop_unread_nodes(graph)


def _drop_unread_nodes(graph: onnx.GraphProto) -> None:
    """Remove, last node first, every node whose outputs nobody reads."""
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if not read.isdisjoint(node.output):
            kept.append(node)
            read.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
