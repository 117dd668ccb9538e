"""Where a model runs, as config.pbtxt's instance_group says."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Without workspace cuBLAS cannot split a matrix product's sums: then a row of it has the same bits among 1 or 640 rows
# (Llama shapes of 27M, 1.1B and 8B, H200). Lossless speculation rests on that; perf.gpu_steps measures what it costs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":0:0")
import onnxruntime

Provider = tuple[str, dict[str, str]]  # ONNX Runtime's name, and options

CPU: Provider = ("CPUExecutionProvider", {})
PROVIDERS = {"CPU": "CPUExecutionProvider", "GPU": "CUDAExecutionProvider"}


def execution_provider(instance_kind: str, device_id: int) -> Provider:
    """Return ONNX Runtime's provider, with its options, for Triton's model_instance_kind, CPU or GPU.

    Raises ValueError when this ONNX Runtime lacks it.
    """
    name = PROVIDERS[instance_kind]
    available = onnxruntime.get_available_providers()
    if name not in available:
        raise ValueError(
            f"instance_group asks for KIND_{instance_kind}, which needs ONNX Runtime's {name}; this one has "
            f"{', '.join(available)}: install onnxruntime-gpu, or set instance_group to KIND_CPU"
        )
    return name, {"device_id": str(device_id)} if instance_kind == "GPU" else {}
