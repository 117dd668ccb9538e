"""Per-row dynamic INT8 for ONNX graphs, from operators that ONNX Runtime already has.

`quantize_dynamic` of ONNX Runtime gives a tensor one activation scale, so a row's result depends on the rows beside it.
Lossless speculation, and an embedding that depends on its sentence alone, need more: here each row carries its own
scale and what is summed along a row are integers, so a row of a product is bit-identical alone and in any batch.
"""

from collections.abc import Collection, MutableSequence

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

from scripts.quantization.errors import QuantizationError
from scripts.quantization.graph import float_matrices
from scripts.quantization.model_file import opset

MIN_OPSET = 18  # ReduceMax takes its axes as an input since 18
CONTRIB = "com.microsoft"
LEVELS = 127  # int8 values are symmetric: -127 to 127

# Activations are uint8 around 128: ONNX Runtime has no fast int8 x int8 product on x86.
SHARED_CONSTANTS = {
    "row_int8/levels": np.float32(LEVELS),
    "row_int8/one": np.float32(1),
    "row_int8/zero_point": np.uint8(128),
    "row_int8/last_axis": np.array([-1], np.int64),
}


def quantize_rows(
    model: onnx.ModelProto, *, fuse_scales: bool = False, exclude: Collection[str] = ()
) -> onnx.ModelProto:
    """Return a copy of the fp32 `model` with its constant matrices in INT8; inputs and outputs stay as they are.

    - `MatMul(x, W)` with a constant W [K, N]: x [..., K] becomes uint8 with a scale per row, W int8 with a scale per
      column; their integer product is scaled back to fp32. MatMuls that share x quantize it once.
    - `Gather(T, ids)` with a constant T [V, K] and a graph input as ids: T becomes int8 with a scale per row.
    - A constant that serves both ways, one of them through `Transpose` (tied embeddings, as ONNX Runtime GenAI writes
      them), is stored once; ONNX Runtime folds the remaining transpose when it loads the model.

    `fuse_scales` scales the columns inside the product (com.microsoft.MatMulIntegerToFloat). Both forms give the same
    bits; on 2 cores the fused one takes a fifth more time for a single row, the same for 16 rows and a fifth less for
    1,000. Leave it off for a decoder, set it for an encoder of whole batches. Nodes named in `exclude` stay fp32.

    Constants are initializers whose data is in `model` (`onnx.load` brings external data along). All else, such as
    attention, norms and biases, stays fp32. A row of zeros gives zeros. Raises QuantizationError when the opset is
    below 18 or when there is nothing to quantize.

    On x86 CPUs without VNNI instructions, ONNX Runtime adds pairs of these products in 16 bits, which can saturate. The
    session entry `session.x64quantprecision` = `1` avoids that. It takes half as much time again wherever it is set, so
    set it on such CPUs only.
    """
    if opset(model) < MIN_OPSET:
        raise QuantizationError(
            f"row-wise INT8 needs opset {MIN_OPSET} or newer, the model has {opset(model)}: --upgrade-opset converts it"
        )
    return _quantized(model, _Rewriter(fuse_scales=fuse_scales, exclude=exclude))


def quantize_tables(model: onnx.ModelProto, exclude: Collection[str] = ()) -> onnx.ModelProto:
    """Return a copy of the fp32 `model` with its embedding tables in INT8, as `quantize_rows` does, and with them only
    the products that share their weights.

    It goes before other quantizers: they leave tables as they are, give a whole table one scale, or store it twice.
    """
    names = {node.name for node in model.graph.node} if opset(model) < MIN_OPSET else exclude
    return _quantized(model, _Rewriter(fuse_scales=False, exclude=names, tables_only=True))


def _quantized(model: onnx.ModelProto, rewriter: "_Rewriter") -> onnx.ModelProto:
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    if rewriter.fuse_scales and not any(entry.domain == CONTRIB for entry in quantized.opset_import):
        quantized.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    rewriter.run(quantized.graph)
    return quantized


