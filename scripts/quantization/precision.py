"""The precisions, what each suits, and making a model in one of them."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import onnx
import onnxruntime
from onnxruntime.quantization.calibrate import TensorsData

from scripts.quantization import integers, preparation
from scripts.quantization.errors import QuantizationError
from scripts.quantization.float16 import float16, overflowing_nodes
from scripts.quantization.graph import Feeds, name_nodes
from scripts.quantization.int4 import int4
from scripts.quantization.row_int8 import quantize_rows
from scripts.quantization.smoothing import smooth

Precision = Literal["dynamic-int8", "static-int8", "fp16", "int4", "row-int8"]
PRECISIONS: tuple[Precision, ...] = ("dynamic-int8", "static-int8", "fp16", "int4", "row-int8")
Provider = Literal["cpu", "cuda", "tensorrt"]
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

# Measured, or read off the providers' lists of kernels: what gains speed there, and what runs there at all.
FAST: dict[str, tuple[Precision, ...]] = {
    "cpu": ("dynamic-int8", "static-int8", "int4", "row-int8"),
    "cuda": ("fp16", "int4"),
    "tensorrt": ("fp16", "static-int8"),
}
RUNS: dict[str, tuple[Precision, ...]] = {
    "cpu": PRECISIONS,
    "cuda": ("static-int8", "fp16", "int4"),
    "tensorrt": ("static-int8", "fp16"),
}


@dataclass(frozen=True)
class Options:
    """How to quantize. calibration_method: of static-int8. block_size, symmetric: of int4."""

    calibration_method: integers.Method = "minmax"
    block_size: int = 32
    symmetric: bool = True


@dataclass(eq=False)
class Source:
    """An fp32 model, ready to be made in any precision.

    calibration: batches of real inputs, which may be iterated again and again, or None. decoder: a language model of
    ONNX Runtime GenAI's layout. Smoothing takes the calibration, or else `stand_in` (random tokens, for text models).
    """

    model: onnx.ModelProto
    calibration: Iterable[Feeds] | None = None
    options: Options = field(default_factory=Options)
    decoder: bool = False
    stand_in: Iterable[Feeds] | None = None

    def make(self, precision: Precision, exclude: Collection[str] = ()) -> onnx.ModelProto:
        """Return the model in `precision`, the nodes named in `exclude` in fp32. Raises QuantizationError."""
        if precision == "dynamic-int8":
            made = integers.dynamic_int8(self._smoothed, exclude)
        elif precision == "static-int8":
            made = integers.static_int8(self._smoothed, self._ranges, exclude)
        elif precision == "fp16":
            made = float16(self.prepared, self._overflowing, exclude)
        elif precision == "int4":
            made = int4(self.prepared, self.options.block_size, self.options.symmetric, exclude)
        else:
            made = quantize_rows(self._smoothed, fuse_scales=not self.decoder, exclude=exclude)
        del made.graph.value_info[:]  # with known shapes ONNX Runtime makes SkipLayerNormalization, slow on CPUs
        return made

    def smooths(self, precision: Precision) -> bool:
        """Whether outlier channels are scaled down before quantizing to `precision`."""
        return precision in ("dynamic-int8", "static-int8", "row-int8") and self._observations is not None

    @property
    def _observations(self) -> Iterable[Feeds] | None:
        return self.calibration if self.calibration is not None else self.stand_in

    @cached_property
    def prepared(self) -> onnx.ModelProto:
        """The model after ONNX Runtime's pre-processing, with a name for each node.

        A decoder keeps the form that ONNX Runtime GenAI exports: folding constants would store tied embeddings twice.
        """
        if not self.decoder:
            return preparation.prepare(self.model)
        name_nodes(self.model)
        return self.model

    @cached_property
    def _smoothed(self) -> onnx.ModelProto:
        if self._observations is None:
            return self.prepared
        smoothed = smooth(self.prepared, self._observations)
        name_nodes(smoothed)
        return smoothed

    @cached_property
    def _ranges(self) -> TensorsData:
        if self.calibration is None:
            raise QuantizationError("static-int8 needs calibration data: give --calibration FILE or DIR")
        return integers.activation_ranges(self._smoothed, self.calibration, self.options.calibration_method)

    @cached_property
    def _overflowing(self) -> list[str]:
        return overflowing_nodes(self.prepared, self._observations) if self._observations is not None else []


def require_runs(precision: Precision, provider: Provider) -> None:
    """Raise QuantizationError when `provider` lacks the operators of `precision`, or is not installed."""
    if precision not in RUNS[provider]:
        runs = ", ".join(RUNS[provider])
        raise QuantizationError(
            f"{provider} has no kernels for {precision}; it runs {runs}, fastest {FAST[provider][0]}"
        )
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise QuantizationError(
            f"this onnxruntime has no {PROVIDERS[provider]}: install onnxruntime-gpu to use {provider}"
        )


def slower_there(precision: Precision, provider: Provider) -> str | None:
    """Return a warning when `precision` is no faster than fp32 on `provider`, None when it is."""
    if precision in FAST[provider]:
        return None
    return f"{precision} saves memory but no time on {provider}: there {' and '.join(FAST[provider])} are fast"


def candidates(provider: Provider, calibrated: bool) -> list[Precision]:
    """Return what `auto` tries on `provider`: static-int8 only with calibration data."""
    return [precision for precision in FAST[provider] if calibrated or precision != "static-int8"]
