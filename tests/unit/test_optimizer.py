"""What the optimizer keeps, and what it refuses."""

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from scripts import optimize
from scripts.distillation.errors import Interrupted
from scripts.optimization import optimizer, report, techniques
from scripts.optimization.batching import Settings
from scripts.optimization.errors import OptimizationError
from scripts.optimization.forms import Forms
from scripts.optimization.language_model import Example, LanguageModelSubject, read_examples
from scripts.optimization.measurement import Measurement
from scripts.optimization.optimizer import Search, Targets
from scripts.optimization.plan import Plan
from scripts.optimization.setup import Setup
from scripts.optimization.students import Students
from scripts.optimization.subject import Request, Subject
from scripts.optimization.techniques import Propose, Technique
from scripts.quantization.subject import Subject as Source
from tests import language_models, quantization_models

FIRST = Setup("fp32", Settings(1, None, 1, 2))
ORIGINAL = Measurement(10.0, 9.0, 20.0, 25.0, 100.0, 5.0, 300.0, 1.0)


class Numbers(Subject):
    """A subject whose requests are numbers; nothing is served of it."""

    kind = "encoder"

    def __init__(self, count: int = 300, inapplicable: str = "") -> None:
        self._count = count
        self._inapplicable = inapplicable

    def first(self) -> Setup:
        return FIRST

    def requests(self) -> Sequence[Request]:
        return range(self._count)

    def write(self, setup: Setup, repository: Path) -> None:
        (repository / "numbers").mkdir(parents=True)
        (repository / "numbers" / "config.pbtxt").write_text(setup.describe())

    def ask(self, setup: Setup, scope: str) -> Any:
        return lambda url: nullcontext(int)

    def quality(self, setup: Setup, answers: Sequence[tuple[Request, Any]]) -> float:
        return 1.0

    def why_not(self, technique: str) -> str:
        return "no use" if technique == self._inapplicable else ""


def propose(**values: Any) -> Technique:
    """A technique of one stage, which sets these values."""

    def stages(subject: Subject, most_loss: float) -> Iterator[Propose]:
        yield lambda best: [replace(best, **values)]

    return Technique(", ".join(values), stages)


def search(
    measured: dict[Setup, Measurement],
    targets: Targets,
    *tried: Technique,
    subject: Subject | None = None,
) -> Search:
    """Search with figures that are known, as a server would give them."""
    return optimizer.optimize(
        subject or Numbers(), targets, lambda setups: {s: measured[s] for s in setups}, print, tried
    )


def verdicts(found: Search) -> list[str]:
    return [trial.verdict for trial in found.trials]


CACHED, QUANTIZED = replace(FIRST, cached=True), replace(FIRST, weights="int4")
BOTH = replace(QUANTIZED, cached=True)
LATENCY = Targets(5.0, 0.95, "latency")


def test_what_helps_is_kept_and_built_upon() -> None:
    measured = {
        FIRST: ORIGINAL,
        CACHED: replace(ORIGINAL, mean_ms=7.0, p95_ms=15.0),
        BOTH: replace(ORIGINAL, mean_ms=3.0, p95_ms=4.0, quality=0.96),
    }
    found = search(measured, LATENCY, propose(cached=True), propose(weights="int4"), propose(speculation=8))
    assert verdicts(found) == ["original", "kept", "kept", "not needed"]
    assert found.best == BOTH and LATENCY.are_met(found.measured)


def test_what_misses_the_quality_is_rolled_back_with_the_reason() -> None:
    measured = {FIRST: ORIGINAL, QUANTIZED: replace(ORIGINAL, mean_ms=1.0, p95_ms=2.0, quality=0.9)}
    found = search(measured, LATENCY, propose(weights="int4"))
    assert verdicts(found) == ["original", "rejected"]
    assert found.trials[1].reason == "quality 0.9000 is below 0.95"
    assert found.best == FIRST and not LATENCY.are_met(found.measured)


def test_a_gain_within_the_noise_is_none() -> None:
    measured = {FIRST: ORIGINAL, CACHED: replace(ORIGINAL, mean_ms=9.8)}
    assert verdicts(search(measured, LATENCY, propose(cached=True))) == ["original", "rejected"]


@pytest.mark.parametrize(("objective", "kept"), [("latency", CACHED), ("throughput", FIRST), ("cost", QUANTIZED)])
def test_the_objective_decides(objective: optimizer.Objective, kept: Setup) -> None:
    measured = {
        FIRST: ORIGINAL,
        CACHED: replace(ORIGINAL, mean_ms=5.0, cpu_s_per_1000=6.0),
        BOTH: replace(ORIGINAL, mean_ms=5.0, cpu_s_per_1000=9.0),
        QUANTIZED: replace(ORIGINAL, cpu_s_per_1000=2.0),
    }
    targets = Targets(1.0, 0.5, objective)
    assert search(measured, targets, propose(cached=True), propose(weights="int4")).best == kept


