"""What goes wrong when a model is quantized."""

from onnxruntime.capi import onnxruntime_pybind11_state as state

# ONNX Runtime's errors have no base of their own.
RUNTIME_ERRORS = (
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NotImplemented,
    state.RuntimeException,
)


class QuantizationError(Exception):
    """A model, its data or its destination is not usable; the message names what, and what would be right."""
