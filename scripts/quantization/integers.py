"""INT8 by ONNX Runtime's quantizers, with the settings that keep quality, and tables in INT8 by row."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal

import onnx
from onnx import TensorProto
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import (
    CalibrationDataReader,
    TensorsData,
    create_calibrator,
    save_tensors_data,
)

from scripts.quantization.errors import QuantizationError
from scripts.quantization.graph import Feeds, declare_values, weighted_nodes
from scripts.quantization.model_file import save_model
from scripts.quantization.row_int8 import quantize_tables

Method = Literal["minmax", "entropy", "percentile"]
METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}

# Operators with weights. ONNX Runtime's defaults would add softmax, norms and sums (cosine .36 for MiniLM), and turn
# opset 23's Attention into a node that it cannot load.
WEIGHTED = ["MatMul", "Conv"]
# In a convolutional network what lies between the convolutions has to be INT8 as well, or each pays a conversion.
CONVOLUTIONAL = ["Add", "AveragePool", "Concat", "GlobalAveragePool", "MaxPool", "Relu", "Resize"]


def dynamic_int8(model: onnx.ModelProto, exclude: Collection[str] = ()) -> onnx.ModelProto:
    """Weights int8 with a scale per channel, activations uint8 with a scale per tensor and call."""

    def quantize(source: Path, destination: Path, external: bool) -> None:
        quantize_dynamic(
            source,
            destination,
            op_types_to_quantize=[*WEIGHTED, "LSTM"],
            per_channel=True,
            nodes_to_exclude=list(exclude),
            use_external_data_format=external,
            extra_options={"DefaultTensorType": TensorProto.FLOAT},  # where contrib operators end shape inference
        )

    return _through_files(quantize_tables(model, exclude), quantize)


def activation_ranges(model: onnx.ModelProto, batches: Iterable[Feeds], method: Method) -> TensorsData:
    """Return the range of each activation that static quantization needs, one batch in memory at a time.

    Raises QuantizationError when there is no batch.
    """
    with tempfile.TemporaryDirectory(prefix="quantize-") as scratch, quiet():
        save_model(declare_values(quantize_tables(model)), Path(scratch))
        external = any(Path(scratch).glob("*.data"))
        calibrator = create_calibrator(
            Path(scratch, "model.onnx"),
            _static_operators(model),
            augmented_model_path=str(Path(scratch, "augmented.onnx")),
            calibrate_method=METHODS[method],
            use_external_data_format=external,
        )
        seen = False
        for feeds in batches:
            calibrator.collect_data(_OneBatch(feeds))
            seen = True
        if not seen:
            raise QuantizationError("there is no calibration data: the file has no samples")
        return calibrator.compute_data()


def static_int8(model: onnx.ModelProto, ranges: TensorsData, exclude: Collection[str] = ()) -> onnx.ModelProto:
    """QDQ: weights int8 with a scale per channel, activations uint8 with the scale that `ranges` give."""

    def quantize(source: Path, destination: Path, external: bool) -> None:
        cache = source.with_name("ranges.json")
        save_tensors_data(ranges, cache)
        quantize_static(
            source,
            destination,
            None,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_static_operators(model),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[*exclude, *_products_of_activations(model)],
            use_external_data_format=external,
            calibrate_method=ranges.calibration_method,
            calibration_cache_path=cache,
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )

    return _through_files(declare_values(quantize_tables(model, exclude)), quantize)


class _OneBatch(CalibrationDataReader):
    """A reader of a single batch: ONNX Runtime's calibrators keep all that one reader gives in memory, and refuse
    batches of different lengths within it."""

    def __init__(self, feeds: Feeds) -> None:
        self._left = [feeds]

    def get_next(self) -> Feeds | None:
        return self._left.pop() if self._left else None


def _static_operators(model: onnx.ModelProto) -> list[str]:
    convolves = any(node.op_type == "Conv" for node in model.graph.node)
    return [*WEIGHTED, *CONVOLUTIONAL] if convolves else WEIGHTED


def _products_of_activations(model: onnx.ModelProto) -> list[str]:
    weighted = {node.name for node in weighted_nodes(model)}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in weighted]


def _through_files(model: onnx.ModelProto, quantize: Callable[[Path, Path, bool], None]) -> onnx.ModelProto:
    """ONNX Runtime's quantizers read and write files."""
    with tempfile.TemporaryDirectory(prefix="quantize-") as scratch, quiet():
        save_model(model, Path(scratch))
        external = any(Path(scratch).glob("*.data"))
        quantize(Path(scratch, "model.onnx"), Path(scratch, "quantized.onnx"), external)
        return onnx.load(Path(scratch, "quantized.onnx"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what ONNX Runtime's quantizers print and log at every tensor."""
    level = logging.getLogger().manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
