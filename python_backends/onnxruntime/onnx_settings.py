"""What a model's config.pbtxt says about its ONNX Runtime session, as Triton's C++ ONNX Runtime backend reads it.

https://github.com/triton-inference-server/onnxruntime_backend/blob/main/README.md lists the fields. Two differ:
`parameters` may hold any of ONNX Runtime's `session.` entries, and `share_session_between_instances` has no effect, for
each instance is a process of its own here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Config = Mapping[str, Any]
Provider = tuple[str, dict[str, str]]  # name and options
Choice = TypeVar("Choice")

DEFAULT_MAX_BATCH_SIZE = 4  # Triton's own default

# optimization.graph.level -> name in onnxruntime.GraphOptimizationLevel
GRAPH_LEVELS = {-1: "ORT_ENABLE_BASIC", 0: "ORT_ENABLE_ALL", 1: "ORT_ENABLE_EXTENDED", 2: "ORT_DISABLE_ALL"}
EXECUTION_MODES = {"0": "ORT_SEQUENTIAL", "1": "ORT_PARALLEL"}
BOOLEANS = {"0": False, "1": True, "false": False, "true": True}

PRECISIONS = {
    "FP32": {},
    "FP16": {"trt_fp16_enable": "1"},
    "BF16": {"trt_bf16_enable": "1"},
    "INT8": {"trt_int8_enable": "1"},
}
TENSORRT_OPTIONS = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}

# Top-level parameters that set CUDA provider options: the meanings of their values, and the value when they are absent.
CUDA_PARAMETERS: dict[str, tuple[dict[str, str] | None, str]] = {
    "cudnn_conv_algo_search": ({"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"}, "0"),
    "gpu_mem_limit": (None, str(2**64 - 1)),
    "arena_extend_strategy": ({"0": "kNextPowerOfTwo", "1": "kSameAsRequested"}, "0"),
    "do_copy_in_default_stream": (None, "1"),
}


@dataclass(frozen=True)
class SessionSettings:
    """Validated settings of one instance's session. Thread counts of 0 leave the choice to ONNX Runtime."""

    graph_level: str
    execution_mode: str
    intra_op_threads: int
    inter_op_threads: int
    memory_arena: bool
    memory_pattern: bool
    session_entries: dict[str, str]
    run_entries: dict[str, str]
    custom_operator_libraries: tuple[str, ...]
    providers: tuple[Provider, ...]


def session_settings(config: Config, kind: str, device_id: str) -> SessionSettings:
    """Read the settings for an instance of `kind` (CPU, GPU, ...) on `device_id`.

    Raises ValueError naming the field and its value.
    """
    parameters = _parameters(config)
    libraries = config.get("model_operations", {}).get("op_library_filename", [])
    return SessionSettings(
        graph_level=_graph_level(config),
        execution_mode=_choice(parameters, "execution_mode", "0", EXECUTION_MODES),
        intra_op_threads=_thread_count(parameters, "intra_op_thread_count"),
        inter_op_threads=_thread_count(parameters, "inter_op_thread_count"),
        memory_arena=_choice(parameters, "enable_mem_arena", "1", BOOLEANS),
        memory_pattern=_choice(parameters, "enable_mem_pattern", "1", BOOLEANS),
        session_entries={key: value for key, value in parameters.items() if key.startswith("session.")},
        run_entries={key: value for key, value in parameters.items() if key.startswith("memory.")},
        custom_operator_libraries=tuple(libraries),
        providers=(*_gpu_providers(config, parameters, kind, device_id), *_cpu_providers(config)),
    )


def default_max_batch_size(server_command: Iterable[str]) -> int:
    """Find `--backend-config=[onnxruntime,]default-max-batch-size=N` among the arguments of the server."""
    setting = re.compile(r"(?:--backend-config=)?(?:onnxruntime,|,)?default-max-batch-size=(\d+)")
    matches = [match for match in map(setting.fullmatch, server_command) if match]
    return int(matches[-1][1]) if matches else DEFAULT_MAX_BATCH_SIZE


def _parameters(config: Config) -> dict[str, str]:
    return {key: value["string_value"] for key, value in config.get("parameters", {}).items()}


def _graph_level(config: Config) -> str:
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    if level not in GRAPH_LEVELS:
        raise ValueError(f"optimization.graph.level must be one of {sorted(GRAPH_LEVELS)}, got {level}")
    return GRAPH_LEVELS[level]


def _choice(parameters: Mapping[str, str], key: str, default: str, choices: Mapping[str, Choice]) -> Choice:
    value = parameters.get(key, default)
    if value.lower() not in choices:
        raise ValueError(f"parameter '{key}' must be one of {', '.join(choices)}, got '{value}'")
    return choices[value.lower()]


def _thread_count(parameters: Mapping[str, str], key: str) -> int:
    value = parameters.get(key, "0")
    if not value.isdecimal():
        raise ValueError(f"parameter '{key}' must be an integer of 0 or more, got '{value}'")
    return int(value)


def accelerators(config: Config, key: str) -> list[Provider]:
    """Return name and parameters of each entry of optimization.execution_accelerators.`key`."""
    entries = config.get("optimization", {}).get("execution_accelerators", {}).get(key, [])
    return [(entry["name"], dict(entry.get("parameters", {}))) for entry in entries]


def _gpu_providers(config: Config, parameters: Mapping[str, str], kind: str, device_id: str) -> list[Provider]:
    """CUDA, which every GPU instance has, behind TensorRT where that is asked for. Other instances ignore both."""
    if kind != "GPU":
        return []
    providers: list[Provider] = []
    cuda: dict[str, str] = {}
    for name, options in accelerators(config, "gpu_execution_accelerator"):
        if name == "tensorrt":
            providers.append(("TensorrtExecutionProvider", {**_tensorrt_options(options), "device_id": device_id}))
        elif name == "cuda":
            cuda.update(options)
        else:
            raise ValueError(f"unknown Execution Accelerator '{name}' is requested")
    for key, (meanings, default) in CUDA_PARAMETERS.items():
        cuda[key] = _choice(parameters, key, default, meanings) if meanings else parameters.get(key, default)
    return [*providers, ("CUDAExecutionProvider", {**cuda, "device_id": device_id})]


def _tensorrt_options(parameters: dict[str, str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for key, value in parameters.items():
        if key == "precision_mode":
            if value not in PRECISIONS:
                raise ValueError(f"unsupported precision mode '{value}' is requested")
            options.update(PRECISIONS[value])
        elif key in TENSORRT_OPTIONS or key.startswith("trt_"):
            options[TENSORRT_OPTIONS.get(key, key)] = value
        else:
            raise ValueError(f"unknown parameter '{key}' is provided for TensorRT Execution Accelerator")
    return options


def _cpu_providers(config: Config) -> list[Provider]:
    providers: list[Provider] = []
    for name, options in accelerators(config, "cpu_execution_accelerator"):
        if name != "openvino":
            raise ValueError(f"unknown Execution Accelerator '{name}' is requested")
        providers.append(("OpenVINOExecutionProvider", {"device_type": "CPU", **options}))
    return providers