class _Rewriter:
    """Rewrites one graph node by node, in order. What it adds is keyed by name, so that adding it twice is harmless."""

    def __init__(self, *, fuse_scales: bool, exclude: Collection[str], tables_only: bool = False) -> None:
        self.fuse_scales = fuse_scales
        self.exclude = frozenset(exclude)
        self.tables_only = tables_only
        self.nodes: dict[str, onnx.NodeProto] = {}
        self.constants: dict[str, onnx.TensorProto] = {}

    def run(self, graph: onnx.GraphProto) -> None:
        self._read(graph)
        for node in graph.node:
            if self._is_product(node):
                self._product(node)
            elif self._is_lookup(node):
                self._lookup(node)
            else:
                self.nodes["\0".join(node.output)] = node
        if not self.constants and not self.tables_only:
            raise QuantizationError("found no MatMul or embedding with an fp32 initializer to quantize")
        for name, value in SHARED_CONSTANTS.items():
            self._constant(name, value)
        self._replace_in(graph)

    def _read(self, graph: onnx.GraphProto) -> None:
        self.inputs = {value.name for value in graph.input}
        # Name of a constant matrix, or of its transpose -> (initializer, is it transposed?)
        self.matrices = {name: (tensor, False) for name, tensor in float_matrices(graph).items()}
        for node in graph.node:
            if node.op_type == "Transpose" and node.input[0] in self.matrices:
                self.matrices[node.output[0]] = (self.matrices[node.input[0]][0], True)
        lookups = (self.matrices[node.input[0]] for node in graph.node if self._is_lookup(node))
        self.tables = {(tensor.name, transposed) for tensor, transposed in lookups}

    def _product(self, node: onnx.NodeProto) -> None:
        """x @ W = (round(x * 127 / row maximum) @ Wq) * column scale / 127 * row maximum."""
        x, output = node.input[0], node.output[0]
        tensor, transposed = self.matrices[node.input[1]]
        columns, scale = _quantize(_values(tensor, not transposed))
        if (tensor.name, not transposed) in self.tables:
            table = self._constant(f"{tensor.name}/int8_table", columns)
            weight = self._add("Transpose", [table], f"{table}/transposed", perm=[1, 0])
        else:
            weight = self._constant(f"{tensor.name}/int8", columns.T)
        column_scale = self._constant(f"{tensor.name}/column_scale", scale[:, 0] / np.float32(LEVELS))
        rows, row_max = self._quantized_rows(x)
        if self.fuse_scales:
            # The operator takes one scale for all rows: it is 1, and the rows' own follow.
            inputs = [rows, weight, "row_int8/one", column_scale, "row_int8/zero_point"]
            product = self._add("MatMulIntegerToFloat", inputs, f"{output}/scaled", domain=CONTRIB)
        else:
            product = self._add("MatMulInteger", [rows, weight, "row_int8/zero_point"], f"{output}/int32")
            product = self._add("Cast", [product], f"{output}/fp32", to=TensorProto.FLOAT)
            product = self._add("Mul", [product, column_scale], f"{output}/scaled")
        self._add("Mul", [product, row_max], output)

    def _quantized_rows(self, x: str) -> tuple[str, str]:
        """Return the names of x as uint8 [..., K] and of the absolute row maxima [..., 1].

        For a row of zeros 0 * (127 / 0) is NaN: whatever byte it becomes, the product is multiplied by the maximum, 0.
        """
        row_max = self._add("ReduceMax", [self._add("Abs", [x], f"{x}/abs"), "row_int8/last_axis"], f"{x}/row_max")
        factor = self._add("Div", ["row_int8/levels", row_max], f"{x}/row_factor")
        scaled = self._add("Mul", [x, factor], f"{x}/row_scaled")
        # With scale 1, QuantizeLinear is a rounding, shift and cast in one pass.
        rows = self._add("QuantizeLinear", [scaled, "row_int8/one", "row_int8/zero_point"], f"{x}/uint8")
        return rows, row_max

    def _lookup(self, node: onnx.NodeProto) -> None:
        """T[ids] = int8 T[ids] * row scale[ids]."""
        ids, output = node.input[1], node.output[0]
        tensor, transposed = self.matrices[node.input[0]]
        rows, scale = _quantize(_values(tensor, transposed))
        table = self._constant(f"{tensor.name}/int8_table", rows)
        scales = self._constant(f"{tensor.name}/row_scale", scale)
        picked = self._add(
            "Cast", [self._add("Gather", [table, ids], f"{output}/int8")], f"{output}/fp32", to=TensorProto.FLOAT
        )
        self._add("Mul", [picked, self._add("Gather", [scales, ids], f"{output}/scale")], output)

    def _is_product(self, node: onnx.NodeProto) -> bool:
        """Whether `node` is a product with a constant matrix that is to be quantized."""
        if node.op_type != "MatMul" or node.input[1] not in self.matrices or node.name in self.exclude:
            return False
        tensor, transposed = self.matrices[node.input[1]]
        return not self.tables_only or (tensor.name, not transposed) in self.tables

    def _is_lookup(self, node: onnx.NodeProto) -> bool:
        """Whether `node` picks rows of a constant table by ids that are sent (not, say, rotary tables by position)."""
        by_row = all(attribute.i == 0 for attribute in node.attribute)
        return node.op_type == "Gather" and by_row and node.input[0] in self.matrices and node.input[1] in self.inputs

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: int | str | list[int]) -> str:
        self.nodes[output] = helper.make_node(operator, inputs, [output], name=output, **attributes)
        return output

    def _constant(self, name: str, value: ArrayLike) -> str:
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name)
        return name

    def _replace_in(self, graph: onnx.GraphProto) -> None:
        """Put the new nodes into the graph and drop what they no longer read."""
        outputs = {value.name for value in graph.output}
        read = outputs.union(*(node.input for node in self.nodes.values()))
        _assign(graph.node, [node for node in self.nodes.values() if not read.isdisjoint(node.output)])
        read = outputs.union(*(node.input for node in graph.node))
        _assign(graph.initializer, [t for t in [*graph.initializer, *self.constants.values()] if t.name in read])


def _values(tensor: onnx.TensorProto, transposed: bool) -> NDArray[np.float32]:
    values = numpy_helper.to_array(tensor)
    return values.T if transposed else values


def _quantize(matrix: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return int8 [R, K] and scales [R, 1] whose product approximates `matrix` [R, K]."""
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    scale = np.where(largest == 0, 1, largest / LEVELS).astype(np.float32)
    return np.rint(matrix / scale).astype(np.int8), scale


def _assign(field: MutableSequence, values: list) -> None:
    del field[:]
    field.extend(values)