def test_what_cannot_be_applied_or_fails_is_reported_and_the_search_goes_on() -> None:
    def broken(subject: Subject, most_loss: float) -> Iterator[Propose]:
        raise OptimizationError("no texts")
        yield

    measured = {FIRST: ORIGINAL, CACHED: replace(ORIGINAL, mean_ms=5.0)}
    tried = (propose(weights="int4"), Technique("broken", broken), propose(cached=True))
    found = search(measured, LATENCY, *tried, subject=Numbers(inapplicable="weights"))
    assert verdicts(found) == ["original", "not applicable", "rejected", "kept"]
    assert [trial.reason for trial in found.trials[1:3]] == ["no use", "no texts"]


def test_the_guided_search_measures_less_than_a_fifth_of_the_grid() -> None:
    batches, delays, cores = (8, 16, 32, 64), (0, 500, 2000), 2
    best, measured = FIRST, {FIRST}
    for stage in techniques.encoder_batching(batches, delays[1:], cores):
        proposed = stage(best)
        measured |= set(proposed)
        best = proposed[-1] if proposed else best
    grid = (len(batches) * len(delays) + 1) * 4  # or batching off; one or two instances, of one or two threads
    assert len(measured) < 0.2 * grid


def test_every_pass_asks_other_things_and_repeats_as_many_as_it_says() -> None:
    plan = Plan(requests=100, repeats=0.3, passes=2)
    passes = [Numbers(600).workload(number, plan) for number in range(3)]
    assert [len(requests) for requests in passes] == [100] * 3
    assert all(20 <= 100 - len(set(requests)) <= 40 for requests in passes)
    assert not set(passes[0]) & set(passes[1]) and not set(passes[1]) & set(passes[2])
    assert passes[1] == Numbers(600).workload(1, plan)


def test_too_little_data_is_refused() -> None:
    with pytest.raises(OptimizationError, match="23 different requests; 24 or more"):
        Numbers(23).workload(0, Plan(passes=2))


@pytest.mark.parametrize(
    ("latency", "quality", "named"),
    [(0.0, 0.9, "--target-latency-ms is 0"), (float("nan"), 0.9, "--target-latency-ms"), (5, 1.5, "--target-quality"),
     (5, 0, "--target-quality is 0")],
)  # fmt: skip
def test_contradicting_targets_are_refused(latency: float, quality: float, named: str) -> None:
    with pytest.raises(OptimizationError, match=named):
        Targets(latency, quality, "latency")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "has no prompt"),
        ("{", "line 1 is not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}', "line 2 must be"),
        ('{"prompt": "a", "completion": 3}', "line 1 must be"),
        ('{"prompt": "a"}\n{"prompt": "b", "completion": "c"}', "all or none"),
    ],
)
def test_a_task_with_wrong_fields_is_refused_by_file_and_line(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(content)
    with pytest.raises(OptimizationError, match=named) as raised:
        read_examples(path)
    assert str(path) in str(raised.value)


def command(model: Path | str, *options: str) -> list[str]:
    return ["--model", str(model), "--target-latency-ms", "5", "--target-quality", "0.9", *options]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--data", "/nowhere.jsonl"], "--data /nowhere.jsonl does not exist"),
        (["--student", "/nowhere"], "--student /nowhere does not exist"),
        (["--distillation-data", "/nowhere"], "--distillation-data /nowhere does not exist"),
    ],
)
def test_files_that_are_missing_are_named(tmp_path: Path, options: list[str], named: str) -> None:
    model = quantization_models.store(quantization_models.classifier(), tmp_path / "model")
    with pytest.raises(OptimizationError, match=named):
        optimize.run(optimize.parse(command(model, "--work", str(tmp_path / "work"), *options)))


def test_a_model_that_is_nowhere_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(OptimizationError, match="no_such_model is neither a path nor one of") as raised:
        optimize.run(optimize.parse(command("no_such_model")))
    assert "embedder" in str(raised.value) and "language_model" in str(raised.value)


def test_a_broken_model_is_an_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    monkeypatch.setattr("sys.argv", ["optimize", *command(tmp_path / "model.onnx", "--work", str(tmp_path / "work"))])
    assert optimize.main() == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and "model.onnx" in line


