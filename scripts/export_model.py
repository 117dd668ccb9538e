"""Export a Hugging Face causal language model to ONNX, for the speculative_decoding backend.

    python -m scripts.export_model PATH --into model_repository/language_model --role target|draft [--precision P]
    python -m scripts.export_model PATH --into model_repository/language_model --role target|draft --device cuda

PATH is a local folder (config.json, *.safetensors, tokenizer.json). The result is a folder in ONNX Runtime GenAI's
layout, made by its model builder, at <into>/1/<role>; it appears there whole or not at all.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx

from scripts.quantization.errors import QuantizationError
from scripts.quantization.model_file import record, save_model
from scripts.quantization.precision import Source

PAGED_BLOCK_TOKENS = 256  # what CUDA's PagedAttention is fast with
PRECISIONS = ("row-int8", "int4", "dynamic-int8", "fp16", "fp32")


class ExportError(Exception):
    """The model cannot be exported; the message says why."""


def export_model(source: Path, destination: Path, precision: str) -> None:
    """Export the Hugging Face folder `source` to the new folder `destination`, replacing what is there.

    precision: "row-int8" (rows do not depend on their neighbours: what lossless speculation wants on a CPU), another of
    those that need no data, or "fp32". Raises ExportError or QuantizationError, and leaves `destination` as it was.
    """
    _require_model_folder(source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".export-") as scratch:
        built = Path(scratch) / "built"
        export_fp32(source, built)
        if precision != "fp32":
            model = Source(onnx.load(built / "model.onnx"), None, decoder=True).make(precision)
            record(model, {"precision": precision})
            replace_model(model, built)
        shutil.rmtree(destination, ignore_errors=True)
        built.rename(destination)


def export_for_cuda(source: Path, destination: Path) -> None:
    """Export the Hugging Face folder `source` for NVIDIA GPUs: fp16 and PagedAttention, which CUDA alone has.

    Logits are computed of chosen tokens only. Raises ExportError, and leaves `destination` as it was.
    """
    _require_model_folder(source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".export-") as scratch:
        built = Path(scratch) / "built"
        extra = ["use_paged_attention=true", f"paged_block_size={PAGED_BLOCK_TOKENS}", "prune_lm_head=true"]
        _run_builder(source, built, Path(scratch) / "cache", "fp16", "cuda", extra)
        shutil.rmtree(destination, ignore_errors=True)
        built.rename(destination)


def export_fp32(source: Path, folder: Path) -> None:
    """Export the Hugging Face folder `source` to the new `folder` in fp32. Raises ExportError."""
    _require_model_folder(source)
    with tempfile.TemporaryDirectory(prefix="export-") as cache:
        _run_builder(source, folder, Path(cache), "fp32", "cpu")
    replace_model(onnx.load(folder / "model.onnx"), folder)


def _require_model_folder(source: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        if not (source / name).is_file():
            raise ExportError(f"{source} has no {name}: it must be a local Hugging Face folder")


def replace_model(model: onnx.ModelProto, folder: Path) -> None:
    """Write `model` in place of the one in `folder`: as one file, where its weights fit."""
    for file in folder.glob("model.onnx*"):
        file.unlink()
    save_model(model, folder)


def _run_builder(
    source: Path, output: Path, cache: Path, precision: str, device: str, extra: Sequence[str] = ()
) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", output, "-c", cache]
    command += ["-p", precision, "-e", device, *(["--extra_options", *extra] if extra else [])]
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines() or finished.stdout.strip().splitlines() or ["no message"]
        raise ExportError(f"ONNX Runtime GenAI's model builder refused {source}: {lines[-1]}")


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--into", type=Path, required=True, help="a model's folder in the repository")
    parser.add_argument("--role", choices=("target", "draft"), required=True)
    parser.add_argument("--precision", choices=PRECISIONS, help="row-int8 unless given; fp16 with --device cuda")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and arguments.precision not in (None, "fp16"):
        parser.error(f"--precision {arguments.precision} with --device cuda: it must be fp16")
    precision = "fp16" if arguments.device == "cuda" else arguments.precision or "row-int8"
    destination = arguments.into / "1" / arguments.role
    try:
        if arguments.device == "cuda":
            export_for_cuda(arguments.path, destination)
        else:
            export_model(arguments.path, destination, precision)
    except (ExportError, QuantizationError) as error:
        sys.exit(f"error: {error}")
    size = sum(file.stat().st_size for file in destination.iterdir())
    print(f"{destination}: {precision}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
