"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): the same function, easier to quantize.

A few channels of a transformer's activations are tens of times larger than the others, and cost these their resolution
in INT8. The graph divides such an activation by a factor per channel and multiplies the weights that read it by it.
As in the paper, it concerns what a normalisation gives: there the same channels are large whatever the text. (Smoothing
what an activation function gives made MiniLM worse: cosine .9972 instead of .9989.)
"""

from collections.abc import Iterable

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from scripts.quantization.graph import Feeds, drop_unread, float_matrices, observed

MIGRATION = 0.7  # how much of a channel's range moves into the weights: alpha of equation 4

Float = NDArray[np.float32]


def smooth(model: onnx.ModelProto, batches: Iterable[Feeds]) -> onnx.ModelProto:
    """Return a copy of the fp32 `model` whose outlier channels, as seen in `batches`, are scaled down.

    A Mul with a factor per channel is put between a normalisation and the MatMuls with constant matrices that read it.
    """
    smoothed = onnx.ModelProto()
    smoothed.CopyFrom(model)
    graph, matrices = smoothed.graph, float_matrices(smoothed.graph)
    normalised = _normalised(graph)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in matrices and node.input[0] in normalised:
            readers.setdefault(node.input[0], []).append(node)
    maxima = _channel_maxima(model, list(readers), batches) if readers else {}
    for name, largest in maxima.items():
        _scale_channels(graph, name, readers[name], matrices, largest)
    drop_unread(graph)
    return smoothed


def _normalised(graph: onnx.GraphProto) -> set[str]:
    """Return what normalisations give, those included that are written out: a bias added to a scaled value."""
    vectors = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 1}
    scaled = {node.output[0] for node in graph.node if node.op_type == "Mul" and not vectors.isdisjoint(node.input)}
    return {
        node.output[0]
        for node in graph.node
        if node.op_type.endswith(("LayerNormalization", "RMSNormalization"))
        or (node.op_type == "Add" and not vectors.isdisjoint(node.input) and not scaled.isdisjoint(node.input))
    }


def _channel_maxima(model: onnx.ModelProto, names: list[str], batches: Iterable[Feeds]) -> dict[str, Float]:
    """Return the largest absolute value of each channel [K] of the tensors `names`."""
    session = onnxruntime.InferenceSession(observed(model, names).SerializeToString())
    maxima: dict[str, Float] = {}
    for feeds in batches:
        for name, values in zip(names, session.run(names, feeds), strict=True):
            seen = np.abs(values).reshape(-1, values.shape[-1]).max(0)
            maxima[name] = np.maximum(maxima.get(name, seen), seen)
    return maxima


def _scale_channels(
    graph: onnx.GraphProto,
    name: str,
    readers: list[onnx.NodeProto],
    matrices: dict[str, onnx.TensorProto],
    largest: Float,
) -> None:
    weights = [numpy_helper.to_array(matrices[node.input[1]]) for node in readers]
    widest = np.max([np.abs(weight).max(1) for weight in weights], axis=0)
    factor = np.maximum(largest, 1e-5) ** MIGRATION / np.maximum(widest, 1e-5) ** (1 - MIGRATION)
    factor = (factor / np.exp(np.log(factor).mean())).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(1 / factor, f"{name}/smoothing"))
    scaling = helper.make_node("Mul", [name, f"{name}/smoothing"], [f"{name}/smooth"], name=f"{name}/smooth")
    graph.node.insert(list(graph.node).index(readers[0]), scaling)
    for node, weight in zip(readers, weights, strict=True):
        matrix = f"{node.name or node.output[0]}/smooth_weight"
        graph.initializer.append(numpy_helper.from_array(factor[:, None] * weight, matrix))
        node.input[0], node.input[1] = f"{name}/smooth", matrix
