"""Calibration: every method, over batches of different lengths, one of them in memory at a time."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from scripts.quantization.graph import Feeds, random_feeds
from scripts.quantization.integers import METHODS, Method, activation_ranges, static_int8
from scripts.quantization.precision import Options, Source
from scripts.quantization.preparation import prepare
from scripts.quantization.samples import Samples
from tests import quantization_models


@pytest.mark.parametrize("method", METHODS)
def test_every_method_calibrates_on_batches_of_different_lengths(method: Method) -> None:
    model = quantization_models.text_encoder()
    batches = [random_feeds(model, rows, length, seed=length) for rows, length in ((4, 5), (2, 17), (3, 9))]
    made = Source(model, batches, Options(calibration_method=method)).make("static-int8")
    feeds = random_feeds(model, 8, 12, seed=99)
    expected, given = (
        onnxruntime.InferenceSession(graph.SerializeToString()).run(None, feeds)[0] for graph in (model, made)
    )
    cosines = (expected * given).sum(-1) / np.linalg.norm(expected, axis=-1) / np.linalg.norm(given, axis=-1)
    assert cosines.min() > 0.97
    assert any(node.op_type == "QuantizeLinear" for node in made.graph.node)


def test_the_methods_see_the_same_data_differently() -> None:
    """One outlier in tens of thousands of values: MinMax takes it in, Percentile does not."""
    model = prepare(quantization_models.classifier())
    feeds = random_feeds(model, 400, 1)
    feeds["x"][0, 0] = 1000
    ranges = {method: activation_ranges(model, [feeds], method)["x"].range_value for method in METHODS}
    assert ranges["minmax"][1] == 1000
    assert ranges["percentile"][1] < 1000


def test_calibration_reads_a_batch_when_the_one_before_is_done(tmp_path: Path) -> None:
    model = prepare(quantization_models.classifier())
    alive: list[int] = []

    class Watched(dict):
        def __del__(self) -> None:
            alive.pop()

    def batches() -> Iterator[Feeds]:
        for seed in range(6):
            alive.append(seed)
            assert len(alive) <= 2, "batches pile up"
            yield Watched(random_feeds(model, 8, 1, seed))

    ranges = activation_ranges(model, batches(), "minmax")
    static_int8(model, ranges)


def test_texts_of_a_batch_are_padded_and_masked(tmp_path: Path) -> None:
    path = quantization_models.store(quantization_models.text_encoder(), tmp_path)
    lines = [json.dumps({"text": text}) for text in ("a b", "a b c d e f g")]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    study = quantization_models.study(path, tmp_path / "work")
    [batch] = Samples(tmp_path / "texts.jsonl", study.subject.inputs, study.subject.tokenizer)
    mask = batch.feeds["attention_mask"]
    assert mask[0].sum() < mask[1].sum() == mask.shape[1]
    assert not batch.feeds["input_ids"][0][mask[0] == 0].any()
