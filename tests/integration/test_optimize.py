"""The optimizer on real servers, with models small enough for a test."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from scripts import optimize
from scripts.export_model import export_model
from scripts.optimization import record, techniques
from scripts.quantization.graph import random_feeds
from scripts.serving.server import TritonServer, response_cache
from tests import language_models, quantization_models

UNREACHABLE_MS = 1e-3


@pytest.fixture(autouse=True)
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(techniques, "BATCHES", (8,))
    monkeypatch.setattr(techniques, "DELAYS_US", (500,))
    monkeypatch.setattr(techniques, "SEQUENCES", (4,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimize")


@pytest.fixture(scope="module")
def classifier(folder: Path) -> list[str]:
    """A model and a task with labels: what the fp32 model itself says."""
    path = quantization_models.store(quantization_models.classifier(), folder / "classifier")
    [x] = [random_feeds(quantization_models.classifier(), 90, 1)["x"]]
    labels = onnxruntime.InferenceSession(path).run(None, {"x": x})[0].argmax(-1)
    np.savez(folder / "task.npz", x=x, labels=labels)
    return [
        "--model",
        str(path),
        "--data",
        str(folder / "task.npz"),
        "--work",
        str(folder / "work"),
        "--requests",
        "40",
    ]


def run(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[bool, str]:
    """Run the command; return whether the targets were met, and what it printed."""
    met = optimize.run(optimize.parse(list(line)))
    return met, capsys.readouterr().out


def test_a_target_that_the_model_meets_as_it_is_needs_nothing(
    classifier: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    met, said = run(capsys, *classifier, "--target-latency-ms", "1000", "--target-quality", "1")
    assert met and "Targets met" in said and said.count("not needed") == 6


def test_an_unreachable_target_is_told_with_the_closest_and_a_stopped_run_goes_on(
    classifier: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*classifier, "--target-latency-ms", str(UNREACHABLE_MS), "--target-quality", "0.5"]
    measured = record.measure

    def stop_at_batching(subject: object, setups: list, plan: object) -> object:  # as Ctrl-C does
        if any(setup.batching.max_batch_size > 1 for setup in setups):
            raise KeyboardInterrupt
        return measured(subject, setups, plan)  # type: ignore[arg-type]

    monkeypatch.setattr(record, "measure", stop_at_batching)
    monkeypatch.setattr("sys.argv", ["optimize", *line])
    assert optimize.main() == optimize.INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().err
    again: list[int] = []

    def count(subject: object, setups: list, plan: object) -> object:
        again.append(max(setup.batching.max_batch_size for setup in setups))
        return measured(subject, setups, plan)  # type: ignore[arg-type]

    monkeypatch.setattr(record, "measure", count)
    met, said = run(capsys, *line)
    assert not met and "Targets not met. The closest: p95" in said
    assert again[0] == 8  # what had been measured before was not measured again
    for technique in ("caching", "quantization", "batching", "distillation"):
        assert technique in said
    page = (folder / "work" / "model" / "report.html").read_text()
    assert "<svg" in page and "no Hugging Face folder" in page


def test_the_repository_that_it_writes_serves_the_best_setup(folder: Path, tmp_path: Path) -> None:
    repository = folder / "work" / "model" / "repository"
    with TritonServer(repository, state_dir=tmp_path, options=response_cache(1 << 24)) as server:
        assert server.models == ["model"]


@pytest.fixture(scope="module")
def language_model(folder: Path) -> Iterator[list[str]]:
    """A model of random weights, its draft, and prompts without completions."""
    language_models.save_random(folder / "random", "llama", tied=True)
    export_model(folder / "random", folder / "draft", "row-int8")
    prompts = [{"prompt": f"{number} birds sing near the {number * 7} trees"} for number in range(60)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    yield [
        *("--model", str(folder / "random"), "--data", str(folder / "prompts.jsonl"), "--draft", str(folder / "draft")),
        *("--work", str(folder / "work"), "--requests", "16", "--distillation-minutes", "0"),
    ]


def test_a_language_model_goes_through_every_technique(
    language_model: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*language_model, "--target-latency-ms", str(UNREACHABLE_MS), "--target-quality", "0.2"]
    met, said = run(capsys, *line, "--output", str(tmp_path / "repository"))
    assert not met and "speculation 8" in said and "prefixes kept" in said
    page = (folder / "work" / "random" / "report.html").read_text()  # the table breaks reasons into lines
    assert "not applicable: there are no texts to learn from" in page
    assert {path.name for path in (tmp_path / "repository").iterdir()} >= {"language_model"}


def test_a_form_that_misses_the_quality_is_rolled_back(
    language_model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of random weights, quantized or not, near ties abound: answers differ, and only fp32's are the original's."""
    met, said = run(capsys, *language_model, "--target-latency-ms", str(UNREACHABLE_MS), "--target-quality", "1")
    assert not met
    kept = [row for row in said.splitlines() if "kept:" in row]
    assert all("1.0000" in row for row in kept)
