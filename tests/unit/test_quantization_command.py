"""scripts.quantize as a command: what it leaves where, and one clear line for all that can be wrong."""

import ctypes
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from scripts import quantize
from scripts.quantization.model_file import recorded
from scripts.serving.installation import PROJECT
from tests import quantization_models
from tests.quantization_models import WIDTH

COMMAND = [sys.executable, "-m", "scripts.quantize"]
DROP_CAPABILITY, OVERRIDE = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
X = np.random.default_rng(0).standard_normal((24, WIDTH)).astype(np.float32)

Prepare = Callable[[Path], list[str]]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str | None:
    """Run the command in this process; return what it says in the end, None for success."""
    monkeypatch.setattr(sys, "argv", ["quantize", *map(str, arguments)])
    try:
        quantize.main()
    except SystemExit as end:
        assert isinstance(end.code, str)  # printed to stderr, with exit status 1
        return end.code
    return None


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.savez(tmp_path / "x.npz", x=X)
    return quantization_models.store(quantization_models.classifier(), tmp_path / "source")


def test_auto_puts_the_fastest_within_the_floor_into_the_repository(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, into, report = tree(tmp_path), tmp_path / "repository" / "scorer", tmp_path / "reports"
    options = ("--calibration", tmp_path / "x.npz", "--into", into, "--report", report, "--max-quality-loss", 0.005)
    assert run(monkeypatch, source, *options) is None

    assert tree(tmp_path).items() >= before.items()  # nothing of what was there is touched
    made = json.loads((report / "model" / "report.json").read_text())
    figures = made["precisions"]
    assert figures.keys() == {"fp32", "dynamic-int8", "static-int8", "int4", "row-int8"}
    for figure in figures.values():
        assert figure["latency"].keys() == {"1", "8", "32"}
        assert {"p50_ms", "p95_ms", "rows_per_s"} <= figure["latency"]["8"].keys()
        assert figure["peak_memory_mib"] > 0 and figure["size_bytes"] > 0
    kept = {name: figure for name, figure in figures.items() if figure["quality"]["loss"] <= 0.005}
    assert made["chosen"] == min(kept, key=lambda name: kept[name]["latency"]["8"]["p50_ms"])
    assert (report / "model" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in (report / "model").iterdir()} >= figures.keys() - {"fp32"}
    assert [file.name for file in report.iterdir()] == ["model"]  # no scratch is left

    installed = onnx.load(into / "1" / "model.onnx")
    assert recorded(installed).get("precision", "fp32") == made["chosen"]
    assert text_format.Parse((into / "config.pbtxt").read_text(), ModelConfig()).max_batch_size > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in figures)


def test_a_floor_that_cannot_be_reached_installs_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(tmp_path)
    into, report = tmp_path / "repository" / "scorer", tmp_path / "reports"
    said = run(monkeypatch, source, "--to", "int4", "--max-quality-loss", 0, "--into", into, "--report", report)
    assert said is not None and said.startswith("error: int4 comes closest and loses 0.0")
    assert "more than --max-quality-loss 0.0; nothing was installed" in said
    assert tree(tmp_path) == before
    assert not into.exists()


def model_of(content: bytes) -> Prepare:
    def prepare(folder: Path) -> list[str]:
        (folder / "other.onnx").write_bytes(content)
        return [str(folder / "other.onnx")]

    return prepare


def stored(model: onnx.ModelProto, *options: str) -> Prepare:
    def prepare(folder: Path) -> list[str]:
        return [str(quantization_models.store(model, folder / "other")), *options]

    return prepare


def calibrated(name: str = "x", values: np.ndarray = X) -> Prepare:
    def prepare(folder: Path) -> list[str]:
        np.savez(folder / "other.npz", **{name: values})
        return [str(folder / "source" / "model.onnx"), "--calibration", str(folder / "other.npz")]

    return prepare


def given(*options: str) -> Prepare:
    return lambda folder: [str(folder / "source" / "model.onnx"), *options]


def quantized(folder: Path) -> list[str]:
    path = folder / "source" / "model.onnx"
    made = quantization_models.study(path, folder / "work").add("row-int8", 0.5)
    return [str(made.folder / "model.onnx")]


def with_nan(sample: int) -> np.ndarray:
    x = X.copy()
    x[sample, 7] = np.nan
    return x


def long_text(folder: Path) -> list[str]:
    (folder / "long.jsonl").write_text(json.dumps({"text": "a" * 100}) + "\n")
    path = quantization_models.store(quantization_models.text_encoder(longest=50), folder / "other")
    return [str(path), "--calibration", str(folder / "long.jsonl")]


