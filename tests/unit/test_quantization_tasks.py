"""Quality: each figure against its own definition, spelled out."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from scripts.quantization import tasks, texts
from scripts.quantization.errors import QuantizationError
from scripts.quantization.graph import Feeds, graph_inputs, random_feeds
from scripts.quantization.runner import Decoder, Encoder
from scripts.quantization.samples import Batch
from scripts.quantization.tasks import SENTENCE_PAIRS, Classification, Embedding, Outputs, Text
from tests import language_models, quantization_models
from tests.quantization_models import WIDTH
from tests.unit.conftest import Export

TOKENIZER = language_models.tokenizer().backend_tokenizer
TEXTS = ["To be, or not to be, that is the question.", "2 + 2 = 4", "Mind the gap between the train and the platform"]


def encoder(model: onnx.ModelProto, folder: Path) -> Encoder:
    path = quantization_models.store(model, folder)
    return Encoder(path.parent, "cpu", lambda batch: {})


def noisy(model: onnx.ModelProto, noise: float) -> onnx.ModelProto:
    """A copy whose matrices are off by a share of their spread."""
    rng = np.random.default_rng(0)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim == 2:
            values = values + noise * values.std() * rng.standard_normal(values.shape)
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    return copy


def test_outputs_are_compared_sample_by_sample(tmp_path: Path) -> None:
    model = quantization_models.classifier()
    reference, other = encoder(model, tmp_path / "a"), encoder(noisy(model, 0.2), tmp_path / "b")
    batches = [random_feeds(model, rows, 0, seed=rows) for rows in (5, 3)]
    figures = Outputs(reference, batches).evaluate(other)
    cosines = [
        float(left @ right / math.sqrt((left @ left) * (right @ right)))
        for feeds in batches
        for left, right in zip(reference.run(feeds)[0], other.run(feeds)[0], strict=True)
    ]
    assert figures["cosine_mean"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert figures["cosine_min"] == pytest.approx(min(cosines), abs=1e-6)
    assert figures["loss"] == pytest.approx(1 - np.mean(cosines), abs=1e-6) and figures["loss"] > 0.001
    assert Outputs(reference, batches).evaluate(reference)["loss"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_never_pass_for_good_ones(tmp_path: Path, value: float) -> None:
    model = quantization_models.classifier()
    spoilt = onnx.ModelProto()
    spoilt.CopyFrom(model)
    bias = next(tensor for tensor in spoilt.graph.initializer if tensor.name == "b2")
    bias.CopyFrom(numpy_helper.from_array(np.full(quantization_models.CLASSES, value, np.float32), "b2"))
    task = Outputs(encoder(model, tmp_path / "a"), [random_feeds(model, 4, 0)])
    with np.errstate(all="ignore"):
        figures = task.evaluate(encoder(spoilt, tmp_path / "b"))
    assert not all(map(math.isfinite, figures.values()))


def test_a_classifier_is_judged_by_its_labels_and_by_agreement(tmp_path: Path) -> None:
    model = quantization_models.classifier()
    reference, other = encoder(model, tmp_path / "a"), encoder(noisy(model, 0.5), tmp_path / "b")
    x = np.random.default_rng(0).standard_normal((60, WIDTH)).astype(np.float32)
    expected, given = reference.run({"x": x})[0].argmax(-1), other.run({"x": x})[0].argmax(-1)
    labels = expected.copy()
    labels[::4] = (labels[::4] + 1) % 10
    batches = [Batch({"x": x[start : start + 7]}, labels[start : start + 7], "here") for start in range(0, 60, 7)]
    figures = Classification(reference, batches).evaluate(other)
    assert figures["agreement"] == pytest.approx((given == expected).mean())
    assert figures["accuracy"] == pytest.approx((given == labels).mean())
    assert figures["loss"] == pytest.approx(45 / 60 - (given == labels).mean())
    assert 0.2 < figures["agreement"] < 1


def test_labels_in_the_evaluation_data_make_a_model_a_classifier(tmp_path: Path) -> None:
    path = quantization_models.store(quantization_models.classifier(), tmp_path)
    x = np.random.default_rng(0).standard_normal((40, WIDTH)).astype(np.float32)
    labels = onnxruntime.InferenceSession(path).run(None, {"x": x})[0].argmax(-1)
    np.savez(tmp_path / "labelled.npz", x=x, labels=labels)
    study = quantization_models.study(path, tmp_path / "work", evaluation=tmp_path / "labelled.npz")
    assert study.results["fp32"].quality == {"accuracy": 1.0, "agreement": 1.0, "loss": 0.0}
    assert study.add("row-int8", 0.2).quality["agreement"] > 0.9


def test_labels_fit_a_graph_of_a_fixed_batch(tmp_path: Path) -> None:
    """Seven samples in batches of 4: the last one is filled up, its labels are not."""
    path = quantization_models.store(quantization_models.conv_net(batch=4), tmp_path)
    images = np.random.default_rng(0).standard_normal((7, 3, 16, 16)).astype(np.float32)
    session = onnxruntime.InferenceSession(path)
    filled = np.concatenate([images, images[-1:]])
    scores = np.concatenate([session.run(None, {"image": filled[start : start + 4]})[0] for start in (0, 4)])
    np.savez(tmp_path / "labelled.npz", image=images, labels=scores.argmax(-1)[:7])
    study = quantization_models.study(path, tmp_path / "work", evaluation=tmp_path / "labelled.npz")
    assert study.results["fp32"].quality["accuracy"] == 1.0


def rank(values: list[float], value: float) -> float:
    return sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2


def spearman(left: list[float], right: list[float]) -> float:
    """Pearson's correlation of the ranks, pair by pair."""
    a, b = ([rank(values, value) for value in values] for values in (left, right))
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return covariance / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def test_an_embedder_is_judged_by_spearman_and_recall(tmp_path: Path) -> None:
    model = quantization_models.text_encoder()
    reference, other = encoder(model, tmp_path / "a"), encoder(noisy(model, 0.5), tmp_path / "b")
    pairs = [json.loads(line) for line in SENTENCE_PAIRS.read_text(encoding="utf-8").splitlines()]

    def embed(model: Encoder, text: str) -> np.ndarray:
        ids = np.array([TOKENIZER.encode(text).ids])
        vector = model.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0].astype(np.float64)
        return vector / np.linalg.norm(vector)

    def figures(model: Encoder) -> tuple[float, float]:
        first, second = ([embed(model, pair[side]) for pair in pairs] for side in ("first", "second"))
        similarities = [float(a @ b) for a, b in zip(first, second, strict=True)]
        paraphrases = [index for index, pair in enumerate(pairs) if pair["score"] >= 4.5]
        found = [max(range(len(pairs)), key=lambda other: first[index] @ second[other]) for index in paraphrases]
        recall = sum(a == b for a, b in zip(found, paraphrases, strict=True)) / len(paraphrases)
        return spearman(similarities, [pair["score"] for pair in pairs]), recall

    made = Embedding(reference, TOKENIZER, graph_inputs(model)).evaluate(other)
    expected, given = figures(reference), figures(other)
    assert made["spearman"] == pytest.approx(given[0], abs=1e-4)
    assert made["recall_at_1"] == pytest.approx(given[1], abs=1e-9)
    assert made["spearman_loss"] == pytest.approx(expected[0] - given[0], abs=2e-4)
    assert made["recall_at_1_loss"] == pytest.approx(expected[1] - given[1], abs=1e-9)
    assert made["loss"] >= max(1 - made["cosine_mean"], made["spearman_loss"], made["recall_at_1_loss"]) > 0


