"""quantize_rows: what it promises about values, rows, storage and refusals."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from scripts.quantization.errors import QuantizationError
from scripts.quantization.row_int8 import quantize_rows

Float = NDArray[np.float32]
WIDTH, HIDDEN, VOCABULARY = 64, 96, 50
RNG = np.random.default_rng(0)
FORMS = pytest.mark.parametrize("fuse_scales", [False, True])


def model(
    nodes: list[onnx.NodeProto], constants: dict[str, Float], inputs: dict[str, int], opset: int = 18
) -> onnx.ModelProto:
    """A graph of `nodes` from `inputs` (name -> type) of [batch, sequence(, WIDTH)] to the output `y`."""
    shapes = {TensorProto.FLOAT: ["batch", "sequence", WIDTH], TensorProto.INT64: ["batch", "sequence"]}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, shapes[kind]) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def product_model(weight: Float, opset: int = 18) -> onnx.ModelProto:
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, {"x": TensorProto.FLOAT}, opset)


def two_products_model() -> onnx.ModelProto:
    """Gate and up projections: two products of one x."""
    nodes = [
        helper.make_node("MatMul", ["x", "gate"], ["g"]),
        helper.make_node("MatMul", ["x", "up"], ["u"]),
        helper.make_node("Mul", ["g", "u"], ["y"]),
    ]
    return model(nodes, {"gate": normal(WIDTH, HIDDEN), "up": normal(WIDTH, HIDDEN)}, {"x": TensorProto.FLOAT})


def tied_model() -> onnx.ModelProto:
    """Embedding and language model head in one matrix, as ONNX Runtime GenAI's builder writes them."""
    nodes = [
        helper.make_node("Transpose", ["head"], ["table"], perm=[1, 0]),
        helper.make_node("Gather", ["table", "ids"], ["embedded"]),
        helper.make_node("Tanh", ["embedded"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "head"], ["y"]),
    ]
    return model(nodes, {"head": normal(WIDTH, VOCABULARY)}, {"ids": TensorProto.INT64})


def normal(*shape: int) -> Float:
    return RNG.standard_normal(shape).astype(np.float32)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def run(model: onnx.ModelProto, **inputs: NDArray) -> Float:
    return session(model).run(["y"], inputs)[0]


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@FORMS
@pytest.mark.parametrize("build", [lambda: product_model(normal(WIDTH, HIDDEN)), two_products_model])
def test_products_stay_close_to_fp32(build: Callable[[], onnx.ModelProto], fuse_scales: bool) -> None:
    original = build()
    x = normal(2, 5, WIDTH)
    expected, actual = run(original, x=x), run(quantize_rows(original, fuse_scales=fuse_scales), x=x)
    assert np.linalg.norm(actual - expected) < 0.02 * np.linalg.norm(expected)


@FORMS
def test_a_row_is_bit_identical_alone_and_in_any_batch(fuse_scales: bool) -> None:
    quantized = session(quantize_rows(two_products_model(), fuse_scales=fuse_scales))
    rows = normal(16, 1, WIDTH) * np.logspace(-3, 3, 16, dtype=np.float32)[:, None, None]
    alone = np.concatenate([quantized.run(None, {"x": row[None]})[0] for row in rows])
    for count in range(1, 17):
        order = RNG.permutation(16)[:count]
        as_batch = quantized.run(None, {"x": rows[order]})[0]
        as_sequence = quantized.run(None, {"x": rows[order].transpose(1, 0, 2)})[0]
        np.testing.assert_array_equal(as_batch, alone[order])
        np.testing.assert_array_equal(as_sequence.transpose(1, 0, 2), alone[order])


def test_both_forms_give_the_same_bits() -> None:
    original, x = two_products_model(), normal(3, 7, WIDTH)
    np.testing.assert_array_equal(
        run(quantize_rows(original), x=x), run(quantize_rows(original, fuse_scales=True), x=x)
    )


FINITE = st.floats(-(2.0**20), 2.0**20, width=32)
IDENTITY = quantize_rows(product_model(np.eye(WIDTH, dtype=np.float32)))
IDENTITY_SESSION = session(IDENTITY)


