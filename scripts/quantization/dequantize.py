"""From row-wise INT8 back to fp32: the same weights, in a graph that any quantizer takes."""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from scripts.quantization.errors import QuantizationError
from scripts.quantization.graph import keep_read
from scripts.quantization.row_int8 import LEVELS


def dequantize_rows(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the fp32 model that `row_int8.quantize_rows` (without `fuse_scales`) would make `model` from.

    Weights are what the INT8 ones stand for; activations are no longer rounded. Raises QuantizationError when there is
    no such product in `model`.
    """
    restored = onnx.ModelProto()
    restored.CopyFrom(model)
    graph = restored.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    writers = {name: node for node in graph.node for name in node.output}
    weights: dict[str, NDArray[np.float32]] = {}
    nodes = []
    for node in graph.node:
        product = _product_behind(node, writers)
        lookup = _lookup_behind(node, writers, constants)
        if product is not None:
            x, weight, scale = product
            matrix = weight.removesuffix("/int8")
            if weight in constants:
                columns = numpy_helper.to_array(constants[scale]) * np.float32(LEVELS)
                weights[matrix] = numpy_helper.to_array(constants[weight]) * columns
            else:  # a table, transposed
                table = writers[weight].input[0].removesuffix("/int8_table")
                matrix = f"{table}/transposed"
                nodes.append(helper.make_node("Transpose", [table], [matrix], perm=[1, 0]))
            nodes.append(helper.make_node("MatMul", [x, matrix], [node.output[0]], name=node.name))
        elif lookup is not None:
            table, scale, ids = lookup
            matrix = table.removesuffix("/int8_table")
            weights[matrix] = numpy_helper.to_array(constants[table]) * numpy_helper.to_array(constants[scale])
            nodes.append(helper.make_node("Gather", [matrix, ids], [node.output[0]], name=node.name))
        else:
            nodes.append(node)
    if not weights:
        raise QuantizationError("the model has no product in row-wise INT8")
    graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in weights.items())
    keep_read(graph, nodes)
    return restored


def _product_behind(node: onnx.NodeProto, writers: dict[str, onnx.NodeProto]) -> tuple[str, str, str] | None:
    """Return x, the weight and its column scale where `node` is the last step of x @ W, else None."""
    scaled = _input_from(node, "Mul", 0, "Mul", writers)
    cast = _input_from(scaled, "Mul", 0, "Cast", writers)
    product = _input_from(cast, "Cast", 0, "MatMulInteger", writers)
    if scaled is None or product is None:
        return None
    rounded = writers[product.input[0]]
    return writers[rounded.input[0]].input[0], product.input[1], scaled.input[1]


def _lookup_behind(
    node: onnx.NodeProto, writers: dict[str, onnx.NodeProto], constants: dict[str, onnx.TensorProto]
) -> tuple[str, str, str] | None:
    """Return the table, its row scale and the ids where `node` is the last step of T[ids], else None."""
    cast = _input_from(node, "Mul", 0, "Cast", writers)
    picked, scale = _input_from(cast, "Cast", 0, "Gather", writers), _input_from(node, "Mul", 1, "Gather", writers)
    if picked is None or scale is None or picked.input[0] not in constants:
        return None
    return picked.input[0], scale.input[0], picked.input[1]


def _input_from(
    node: onnx.NodeProto | None, operator: str, index: int, source: str, writers: dict[str, onnx.NodeProto]
) -> onnx.NodeProto | None:
    """Return the node that writes an input of `node`, where both are of the given operators, else None."""
    if node is None or node.op_type != operator:
        return None
    writer = writers.get(node.input[index])
    return writer if writer is not None and writer.op_type == source else None
