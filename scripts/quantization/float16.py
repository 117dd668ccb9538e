"""Half precision, with what would overflow kept in fp32."""

from collections.abc import Collection, Iterable

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from scripts.quantization.graph import Feeds, declare_values, float_values, keep_read, observed

LARGEST = 0.5 * float(np.finfo(np.float16).max)  # half of it, for inputs that were not seen
# Attention stays fp32: its key/value caches are inputs and outputs, and those keep their type.
BLOCKED = [*DEFAULT_OP_BLOCK_LIST, "GroupQueryAttention"]


def float16(
    model: onnx.ModelProto, overflowing: Collection[str] = (), exclude: Collection[str] = ()
) -> onnx.ModelProto:
    """Return `model` with fp16 weights and arithmetic; inputs and outputs stay fp32.

    overflowing: nodes that stay fp32 because of what `overflowing_nodes` saw; exclude: nodes that stay fp32 anyway.
    """
    half = convert_float_to_float16(
        declare_values(model),  # it casts what goes into a node that stays fp32 only where it knows the type
        keep_io_types=True,
        op_block_list=BLOCKED,
        node_block_list=[*overflowing, *exclude],
    )
    _join_casts(half.graph)
    OnnxModel(half).topological_sort()  # casts are appended at the end
    converted: onnx.ModelProto = half
    return converted


def _join_casts(graph: onnx.GraphProto) -> None:
    """Let what one fp32 node gives reach the next as it is: the converter casts it to fp16 and back in between."""
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    halved = {name: node.input[0] for name, node in casts.items() if node.attribute[0].i == TensorProto.FLOAT16}
    restored = {
        name: halved[node.input[0]]
        for name, node in casts.items()
        if node.attribute[0].i == TensorProto.FLOAT and node.input[0] in halved
    }
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = restored.get(name, name)
    keep_read(graph, list(graph.node))


def overflowing_nodes(model: onnx.ModelProto, batches: Iterable[Feeds]) -> list[str]:
    """Return the nodes that read or write values beyond fp16's range, as seen in `batches`."""
    values = float_values(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(observed(model, values).SerializeToString(), options)
    large: set[str] = set()
    for feeds in batches:
        for name, value in zip(values, session.run(values, feeds), strict=True):
            if value.size and not np.abs(value).max() < LARGEST:
                large.add(name)
    return [node.name for node in model.graph.node if not large.isdisjoint([*node.input, *node.output])]