def perplexity(model: torch.nn.Module, rows: list[tuple[list[int], int]]) -> float:
    losses = []
    for tokens, given in rows:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].double()
        first = max(given, 1)
        scored = torch.log_softmax(logits[first - 1 : -1], -1)
        losses += [-float(scored[place, token]) for place, token in enumerate(tokens[first:])]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("given", [0, 3])
def test_perplexity_is_that_of_the_model_in_torch(exported: Callable[[str], Export], given: int) -> None:
    export = exported("llama-fp32")
    model = Decoder(export.folder, slots=1)
    rows = [(TOKENIZER.encode(text).ids, given) for text in TEXTS]
    figures = Text(model, rows).evaluate(model)
    assert figures["perplexity"] == pytest.approx(perplexity(export.source, rows), rel=1e-4)
    assert figures["perplexity_ratio"] == pytest.approx(1)
    assert figures["greedy_agreement"] == 1
    assert figures["loss"] == pytest.approx(0, abs=1e-9)


def test_greedy_agreement_and_the_ratio_are_to_fp32(exported: Callable[[str], Export], tmp_path: Path) -> None:
    folder = exported("llama-fp32").folder
    worse = language_models.perturb(folder, tmp_path / "worse", noise=0.3)
    rows = [(TOKENIZER.encode(text).ids, 0) for text in TEXTS]
    reference, other = Decoder(folder, slots=1), Decoder(worse, slots=1)
    figures = Text(reference, rows).evaluate(other)
    own = Text(reference, rows).evaluate(reference)["perplexity"]
    assert figures["perplexity_ratio"] == pytest.approx(figures["perplexity"] / own)
    same = [
        a == b
        for tokens, _ in rows
        for a, b in zip(reference.logits(tokens)[:-1].argmax(-1), other.logits(tokens)[:-1].argmax(-1), strict=True)
    ]
    assert figures["greedy_agreement"] == pytest.approx(np.mean(same))
    assert 0 < figures["greedy_agreement"] < 1


