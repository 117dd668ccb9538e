"""Give an exported decoder explicit sequence lengths, so that one call takes rows of different pasts and lengths."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

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


def attend_to_one_more(model: onnx.ModelProto) -> None:
    """Have every attention of a decoder see one token more than the rest of the graph, in place.

    ONNX Runtime's CPU kernels multiply a single query by the values in another order than two or more, so that a token
    fed alone and the same token fed among others differ in their last bits, which INT8 rounding makes larger. With a
    token of padding behind the others there is always more than one, and a token's logits do not depend on how many are
    fed with it: what decoding token by token chooses is what verifying several tokens at once chooses, bit for bit.
    The callers' `query_seqlens`, `seqlens_k` and `total_sequence_length` count the padding; what it leaves in the
    key/value cache is overwritten by the next token.
    """
    graph = model.graph
    constants = {"pads": [0, 0, 0, 0, 1, 0], "first": [0], "last": [-1], "axis": [1]}
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"one_more/{name}"))
    nodes = []
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            nodes.append(node)
            continue
        for index, name in enumerate(node.input[:3]):  # query, key, value; or all in the first
            if name:
                node.input[index] = f"{name}/one_more"
                nodes.append(helper.make_node("Pad", [name, "one_more/pads"], [node.input[index]]))
        output = node.output[0]
        node.output[0] = f"{output}/one_more"
        bounds = ["one_more/first", "one_more/last", "one_more/axis"]
        nodes += [node, helper.make_node("Slice", [node.output[0], *bounds], [output])]
    del graph.node[:]
    graph.node.extend(nodes)


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
