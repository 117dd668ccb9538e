"""The guided sweep takes the fastest settings that keep the promises, and asks nothing of perf_analyzer here."""

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from perf.batching_bench import median, within
from perf.batching_sweep import choose, lone_loss
from perf.embedder_load import Padding, equal_sentences, rows
from perf.embedder_settings import Settings, shipped, shipped_config
from perf.perf_analyzer import Load, PerfAnalyzerError
from perf.streaming import summary

SMALL, LARGE = Settings(8, 0, 1, 2), Settings(64, 0, 1, 2)
OFF = {1: Load(1, 200, 5.0, 6, 7, 1)}


def loads(lone_ms: float, per_s: float, p99_ms: float) -> dict[int, Load]:
    return {1: Load(1, 1e3 / lone_ms, lone_ms, lone_ms, lone_ms, 1), 16: Load(16, per_s, 40, 50, p99_ms, 8)}


def test_the_fastest_settings_within_the_budget_win() -> None:
    assert choose({SMALL: loads(5, 300, 90), LARGE: loads(5, 400, 90)}, OFF, 100) == LARGE
    assert choose({SMALL: loads(5, 300, 90), LARGE: loads(5, 400, 110)}, OFF, 100) == SMALL


def test_settings_that_cost_a_lone_client_more_than_5_percent_are_refused() -> None:
    assert choose({SMALL: loads(5, 300, 90), LARGE: loads(5.3, 400, 90)}, OFF, 100) == SMALL
    assert lone_loss(loads(5.3, 400, 90), OFF) == pytest.approx(0.06)


def test_a_difference_within_the_noise_changes_nothing() -> None:
    assert choose({SMALL: loads(5, 300, 90), LARGE: loads(5, 303, 90)}, OFF, 100) == SMALL


def test_a_budget_that_nothing_keeps_leaves_no_point() -> None:
    assert within(loads(5, 300, 90), 1) is None


def test_turns_are_summed_up_by_the_median_of_each_figure() -> None:
    turns = [Load(4, 100, 1, 2, 3, 1), Load(4, 300, 3, 2, 9, 3), Load(4, 200, 2, 2, 4, 2)]
    assert median(turns) == Load(4, 200, 2, 2, 4, 2)


def test_settings_are_written_into_a_config_that_triton_reads() -> None:
    config = shipped_config()
    Settings(8, None, 2, 1).apply(config)
    config = text_format.Parse(text_format.MessageToString(config), ModelConfig())
    assert not config.HasField("dynamic_batching")
    assert (config.max_batch_size, config.instance_group[0].count) == (8, 2)
    assert all(warmup.batch_size <= 8 for warmup in config.model_warmup)
    Settings(8, 0, 2, 1).apply(config)
    assert config.HasField("dynamic_batching")


def test_the_shipped_settings_are_read_back_as_written() -> None:
    config = shipped_config()
    before = config.SerializeToString(deterministic=True)
    shipped().apply(config)
    assert config.SerializeToString(deterministic=True) == before


def test_a_sentence_is_padded_to_the_next_length() -> None:
    assert [Padding((16, 32)).of(tokens) for tokens in (1, 16, 17, 32)] == [16, 16, 32, 32]
    assert Padding(()).of(17) == 17
    inputs = rows([*equal_sentences(1, 3), *equal_sentences(1, 5)], 8)
    assert inputs["attention_mask"].sum(1).tolist() == [3, 5]
    assert not inputs["input_ids"][inputs["attention_mask"] == 0].any()


def test_first_response_and_gaps_come_from_the_exported_time_stamps() -> None:
    ms = 1_000_000
    requests = [
        {"timestamp": start * ms, "response_timestamps": [(start + 10) * ms, (start + 14) * ms, (start + 18) * ms]}
        for start in (0, 100)
    ]
    figures = summary([*requests, {"timestamp": 0, "response_timestamps": []}])
    assert (figures["ttft_ms_p50"], figures["itl_ms_p50"]) == (10, 4)
    assert figures["answers_per_s"] == pytest.approx(2 / 0.118)


def test_an_export_without_answers_is_an_error() -> None:
    with pytest.raises(PerfAnalyzerError, match="measure for longer"):
        summary([])
