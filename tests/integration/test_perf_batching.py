"""The measuring commands in their shortest form, with the real perf_analyzer, locust and server."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from perf import batching, batching_report, gpu_triton, load, perf_analyzer, streaming
from scripts.serving.installation import MODEL_REPOSITORY, PROJECT
from scripts.serving.server import TritonServer

TINY = replace(
    batching.PLAN,
    tokens=8,
    clients=(1, 8),
    sweep_clients=(1, 8),
    batches=(16,),
    delays_us=(0, 20_000),
    instances=(1,),
    turns=1,
    lone_turns=2,
    window_ms=50,
    direct_s=0.05,
    mixed_sentences=32,
    longest=32,
)


@pytest.fixture(scope="module")
def result() -> batching_report.Result:
    return json.loads(json.dumps(batching.run(TINY)))


def test_a_delay_that_a_lone_client_feels_is_not_chosen(result: batching_report.Result) -> None:
    assert result["chosen"]["max_queue_delay_us"] == 0
    delayed = [entry for entry in result["sweep"]["measured"] if entry["max_queue_delay_us"]]
    assert delayed[0]["points"][0]["p50_ms"] > 20


def test_clients_share_batches_unless_batching_is_off(result: batching_report.Result) -> None:
    batches = {name: points[-1]["batch"] for name, points in result["curves"].items()}
    assert batches["off"] == 1
    assert 1 < batches["defaults"] <= 4
    assert batches["chosen"] > 2


def test_ways_to_pad_are_measured_with_how_much_they_pad(result: batching_report.Result) -> None:
    paddings = result["mixed"]["paddings"]
    assert paddings.keys() == batching.PADDINGS.keys()
    assert all(load["sentences_per_s"] > 0 for load in paddings.values())
    shares = [paddings[name]["padding"] for name in ("none", "to 16, 32, 64 or 128", "to 64 or 128", "to 128")]
    assert shares == sorted(set(shares)) and shares[0] == 0
    assert paddings["to 128, computed"]["padding"] == paddings["to 128"]["padding"]


def test_the_report_says_everything(result: batching_report.Result, tmp_path: Path) -> None:
    batching_report.plot(tmp_path / "batching.png", result)
    assert (tmp_path / "batching.png").stat().st_size > 10_000
    assert [len(table.rows) for table in batching_report.tables(result)] == [2, len(batching.PADDINGS)]
    assert any("config.pbtxt" in line for line in batching_report.notes(result))
    assert set(result["targets"]) == {"share_of_limit", "p99_within_budget", "lone_loss"}


@pytest.mark.parametrize("model", streaming.MODELS)
def test_streams_are_measured_to_their_first_response(server: TritonServer, model: str) -> None:
    streaming.write_inputs(PROJECT / streaming.INPUTS)
    figures = streaming.measure(server, model, clients=2, window_ms=500)
    assert 0 < figures["ttft_ms_p50"] <= figures["ttft_ms_p99"]
    assert figures["itl_ms_p50"] > 0


def test_what_perf_analyzer_complains_about_is_passed_on(server: TritonServer) -> None:
    with pytest.raises(perf_analyzer.PerfAnalyzerError, match="no_such_model"):
        perf_analyzer.run(server, ["-m", "no_such_model"])


def test_locust_reports_streams_and_sessions_beside_requests(server: TritonServer, tmp_path: Path) -> None:
    expected = {
        ("TTFT", "generate_stream"),
        ("TTFT", "generate stream"),
        ("ITL", "generate stream"),
        ("TTFT", "session turn"),
        ("POST", "generate"),
        ("POST", "embedder"),
        ("gRPC", "embedder"),
    }
    seen: set[tuple[str, ...]] = set()
    options = ["--users", "6", "--spawn-rate", "6", "--run-time", "6s", "--csv", str(tmp_path / "rows")]
    for _ in range(5):  # users choose their tasks at random: a busy machine may not come to all of them at once
        assert load.run(server, options, tmp_path / "load.html") == 0
        assert (tmp_path / "load.html").stat().st_size > 10_000
        seen |= {tuple(line.split(",")[:2]) for line in (tmp_path / "rows_stats.csv").read_text().splitlines()[1:]}
        if expected <= seen:
            return
    raise AssertionError(f"locust reported only {sorted(seen)}")


def test_a_missing_perf_analyzer_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, server: TritonServer) -> None:
    monkeypatch.setattr(perf_analyzer, "BINARY", Path("/nowhere/perf_analyzer"))
    with pytest.raises(perf_analyzer.PerfAnalyzerError, match="make tools"):
        perf_analyzer.run(server, ["-m", "embedder"])


def test_the_locustfile_lists_its_users() -> None:
    command = [sys.executable, "-m", "locust", "-f", str(load.LOCUSTFILE), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert {"HttpUser", "GrpcUser", "SessionUser"} <= set((done.stdout + done.stderr).split())


def test_what_a_gpu_will_be_asked_through_triton_is_answered_alike_with_and_without_speculation() -> None:
    found = gpu_triton.through_triton(MODEL_REPOSITORY / "language_model", "KIND_CPU", (2,))["2"]
    assert found["answers"] == 16 and found["differences"] == 0
    assert found["ratio"] == pytest.approx(found["speculative_tps"] / found["plain_tps"], abs=1e-2)
