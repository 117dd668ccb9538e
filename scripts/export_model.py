"""Export a Hugging Face causal language model to ONNX, for the speculative_decoding backend.

    python -m scripts.export_model PATH --into model_repository/language_model --role target|draft [--precision P]

PATH is a local folder (config.json, *.safetensors, tokenizer.json). The result is a folder in ONNX Runtime GenAI's
layout, made by its model builder, at <into>/1/<role>; it appears there whole or not at all.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

from scripts.row_int8 import quantize_rows

PRECISIONS = ("row-int8", "int8", "int4", "fp32")
ONE_FILE_BYTES = 1 << 30  # weights above this go to a file beside the graph: protobuf ends at 2 GB


class ExportError(Exception):
    """The model cannot be exported; the message says why."""


def export_model(source: Path, destination: Path, precision: str) -> None:
    """Export the Hugging Face folder `source` to the new folder `destination`, replacing what is there.

    precision: "row-int8" (rows do not depend on their neighbours: what lossless speculation wants on a CPU), "int8" or
    "int4" (weight-only MatMulNBits, int8 activations), "fp32". Raises ExportError, and leaves `destination` as it was.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (source / name).is_file():
            raise ExportError(f"{source} has no {name}: it must be a local Hugging Face folder")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".export-") as scratch:
        built = Path(scratch) / "built"
        _run_builder(source, built, "fp32" if precision == "row-int8" else precision, Path(scratch) / "cache")
        model = onnx.load(built / "model.onnx")
        if precision == "row-int8":
            model = quantize_rows(model)
        _save(model, built)
        shutil.rmtree(destination, ignore_errors=True)
        built.rename(destination)


def _run_builder(source: Path, output: Path, precision: str, cache: Path) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", output, "-c", cache]
    command += ["-p", precision, "-e", "cpu"]
    if precision in ("int8", "int4"):
        command += ["--extra_options", "int4_accuracy_level=4"]
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines() or finished.stdout.strip().splitlines() or ["no message"]
        raise ExportError(f"ONNX Runtime GenAI's model builder refused {source}: {lines[-1]}")


def _save(model: onnx.ModelProto, folder: Path) -> None:
    """Write the graph with its weights into one file, where they fit, and into two otherwise."""
    (folder / "model.onnx").unlink()
    (folder / "model.onnx.data").unlink(missing_ok=True)
    external = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > ONE_FILE_BYTES
    onnx.save(model, folder / "model.onnx", save_as_external_data=external, location="model.onnx.data")


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--into", type=Path, required=True, help="a model's folder in the repository")
    parser.add_argument("--role", choices=("target", "draft"), required=True)
    parser.add_argument("--precision", choices=PRECISIONS, default="row-int8")
    arguments = parser.parse_args()
    destination = arguments.into / "1" / arguments.role
    try:
        export_model(arguments.path, destination, arguments.precision)
    except ExportError as error:
        sys.exit(f"error: {error}")
    size = sum(file.stat().st_size for file in destination.iterdir())
    print(f"{destination}: {arguments.precision}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
