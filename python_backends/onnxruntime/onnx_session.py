"""An ONNX Runtime session as a Triton model sees it: whole batches in, one run, one result per request out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx_settings import SessionSettings
from onnx_signature import GraphTensor, Signature

Tensors = dict[str, NDArray[Any]]


class InvalidInputError(ValueError):
    """A request's tensor that the graph cannot take."""


class OnnxSession:
    """The model at `path`, loaded with `settings`.

    Raises ValueError when a provider is missing; ONNX Runtime's own errors pass through.
    """

    def __init__(self, path: Path, settings: SessionSettings) -> None:
        self.session = onnxruntime.InferenceSession(
            path, _session_options(settings), providers=_available(settings), enable_fallback=0
        )
        missing = [name for name, _ in settings.providers if name not in self.session.get_providers()]
        if missing:
            raise ValueError(f"ONNX Runtime could not start {', '.join(missing)}; its log says why")
        self.run_options = onnxruntime.RunOptions()
        for key, value in settings.run_entries.items():
            self.run_options.add_run_config_entry(key, value)
        self.signature = Signature(
            tuple(GraphTensor.of(argument) for argument in self.session.get_inputs()),
            tuple(GraphTensor.of(argument) for argument in self.session.get_outputs()),
            tuple(GraphTensor.of(argument) for argument in self.session.get_overridable_initializers()),
        )

    def run(self, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> Tensors:
        """Run the graph once. Strings are bytes on the way in and str on the way out, in arrays of objects.

        Raises InvalidInputError for a string that is not UTF-8.
        """
        scalars = {tensor.name for tensor in (*self.signature.inputs, *self.signature.optional) if not tensor.shape}
        feed = {name: _native(name, value.reshape(()) if name in scalars else value) for name, value in inputs.items()}
        results = self.session.run(outputs, feed, self.run_options)
        return dict(zip(outputs, results, strict=True))

    def run_batch(self, outputs: Sequence[str], requests: Sequence[Mapping[str, NDArray[Any]]]) -> list[Tensors]:
        """Run several requests, batch dimension in front, as one; return the outputs of each.

        Raises ValueError when an output does not have the batch size of its inputs.
        """
        if len(requests) == 1:
            joined = requests[0]
        else:
            joined = {name: np.concatenate([request[name] for request in requests]) for name in requests[0]}
        sizes = [len(next(iter(request.values()))) for request in requests]
        results = self.run(outputs, joined)
        for name, value in results.items():
            if value.shape[:1] != (sum(sizes),):
                raise ValueError(f"output '{name}' has shape {list(value.shape)} for a batch of {sum(sizes)}")
        ends = np.cumsum(sizes)
        return [
            {name: value[end - size : end] for name, value in results.items()}
            for size, end in zip(sizes, ends, strict=True)
        ]


def _session_options(settings: SessionSettings) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, settings.graph_level)
    options.execution_mode = getattr(onnxruntime.ExecutionMode, settings.execution_mode)
    options.intra_op_num_threads = settings.intra_op_threads
    options.inter_op_num_threads = settings.inter_op_threads
    options.enable_cpu_mem_arena = settings.memory_arena
    options.enable_mem_pattern = settings.memory_pattern
    for key, value in settings.session_entries.items():
        options.add_session_config_entry(key, value)
    for library in settings.custom_operator_libraries:
        options.register_custom_ops_library(library)
    return options


def _available(settings: SessionSettings) -> list[str | tuple[str, dict[str, str]]]:
    installed = onnxruntime.get_available_providers()
    for name, _ in settings.providers:
        if name not in installed:
            raise ValueError(
                f"the config needs {name}, which this ONNX Runtime ({onnxruntime.__version__}) does not have; "
                f"it has {', '.join(installed)}"
            )
    return [*settings.providers, "CPUExecutionProvider"]


def _native(name: str, value: NDArray[Any]) -> NDArray[Any]:
    """ONNX Runtime takes strings as str, Triton has them as bytes."""
    if value.dtype != np.object_:
        return value
    try:
        strings = [element.decode() for element in value.ravel()]
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"input '{name}' must be UTF-8: {error}") from error
    return np.array(strings, dtype=np.object_).reshape(value.shape)
