"""From row-wise INT8 back to fp32: the model of the rounded weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from scripts.quantization import texts
from scripts.quantization.dequantize import dequantize_rows
from scripts.quantization.errors import QuantizationError
from scripts.quantization.graph import graph_inputs
from scripts.quantization.row_int8 import quantize_rows
from tests import quantization_models
from tests.unit.conftest import Export

TOKENS = np.random.default_rng(0).integers(5, 200, 40).tolist()


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the fp32 model whose weights are what INT8 by row (of tables) and by column (of products) leaves of them.

    The head of tied embeddings is read transposed: its columns are the table's rows.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    axes = {node.input[1]: 0 for node in graph.node if node.op_type == "MatMul"}
    axes |= {node.input[0]: 1 for node in graph.node if node.op_type == "Gather" and node.input[1] == "input_ids"}
    turned = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose"}
    axes |= {turned[name]: 1 - axis for name, axis in axes.items() if name in turned}
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name in axes and values.ndim == 2:
            scale = np.abs(values).max(axes[tensor.name], keepdims=True) / 127
            scale[scale == 0] = 1  # the row of the padding token
            values = (np.rint(values / scale) * scale).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return copy


def logits(model: onnx.ModelProto, folder: Path) -> np.ndarray:
    feeds = texts.decoder_feeds(graph_inputs(model), TOKENS, folder)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(["logits"], feeds)[0]


@pytest.mark.parametrize("name", ["llama-fp32", "qwen2-fp32"], ids=["untied", "tied"])
def test_a_decoder_comes_back_as_the_fp32_model_of_its_rounded_weights(
    exported: Callable[[str], Export], name: str
) -> None:
    folder = exported(name).folder
    original = onnx.load(folder / "model.onnx")
    quantized = quantize_rows(original)
    before = quantized.SerializeToString()
    restored = dequantize_rows(quantized)
    assert quantized.SerializeToString() == before
    operators = {node.op_type for node in restored.graph.node}
    assert operators.isdisjoint({"MatMulInteger", "QuantizeLinear", "DynamicQuantizeLinear"})
    expected, given = logits(rounded(original), folder), logits(restored, folder)
    np.testing.assert_allclose(given, expected, atol=2e-5 * np.abs(expected).max())
    assert np.abs(logits(original, folder) - given).max() > 1e-3  # rounding is not undone
    assert restored.ByteSize() == pytest.approx(original.ByteSize(), rel=0.1)


def test_quantizing_again_gives_the_same_model(exported: Callable[[str], Export]) -> None:
    """Tied embeddings, made by the exporter: the weights are on INT8's grid already."""
    folder = exported("llama-row-int8").folder
    stored = onnx.load(folder / "model.onnx")
    again = quantize_rows(dequantize_rows(stored))
    first, second = logits(stored, folder), logits(again, folder)
    np.testing.assert_allclose(second, first, atol=1e-3 * np.abs(first).max())
    assert again.ByteSize() == pytest.approx(stored.ByteSize(), rel=0.01)


def test_a_model_without_such_products_is_refused() -> None:
    with pytest.raises(QuantizationError, match="no product in row-wise INT8"):
        dequantize_rows(quantization_models.classifier())
