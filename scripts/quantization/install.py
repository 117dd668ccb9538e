"""Putting a quantized model into a Triton model repository."""

import shutil
from pathlib import Path

import onnx

from scripts.quantization.errors import QuantizationError
from scripts.quantization.graph import Input, graph_inputs
from scripts.quantization.model_file import save_model
from scripts.quantization.precision import Provider
from scripts.serving.installation import MODEL_REPOSITORY
from scripts.whole_file import write_whole

BATCH = 32
TYPES = {
    "bool": "BOOL", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64", "uint8": "UINT8",
    "float16": "FP16", "float32": "FP32", "float64": "FP64", "object": "STRING",
}  # fmt: skip


def require_writable(destination: Path) -> None:
    """Raise QuantizationError when a model cannot be written to `destination`; leaves nothing behind."""
    made = [folder for folder in (destination, *destination.parents) if not folder.exists()]
    try:
        destination.mkdir(parents=True, exist_ok=True)
        probe = destination / ".probe"
        probe.write_bytes(b"\0")
        probe.unlink()
    except OSError as error:
        raise QuantizationError(f"cannot write to {destination}: {error.strerror}") from error
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def install_encoder(folder: Path, destination: Path, provider: Provider) -> None:
    """Put `folder`/model.onnx into `destination`/1, with a config.pbtxt unless there is one."""
    model = onnx.load(folder / "model.onnx")
    version = destination / "1"
    try:
        version.mkdir(parents=True, exist_ok=True)
        save_model(model, version)
        _write_config(destination / "config.pbtxt", encoder_config(model, provider))
    except OSError as error:
        raise QuantizationError(f"cannot write to {destination}: {error.strerror}") from error


def install_decoder(folder: Path, destination: Path, role: str) -> None:
    """Put a language model's folder into `destination`/1/<role>, with a config.pbtxt unless there is one."""
    place = destination / "1" / role
    scratch = destination / "1" / f".{role}.new"
    try:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(folder, scratch)
        shutil.rmtree(place, ignore_errors=True)
        scratch.rename(place)
        shipped = MODEL_REPOSITORY / "language_model" / "config.pbtxt"
        _write_config(destination / "config.pbtxt", shipped.read_text(encoding="utf-8"))
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise QuantizationError(f"cannot write to {destination}: {error.strerror}") from error


def encoder_config(model: onnx.ModelProto, provider: Provider) -> str:
    """Return a config.pbtxt for Triton's onnxruntime backend: dynamic batching where all tensors have a free batch
    dimension, one instance on the provider's kind of device."""
    inputs = graph_inputs(model)
    outputs = graph_inputs(_outputs_as_inputs(model))
    batched = all(tensor.shape and not isinstance(tensor.shape[0], int) for tensor in (*inputs, *outputs))
    lines = ['backend: "onnxruntime"', f"max_batch_size: {BATCH if batched else 0}"]
    for kind, tensors in (("input", inputs), ("output", outputs)):
        entries = ",\n".join(f"  {{ {_entry(tensor, batched)} }}" for tensor in tensors)
        lines.append(f"{kind} [\n{entries}\n]")
    device = "KIND_CPU" if provider == "cpu" else "KIND_GPU"
    lines.append(f"instance_group [ {{ kind: {device} count: 1 }} ]")
    if batched:
        lines.append("dynamic_batching { }")
    if provider == "tensorrt":
        lines.append('optimization { execution_accelerators { gpu_execution_accelerator [ { name: "tensorrt" } ] } }')
    return "\n".join(lines) + "\n"


def _entry(tensor: Input, batched: bool) -> str:
    sizes = [size if isinstance(size, int) else -1 for size in tensor.shape[batched:]]
    reshaped = "dims: [ 1 ] reshape: { shape: [ ] }" if not sizes else f"dims: {sizes}"
    name = tensor.name.replace("\\", "\\\\").replace('"', '\\"')
    return f'name: "{name}" data_type: TYPE_{TYPES[tensor.data_type.name]} {reshaped}'


def _outputs_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    turned = onnx.ModelProto()
    turned.graph.input.extend(model.graph.output)
    return turned


def _write_config(path: Path, content: str) -> None:
    if not path.exists():
        write_whole(path, content)
