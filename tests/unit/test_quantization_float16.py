"""fp16: what would overflow stays fp32, and so do inputs and outputs."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from scripts.quantization.float16 import float16, overflowing_nodes
from scripts.quantization.preparation import prepare
from tests import quantization_models
from tests.quantization_models import WIDTH

X = np.random.default_rng(0).standard_normal((16, WIDTH)).astype(np.float32)


def overflowing() -> onnx.ModelProto:
    """x -> y: between two ordinary products lie values of a million, written by "up" and read by "down"."""
    rng = np.random.default_rng(1)
    weights = {name: (rng.standard_normal((WIDTH, WIDTH)) * 0.1).astype(np.float32) for name in ("w0", "w1", "w2")}
    weights |= {"large": np.float32(1e6), "small": np.float32(1e-6)}
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], name="first"),
        helper.make_node("Mul", ["a", "large"], ["b"], name="up"),
        helper.make_node("MatMul", ["b", "w1"], ["c"], name="between"),
        helper.make_node("Mul", ["c", "small"], ["d"], name="down"),
        helper.make_node("MatMul", ["d", "w2"], ["y"], name="last"),
    ]
    return quantization_models.model(nodes, weights, {"x": ["batch", WIDTH]}, {"y": ["batch", WIDTH]})


def run(model: onnx.ModelProto) -> np.ndarray:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": X})[0]


def test_the_nodes_that_overflow_are_found() -> None:
    assert set(overflowing_nodes(overflowing(), [{"x": X}])) == {"up", "between", "down"}
    assert overflowing_nodes(prepare(quantization_models.classifier()), [{"x": X}]) == []


def test_what_overflows_in_any_batch_counts() -> None:
    batches = [{"x": X * 1e-6}, {"x": X}, {"x": X * 1e-6}]
    assert set(overflowing_nodes(overflowing(), batches)) == {"up", "between", "down"}
    assert overflowing_nodes(overflowing(), batches[:1]) == []


def test_a_node_that_overflows_stays_fp32_and_outputs_are_right() -> None:
    model = overflowing()
    expected = run(model)
    assert not np.allclose(run(float16(model)), expected, rtol=0.1)  # it matters
    half = float16(model, overflowing_nodes(model, [{"x": X}]))
    np.testing.assert_allclose(run(half), expected, atol=0.01 * np.abs(expected).max())
    types = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert types["w0"] == types["w2"] == TensorProto.FLOAT16
    assert types["w1"] == TensorProto.FLOAT


def test_with_calibration_data_the_tool_keeps_such_nodes_in_fp32(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X)
    path = quantization_models.store(overflowing(), tmp_path)
    result = quantization_models.study(path, tmp_path / "work", tmp_path / "x.npz").add("fp16", 0.01)
    assert result.quality["cosine_min"] > 0.9999
    assert result.excluded == []  # by what was seen, not by trying


def test_without_calibration_data_the_floor_is_kept_by_leaving_nodes_out_or_missed_openly(tmp_path: Path) -> None:
    path = quantization_models.store(overflowing(), tmp_path)
    result = quantization_models.study(path, tmp_path / "work").add("fp16", 0.01)
    assert result.loss <= 0.01
    outputs = onnxruntime.InferenceSession(result.folder / "model.onnx").run(None, {"x": X})[0]
    assert np.isfinite(outputs).all()


def test_a_constant_beyond_fp16_keeps_its_value() -> None:
    """ONNX Runtime's converter cuts constants at 10,000 unless told otherwise."""
    gains = np.geomspace(1, 60_000, WIDTH).astype(np.float32)
    weights = {"gains": gains, "w": np.eye(WIDTH, dtype=np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("Mul", ["a", "gains"], ["b"], name="gain"),
        helper.make_node("Div", ["b", "gains"], ["y"], name="back"),
        helper.make_node("Mul", ["a", "gains"], ["z"], name="out"),
    ]
    shapes: dict[str, list] = {"y": ["batch", WIDTH], "z": ["batch", WIDTH]}
    model = quantization_models.model(nodes, weights, {"x": ["batch", WIDTH]}, shapes)
    x = {"x": np.full((2, WIDTH), 0.5, np.float32)}  # 30,000 at most
    half = float16(model, overflowing_nodes(model, [x]))
    _, z = onnxruntime.InferenceSession(half.SerializeToString()).run(None, x)
    np.testing.assert_allclose(z, np.tile(gains / 2, (2, 1)), rtol=0.002)


def test_inputs_and_outputs_stay_fp32_and_weights_do_not() -> None:
    model = prepare(quantization_models.classifier())
    half = float16(model)
    kinds = {value.type.tensor_type.elem_type for value in (*half.graph.input, *half.graph.output)}
    assert kinds == {TensorProto.FLOAT}
    assert {tensor.data_type for tensor in half.graph.initializer} == {TensorProto.FLOAT16}
    assert all(numpy_helper.to_array(tensor).dtype == np.float32 for tensor in model.graph.initializer)


def test_outputs_that_are_not_finite_are_an_infinite_loss(tmp_path: Path) -> None:
    def spoil(source: Path, destination: Path) -> None:
        model = onnx.load(source)
        weight = model.graph.initializer[0]
        values = numpy_helper.to_array(weight).copy()
        values[0, 0] = np.nan
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        onnx.save(model, destination)

    path = quantization_models.store(quantization_models.classifier(), tmp_path)
    study = quantization_models.study(path, tmp_path / "work")
    assert study.include("spoilt", spoil).loss == float("inf")


@pytest.mark.parametrize("exclude", [["up"], ["first", "last"]])
def test_excluded_nodes_stay_fp32(exclude: list[str]) -> None:
    half = float16(overflowing(), exclude=exclude)
    consumers = {name: node.name for node in half.graph.node for name in node.input}
    kept = {consumers[tensor.name] for tensor in half.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    assert kept == set(exclude)
