"""Small ONNX models for tests of the onnxruntime backend."""

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

Shape = Sequence[str | int]


def identity(data_type: int = TensorProto.FLOAT, shape: Shape = ("batch", "width")) -> onnx.ModelProto:
    """x -> y, the same."""
    return model([helper.make_node("Identity", ["x"], ["y"])], {"x": (data_type, shape)}, {"y": (data_type, shape)})


def batch_size() -> onnx.ModelProto:
    """x [batch, 1] -> y [batch, 1]: in every row the number of rows that ran together."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Shape", ["x"], ["rows"], start=0, end=1),
        helper.make_node("Expand", ["rows", "shape"], ["y"]),
    ]
    return model(nodes, {"x": (TensorProto.INT64, ["batch", 1])}, {"y": (TensorProto.INT64, ["batch", 1])})


def add() -> onnx.ModelProto:
    """a [batch, n] + b [batch, m] -> y: fails at run time when n and m differ."""
    inputs = {"a": (TensorProto.FLOAT, ["batch", "n"]), "b": (TensorProto.FLOAT, ["batch", "m"])}
    return model([helper.make_node("Add", ["a", "b"], ["y"])], inputs, {"y": (TensorProto.FLOAT, ["batch", "k"])})


def total() -> onnx.ModelProto:
    """x [batch, width] -> y [1, width]: the sum of a batch, which cannot be split again."""
    node = helper.make_node("ReduceSum", ["x", "axis"], ["y"])
    built = model([node], {"x": (TensorProto.FLOAT, ["batch", 2])}, {"y": (TensorProto.FLOAT, ["some", 2])})
    built.graph.initializer.append(helper.make_tensor("axis", TensorProto.INT64, [1], [0]))
    return built


def model(
    nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, Shape]], outputs: dict[str, tuple[int, Shape]]
) -> onnx.ModelProto:
    """A graph of `nodes`; inputs and outputs are name -> (type, shape)."""
    described = [
        [helper.make_tensor_value_info(name, *description) for name, description in tensors.items()]
        for tensors in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "test", *described)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def place(
    repository: Path, name: str, model: onnx.ModelProto, config: str | None = "", filename: str = "model.onnx"
) -> None:
    """Put `model` into `repository`, with one instance and `config`, or without a config.pbtxt (None)."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    onnx.save(model, version / filename)
    if config is not None:
        (repository / name / "config.pbtxt").write_text(
            f'backend: "onnxruntime"\ninstance_group [ {{ kind: KIND_CPU count: 1 }} ]\n{config}'
        )