def test_a_text_longer_than_the_context_is_cut(exported: Callable[[str], Export]) -> None:
    model = Decoder(exported("llama-fp32").folder, slots=1)
    tokens = [7] * 400
    assert math.isfinite(Text(model, [(tokens, 0)]).evaluate(model)["perplexity"])
    with pytest.raises(QuantizationError, match="no text of two tokens or more"):
        Text(model, [([7], 0), ([], 0), (tokens, 399)])


def test_texts_are_read_as_they_are_and_by_prompt(exported: Callable[[str], Export], tmp_path: Path) -> None:
    folder = exported("llama-fp32").folder
    (tmp_path / "a.txt").write_text("one\ntwo\n\n  three \n\n\n")
    assert list(texts.read(tmp_path / "a.txt", folder)) == [
        (TOKENIZER.encode("one\ntwo").ids, 0),
        (TOKENIZER.encode("three").ids, 0),
    ]
    (tmp_path / "a.jsonl").write_text('{"prompt": "ab", "completion": "cde"}\n{"text": "f"}\n')
    (tokens, given), other = texts.read(tmp_path / "a.jsonl", folder)
    assert tokens[given:] == TOKENIZER.encode("cde").ids
    assert tokens[:given] == TOKENIZER.encode("ab").ids  # without a chat template: as it is
    assert other == (TOKENIZER.encode("f").ids, 0)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": 3}\n', r'a\.jsonl, line 1 must be {"text": \.\.\.} or {"prompt"'),
        ("a.jsonl", b'{"text": "a"}\n[]\n', r"a\.jsonl, line 2 must be"),
        ("a.jsonl", b"{\n", r"a\.jsonl, line 1 is not JSON"),
        ("a.npz", b"PK", r"a\.npz is not a \.jsonl or \.txt file: a language model takes texts"),
        ("a.txt", b"\xff\xfe", r"a\.txt"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(
    exported: Callable[[str], Export], tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QuantizationError, match=complaint):
        list(texts.read(tmp_path / name, exported("llama-fp32").folder))


@pytest.mark.parametrize(("name", "independent"), [("llama-fp32", True), ("llama-row-int8", True)])
def test_decoders_rows_are_checked(exported: Callable[[str], Export], name: str, independent: bool) -> None:
    assert tasks.rows_independent(Decoder(exported(name).folder, slots=4), None) == independent


def test_a_row_that_depends_on_its_neighbours_is_noticed(tmp_path: Path) -> None:
    """One row in sixteen differs, and only in its last bit."""
    model = quantization_models.classifier()

    class Leaky(Encoder):
        def run(self, feeds: Feeds) -> list[np.ndarray]:
            outputs = super().run(feeds)
            if len(outputs[0]) == 16:
                outputs[0][15, 3] = np.nextafter(outputs[0][15, 3], np.float32(np.inf))
            if len(outputs[0]) == 9:
                outputs[0][8, 0] = np.nextafter(outputs[0][8, 0], np.float32(np.inf))
            return outputs

    path = quantization_models.store(model, tmp_path)
    feeds = random_feeds(model, 16, 0)
    assert tasks.rows_independent(Encoder(path.parent, "cpu", lambda batch: {}), feeds)
    assert not tasks.rows_independent(Leaky(path.parent, "cpu", lambda batch: {}), feeds)
