"""Triton adapter of the backend "onnxruntime": serves any ONNX model on a Triton without NVIDIA's C++ backend."""

import json
import os
import re
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported

import triton_python_backend_utils as pb_utils
from onnx_session import InvalidInputError, OnnxSession, Tensors
from onnx_settings import accelerators, default_max_batch_size, session_settings
from onnx_signature import complete, validate


class TritonPythonModel:
    """One instance of one model."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Complete the config from the graph. It names a file in the model's version directory."""
        config = auto_complete_model_config.as_dict()
        if not (config["input"] and config["output"]):
            session = OnnxSession(_model_path(config), session_settings(config, "CPU", "0"))
            complete(config, session.signature, default_max_batch_size(_server_command()))
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model; an exception here is Triton's load error."""
        config, kind = json.loads(args["model_config"]), args["model_instance_kind"]
        settings = session_settings(config, kind, args["model_instance_device_id"])
        if kind != "GPU" and accelerators(config, "gpu_execution_accelerator"):
            pb_utils.Logger.log_warn(f"{config['name']}: {kind} instances ignore gpu_execution_accelerator")
        self.session = OnnxSession(_model_path(config), settings)
        validate(config, self.session.signature)
        self.batched = config["max_batch_size"] > 0
        self.outputs = [output["name"] for output in config["output"]]
        # The dims that the config gives to a scalar, for which Triton has no shape of its own
        self.scalars = {tensor.name for tensor in self.session.signature.outputs if not tensor.shape}
        self.dims = {output["name"]: output["dims"] for output in config["output"]}

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer one batch with one ONNX Runtime call; when it fails, all of its requests get the error."""
        try:
            return [self._response(tensors) for tensors in self._run([_inputs(request) for request in requests])]
        except Exception as exception:
            return [pb_utils.InferenceResponse(error=_error(exception)) for _ in requests]

    def _run(self, requests: list[Tensors]) -> list[Tensors]:
        if self.batched:
            return self.session.run_batch(self.outputs, requests)
        return [self.session.run(self.outputs, request) for request in requests]

    def _response(self, tensors: Tensors) -> Any:
        shaped = {
            name: value.reshape(self.dims[name]) if name in self.scalars else value for name, value in tensors.items()
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in shaped.items()])


def _inputs(request: Any) -> Tensors:
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def _model_path(config: dict[str, Any]) -> Path:
    path = Path(pb_utils.get_model_dir()) / (config["default_model_filename"] or "model.onnx")
    path = path / "model.onnx" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"unable to find '{path}' for model instance '{config['name']}'")
    return path


def _server_command() -> list[str]:
    """The arguments of the parent process: Triton hands --backend-config to C++ backends only."""
    return Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")


def _error(exception: Exception) -> Any:
    """ONNX Runtime says `[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : text`; the C++ backend says the same this way."""
    message = re.sub(r"^\[ONNXRuntimeError\] : (\d+) : \w+ : ", r"onnx runtime error \1: ", str(exception))
    invalid = isinstance(exception, InvalidInputError)
    return pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG if invalid else pb_utils.TritonError.INTERNAL)