@settings(max_examples=200, deadline=None)
@given(arrays.arrays(np.float32, (1, 3, WIDTH), elements=FINITE))
def test_an_element_is_off_by_at_most_half_a_step(x: Float) -> None:
    y = IDENTITY_SESSION.run(None, {"x": x})[0]
    largest = np.abs(x).max(-1, keepdims=True)
    assert (np.abs(y - x) <= largest / 127 * 0.501 + 1e-30).all()


@FORMS
def test_rows_of_zeros_give_zeros(fuse_scales: bool) -> None:
    x = normal(1, 3, WIDTH)
    x[0, 1] = 0
    y = run(quantize_rows(two_products_model(), fuse_scales=fuse_scales), x=x)
    assert np.isfinite(y).all()
    assert (y[0, 1] == 0).all()
    assert (y[0, 0] != 0).any()


def test_zero_columns_of_a_weight_give_zeros() -> None:
    weight = normal(WIDTH, HIDDEN)
    weight[:, 3] = 0
    assert (run(quantize_rows(product_model(weight)), x=normal(1, 2, WIDTH))[..., 3] == 0).all()


def test_products_that_share_an_input_quantize_it_once() -> None:
    made = operators(quantize_rows(two_products_model()))
    assert made.count("QuantizeLinear") == 1
    assert made.count("MatMulInteger") == 2


def test_an_embedding_table_becomes_int8() -> None:
    original = model([helper.make_node("Gather", ["t", "ids"], ["y"])], {"t": normal(VOCABULARY, WIDTH)}, {"ids": 7})
    quantized = quantize_rows(original)
    ids = np.array([[0, 3, VOCABULARY - 1]])
    np.testing.assert_allclose(run(quantized, ids=ids), run(original, ids=ids), atol=0.02)
    assert {tensor.data_type for tensor in quantized.graph.initializer if len(tensor.dims) == 2} == {
        TensorProto.INT8,
        TensorProto.FLOAT,
    }
    assert not any(tensor.name == "t" for tensor in quantized.graph.initializer)


def test_a_table_looked_up_by_computed_ids_stays_fp32() -> None:
    nodes = [helper.make_node("Abs", ["ids"], ["places"]), helper.make_node("Gather", ["t", "places"], ["y"])]
    with pytest.raises(QuantizationError, match="to quantize"):
        quantize_rows(model(nodes, {"t": normal(VOCABULARY, WIDTH)}, {"ids": TensorProto.INT64}))


def test_tied_embeddings_are_stored_once_and_not_transposed_at_every_step(tmp_path: Path) -> None:
    original = tied_model()
    quantized = quantize_rows(original)
    tables = [tensor for tensor in quantized.graph.initializer if sorted(tensor.dims) == [VOCABULARY, WIDTH]]
    assert [(tensor.data_type, list(tensor.dims)) for tensor in tables] == [(TensorProto.INT8, [VOCABULARY, WIDTH])]

    ids = np.array([[1, 2, 3]])
    expected, actual = run(original, ids=ids), run(quantized, ids=ids)
    assert np.linalg.norm(actual - expected) < 0.02 * np.linalg.norm(expected)

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(quantized.SerializeToString(), options)
    assert "Transpose" not in operators(onnx.load(tmp_path / "optimized.onnx"))


def test_the_original_is_left_alone() -> None:
    original = tied_model()
    before = original.SerializeToString()
    quantize_rows(original)
    assert original.SerializeToString() == before


def test_old_opsets_are_refused() -> None:
    with pytest.raises(QuantizationError, match="opset 18 or newer, the model has 17"):
        quantize_rows(product_model(normal(WIDTH, HIDDEN), opset=17))


def test_excluded_nodes_stay_fp32() -> None:
    original = two_products_model()
    for index, node in enumerate(original.graph.node):
        node.name = f"node {index}"
    quantized = quantize_rows(original, exclude=["node 0"])
    assert operators(quantized).count("MatMul") == operators(quantized).count("MatMulInteger") == 1
    with pytest.raises(QuantizationError, match="to quantize"):
        quantize_rows(original, exclude=["node 0", "node 1"])


def test_a_model_without_matrices_is_refused() -> None:
    with pytest.raises(QuantizationError, match="to quantize"):
        quantize_rows(model([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": TensorProto.FLOAT}))