# Name -> (what prepares it and gives the arguments, precision, what the error says)
BAD: dict[str, tuple[Prepare, str, str]] = {
    "not an ONNX file": (model_of(b"neither graph nor weights"), "auto", "other.onnx is not an ONNX"),
    "missing": (lambda folder: [str(folder / "none.onnx")], "auto", "none.onnx does not exist"),
    "a folder of something else": (lambda folder: [str(folder)], "auto", "it is no language model's folder"),
    "opset too old": (stored(quantization_models.classifier(11)), "auto", "opset 11, the oldest .* --upgrade-opset"),
    "row-int8 and opset 17": (stored(quantization_models.classifier(17)), "row-int8", "needs opset 18 .*upgrade-opset"),
    "already quantized": (quantized, "auto", "is quantized already: it has .*; give the fp32 model"),
    "no calibration": (given(), "static-int8", "static-int8 needs calibration data: give --calibration FILE or DIR"),
    "missing calibration": (given("--calibration", "/none.npz"), "static-int8", "/none.npz"),
    "other input names": (calibrated("images"), "static-int8", "other.npz, .* has images; the model's inputs are x"),
    "other shape": (calibrated(values=X[:, :5]), "static-int8", r"input 'x' has shape \[8, 5\]; the model takes"),
    "other type": (calibrated(values=X.astype(np.str_)), "static-int8", "input 'x' is <U.*; the model takes float32"),
    "NaN": (
        calibrated(values=with_nan(10)),
        "static-int8",
        "other.npz, samples 8 to 15: input 'x' has NaN .* sample 2",
    ),
    "empty": (calibrated(values=X[:0]), "static-int8", "other.npz has no samples"),
    "objects": (calibrated(values=np.array([{}], dtype=object)), "static-int8", "must be .* array of numbers"),
    "text beyond the model": (long_text, "dynamic-int8", "long.jsonl"),
    "provider without kernels": (given("--provider", "tensorrt"), "row-int8", "tensorrt has no kernels for row-int8"),
    "provider missing": (given("--provider", "cuda"), "fp16", "this onnxruntime has no CUDAExecutionProvider"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_nothing_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    prepare, precision, complaint = BAD[name]
    arguments = prepare(tmp_path)
    before, into, report = tree(tmp_path), tmp_path / "repository" / "scorer", tmp_path / "reports"
    said = run(monkeypatch, *arguments, "--to", precision, "--into", into, "--report", report)
    assert said is not None and said.startswith("error: ") and "\n" not in said.strip()
    assert re.search(complaint, said), said
    assert tree(tmp_path) == before
    assert not into.exists() and not into.parent.exists()


def test_upgrade_opset_makes_an_old_model_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = quantization_models.store(quantization_models.classifier(opset=11), tmp_path / "old")
    into, report = tmp_path / "repository" / "scorer", tmp_path / "reports"
    options = ("--to", "row-int8", "--upgrade-opset", "--into", into, "--report", report)
    assert run(monkeypatch, path, *options) is None
    assert recorded(onnx.load(into / "1" / "model.onnx"))["precision"] == "row-int8"


@pytest.mark.parametrize("share", [0.1, 0.9, 1.02, 1.5])
@pytest.mark.parametrize("precision", ["dynamic-int8", "fp16"])
def test_a_full_disk_is_one_clear_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, precision: str
) -> None:
    """Files may grow to a share of the source's size: the first one that is written fails, or a later one."""
    before, into, report = tree(tmp_path), tmp_path / "repository" / "scorer", tmp_path / "reports"
    monkeypatch.setattr(quantize.Study, "measure_speed", lambda study: None)  # nothing fails there that is not written
    monkeypatch.setattr(quantize.report, "write", no_space)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * source.stat().st_size), hard))
    try:
        said = run(monkeypatch, source, "--to", precision, "--into", into, "--report", report)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said is not None and said.startswith("error: ") and "\n" not in said.strip()
    assert tree(tmp_path) == before
    assert not into.exists()


def no_space(*arguments: object) -> None:
    raise OSError(28, "No space left on device", "report.json")


def test_a_read_only_folder_is_named_before_anything_is_done(source: Path, tmp_path: Path) -> None:
    """The superuser may write anywhere: the process gives that right up."""
    repository = tmp_path / "repository"
    repository.mkdir()
    repository.chmod(0o555)

    def give_up() -> None:
        ctypes.CDLL(None).prctl(DROP_CAPABILITY, OVERRIDE, 0, 0, 0)

    into, report = repository / "scorer", tmp_path / "reports"
    command = [*COMMAND, str(source), "--to", "int4", "--into", str(into), "--report", str(report)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=PROJECT, preexec_fn=give_up, env=os.environ, check=False
    )
    assert (done.returncode, done.stderr) == (1, f"error: cannot write to {into}: Permission denied\n")
    assert list(repository.iterdir()) == []
    assert not report.exists()
