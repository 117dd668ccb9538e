"""Reading an ONNX graph: what it takes, and which of its nodes have weights that can be quantized."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, helper

from scripts.quantization.model_file import save_model

Feeds = dict[str, NDArray]

WEIGHTED = frozenset({"MatMul", "Gemm", "Conv"})


@dataclass(frozen=True)
class Input:
    """An input of a graph; a dimension that is not an int is free."""

    name: str
    data_type: np.dtype
    shape: tuple[int | str, ...]

    @property
    def is_mask(self) -> bool:
        """Whether it says which positions count."""
        return "mask" in self.name


def graph_inputs(model: onnx.ModelProto) -> list[Input]:
    """Return what must be fed to `model`: its inputs without those that have an initializer."""
    initialized = {tensor.name for tensor in model.graph.initializer}
    return [_input(value) for value in model.graph.input if value.name not in initialized]


def float_matrices(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Return the fp32 initializers of two dimensions, by name."""
    return {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2
    }


def weighted_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the products whose second input is a constant, transposed or not: what quantization shrinks."""
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {
        node.output[0] for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in constants
    }
    return [node for node in model.graph.node if node.op_type in WEIGHTED and node.input[1] in constants]


def name_nodes(model: onnx.ModelProto) -> None:
    """Give each node without a name, or with a taken one, a name of its own, in place: exclusions go by name."""
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}"
        taken.add(node.name)


def keep_read(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Put those of `nodes` into the graph, in place, whose outputs are read, and drop unread initializers."""
    graph_outputs = {value.name for value in graph.output}
    kept = list(nodes)
    while True:
        read = graph_outputs.union(*(node.input for node in kept))
        still = [node for node in kept if not read.isdisjoint(node.output)]
        if len(still) == len(kept):
            break
        kept = still
    del graph.node[:]
    graph.node.extend(kept)
    drop_unread(graph)


def drop_unread(graph: onnx.GraphProto) -> None:
    """Remove, in place, the initializers that nothing reads."""
    read = {name for node in _nodes(graph) for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def observed(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of `model` that gives the fp32 tensors `names` too, after its own outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {value.name for value in copy.graph.output}
    copy.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in present
    )
    return copy


def float_values(model: onnx.ModelProto) -> list[str]:
    """Return the names of the fp32 tensors that nodes write, as ONNX Runtime knows them: onnx's own inference ends at
    contrib operators."""
    everything = onnx.ModelProto()
    everything.CopyFrom(model)
    present = {value.name for value in model.graph.output}
    written = [name for node in model.graph.node for name in node.output if name]
    everything.graph.output.extend(onnx.ValueInfoProto(name=name) for name in written if name not in present)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory(prefix="quantize-") as scratch:
        save_model(everything, Path(scratch))
        outputs = onnxruntime.InferenceSession(Path(scratch, "model.onnx"), options).get_outputs()
    return [output.name for output in outputs if output.type == "tensor(float)"]


def declare_values(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of `model` that says which tensors are fp32: static quantization skips those it does not know."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {value.name for value in (*copy.graph.value_info, *copy.graph.output)}
    copy.graph.value_info.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in float_values(copy) if name not in known
    )
    return copy


def vocabulary(model: onnx.ModelProto, name: str) -> int:
    """Return how many rows the table has that input `name` looks up, 2 where it looks nothing up."""
    tables = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    rows = [tables[node.input[0]] for node in model.graph.node if _looks_up(node, name) and node.input[0] in tables]
    return min(rows, default=2)


def random_feeds(model: onnx.ModelProto, batch: int, length: int, seed: int = 0) -> Feeds:
    """Return inputs for `model`: random numbers and ids, masks of ones. The first dimension, where free, is `batch`,
    the other free ones `length`."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for taken in graph_inputs(model):
        free = [batch if axis == 0 else length for axis in range(len(taken.shape))]
        shape = [size if isinstance(size, int) else free[axis] for axis, size in enumerate(taken.shape)]
        if taken.is_mask:
            values: NDArray = np.ones(shape)
        elif taken.data_type.kind == "f":
            values = rng.standard_normal(shape)
        elif taken.name == "token_type_ids":
            values = np.zeros(shape)
        else:
            values = rng.integers(vocabulary(model, taken.name), size=shape)
        feeds[taken.name] = values.astype(taken.data_type)
    return feeds


def role(name: str) -> str:
    """Return a node's name without its numbers: what its like are called in every layer."""
    return re.sub(r"\d+", "N", name)


def _input(value: onnx.ValueInfoProto) -> Input:
    tensor = value.type.tensor_type
    shape = tuple(size.dim_value if size.HasField("dim_value") else size.dim_param for size in tensor.shape.dim)
    data_type: DTypeLike = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return Input(value.name, np.dtype(data_type), shape)


def _looks_up(node: onnx.NodeProto, name: str) -> bool:
    return node.op_type == "Gather" and node.input[1] == name


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