def test_a_repository_is_replaced_model_by_model(tmp_path: Path) -> None:
    output = tmp_path / "repository"
    (output / "other").mkdir(parents=True)
    (output / "numbers").mkdir()
    (output / "numbers" / "stale").touch()
    optimize.install(Numbers(), Search(ORIGINAL, CACHED, ORIGINAL), output)
    assert sorted(path.name for path in output.iterdir()) == ["numbers", "other"]
    assert [path.name for path in (output / "numbers").iterdir()] == ["config.pbtxt"]


def test_a_model_that_cannot_be_written_leaves_the_repository_as_it_was(tmp_path: Path) -> None:
    class Failing(Numbers):
        def write(self, setup: Setup, repository: Path) -> None:
            super().write(setup, repository)
            raise OSError(28, "No space left on device")

    output = tmp_path / "repository"
    (output / "numbers").mkdir(parents=True)
    (output / "numbers" / "old").touch()
    with pytest.raises(OptimizationError, match="No space left"):
        optimize.install(Failing(), Search(ORIGINAL, CACHED, ORIGINAL), output)
    assert [path.name for path in output.iterdir()] == ["numbers"]
    assert [path.name for path in (output / "numbers").iterdir()] == ["old"]


def test_forms_of_another_model_are_thrown_away(tmp_path: Path) -> None:
    forms = Forms(tmp_path / "forms", "one")
    (forms.folder / "made").mkdir()
    forms.keep("int4", forms.folder / "made")
    assert Forms(tmp_path / "forms", "one")["int4"] == forms.folder / "made"
    assert "int4" not in Forms(tmp_path / "forms", "other")
    assert not (tmp_path / "forms" / "made").exists()


def test_what_an_interrupted_run_left_of_a_student_is_made_anew(tmp_path: Path) -> None:
    class Teaching(Numbers):
        def _make_student(self, student: Path, precision: str, folder: Path) -> None:
            (folder / "source").mkdir()
            (folder / "model.onnx").touch()

    subject = Teaching()
    subject.forms, subject._students = Forms(tmp_path / "forms", "one"), Students(tmp_path, None, None, 0)
    left = subject.forms.folder / "student int4"
    (left / "source").mkdir(parents=True)
    assert subject.distil("int4") == "student int4"
    assert (subject.forms["student int4"] / "model.onnx").exists()


def test_texts_that_were_being_written_when_a_run_was_interrupted_are_written_anew(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Students(None, tmp_path, write, 1).folder(tmp_path / "work")
    assert not any((tmp_path / "work").iterdir())


def test_stopping_while_a_student_learns_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(arguments: object) -> None:
        raise Interrupted("interrupted after 3 steps")

    monkeypatch.setattr("scripts.distill.distill", stopped)
    with pytest.raises(KeyboardInterrupt):
        Students(None, tmp_path, tmp_path, 1).folder(tmp_path / "work")


def test_answers_are_compared_with_the_original_s_whatever_was_asked_in_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    source = Source("model", tmp_path, onnx.ModelProto(), True, None, "digest")
    students = Students(None, None, None, 0)
    for prompt in "ab":  # two runs, with other requests
        forms = Forms(tmp_path / "forms", "one")
        subject = LanguageModelSubject(source, tmp_path / "data.jsonl", students, None, forms, print)
        example = Example(prompt)
        assert subject.quality(subject.first(), [(example, "one two")]) == 1
        assert subject.quality(replace(subject.first(), cached=True), [(example, "one two")]) == 1
        assert subject.quality(replace(subject.first(), cached=True), [(example, "one six")]) < 1


def test_a_folder_that_is_called_as_the_shipped_model_gets_neither_its_data_nor_its_draft(tmp_path: Path) -> None:
    language_models.save_random(tmp_path / "language_model", "llama", tied=True)
    with pytest.raises(OptimizationError, match="--data is missing"):
        optimize.run(optimize.parse(command(tmp_path / "language_model", "--work", str(tmp_path / "work"))))


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    measured = {FIRST: ORIGINAL, CACHED: replace(ORIGINAL, mean_ms=7.0, p95_ms=15.0)}
    found = search(measured, LATENCY, propose(cached=True))
    report.page("a<b", found, LATENCY, {"cores": 2}, ["make serve"], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "a&lt;b" in text and "<svg" in text and "make serve" in text
    assert "Targets not met. The closest: p95 15.0 ms (target 5)" in text
    assert "<script" not in text and "<img" not in text and "<link" not in text
    assert json.dumps(report.rows(found.trials)).count("kept") == 1
