"""The benchmark of the key/value cache, at a size that shows only that it measures what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perf.kv_cache import Plan, measure, report
from perf.kv_models import Size

SMALL = Plan(
    size=Size(hidden=64, layers=2, heads=4, kv_heads=2, feed_forward=128, vocabulary=512, context=512),
    slots=2,
    budget=4 << 20,
    prefixes=(64, 128),
    blocks=(8, 16),
    block_prefix=100,
    question=16,
    answer=8,
    system=64,
    turns=4,
    clients=3,
    unshared=64,
    repeats=1,
    overhead_turns=2,
    conversations=2,
)


def test_every_figure_is_measured_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(lambda: measure(SMALL), tmp_path)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(last) == {
        *("ttft_ratio", "chat_computed_fraction", "no_reuse_overhead", "int8_capacity_ratio"),
        *("int8_perplexity_ratio", "machine"),
    }
    result = json.loads((tmp_path / "kv_cache.json").read_text())
    assert result["ttft_ratio"].keys() == result["genai_ttft_ratio"].keys() == {"64", "128"}
    assert {name: result[name] for name in last} == last
    assert result["by_block_size"].keys() == {"8", "16"}
    assert 0 < result["chat_computed_fraction"] < 0.6
    assert result["int8_capacity_ratio"] > 2
    assert 0.9 < result["int8_perplexity_ratio"] < 1.1
    assert result["no_reuse_overhead"] > -1
    assert (tmp_path / "kv_cache.png").stat().st_size > 0


def test_the_benchmark_starts_from_the_command_line() -> None:
    project = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", "import perf.kv_cache"], cwd=project, check=True)
