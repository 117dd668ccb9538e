"""The table of promises: what counts as kept, and how savings are counted."""

import time
from pathlib import Path

import pytest

from perf import distillation, promise, techniques
from perf.promise import PROMISED, Change, Measured
from perf.spending import Spent, saving, take_turns
from scripts.serving.installation import PROJECT


def test_a_saving_is_counted_per_answer() -> None:
    old, new = Spent(answers=10, seconds=20.0, cpu_s=40.0), Spent(answers=20, seconds=20.0, cpu_s=10.0)
    assert saving(new, old) == pytest.approx((-0.5, -0.875))


def test_contenders_take_turns_and_the_first_pass_does_not_count() -> None:
    called, cpu = list[str](), iter(range(100))

    def act(name: str) -> int:
        called.append(name)
        return 5

    contenders = {"a": lambda: act("a"), "b": lambda: act("b")}
    spent = take_turns(contenders, 2, lambda: float(next(cpu)))
    assert called == ["a", "b"] * 3
    assert [(one.answers, one.cpu_s) for one in spent.values()] == [(10, 2.0)] * 2


def test_asking_what_was_used_is_not_timed() -> None:
    def cpu_s() -> float:
        time.sleep(0.2)
        return 0.0

    assert take_turns({"a": lambda: 1}, 1, cpu_s)["a"].seconds < 0.1


@pytest.mark.parametrize("name", PROMISED)
def test_a_promise_that_is_met_to_the_point_is_kept(name: str) -> None:
    assert promise.shortfalls(name, PROMISED[name]) == []


def test_each_shortfall_is_named_in_points() -> None:
    assert promise.shortfalls("quantization", Change(-0.35, -0.5, -0.04)) == [
        "latency by 5.0 points",
        "quality by 1.0 points",
    ]
    assert promise.shortfalls("batching", Change(0.5, -0.6, 0.0)) == ["cost by 10.0 points"]
    assert promise.shortfalls("speculative_decoding", Change(-0.9, -0.9, -0.01)) == ["quality by 1.0 points"]


def test_table_and_plot_show_every_row(tmp_path: Path) -> None:
    held = Measured("a against b", "perf.x", Change(-0.45, -0.5, -0.001), 0.8)
    beside = Measured("c against d", "perf.y", Change(-0.1, 0.2, 0.0))
    rows = {name: promise.row(name, held, [beside]) for name in PROMISED}
    lines = promise.markdown(rows).splitlines()
    assert len(lines) == 2 + 2 * len(PROMISED)
    assert lines[2] == (
        "| **Quantization** | −45.0% | −50.0% | −0.1% | −40.0% / −50.0% / −3.0% | yes "
        "| a against b; throughput +80.0% | perf.x |"
    )
    assert lines[3] == "|  | −10.0% | +20.0% | 0% |  |  | c against d | perf.y |"
    assert "| no: cost by 20.0 points; quality by 0.1 points |" in lines[4]
    promise.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_readme_shows_the_measured_table() -> None:
    table = (techniques.RESULTS / "techniques.md").read_text(encoding="utf-8")
    assert table in (PROJECT / "README.md").read_text(encoding="utf-8")


def test_without_a_student_the_embedder_is_compared_with_its_int8_form_alone(tmp_path: Path) -> None:
    figures = distillation.measure(None, tmp_path)
    assert set(figures) == {"teacher", "teacher row-int8"}
    assert figures["teacher"]["quality_change"] == 0 and figures["teacher row-int8"]["size_mb"] < 25
