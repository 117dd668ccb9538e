"""How good a quantized model is, measured against the fp32 one it came from.

A task is made from the fp32 model; `evaluate` gives figures of another one, and among them "loss": the one that the
quality floor is about, 0 for as good as fp32.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from scripts.quantization.errors import QuantizationError
from scripts.quantization.graph import Feeds, Input
from scripts.quantization.runner import Decoder, Encoder
from scripts.quantization.samples import Batch, tokenize

SENTENCE_PAIRS = Path(__file__).with_name("sentence_pairs.jsonl")
PARAPHRASE = 4.5  # score, of 5, from which the second sentence is what a search with the first should find
ROWS = 32

Figures = dict[str, float]
Float = NDArray[np.float64]


def read_pairs() -> list[dict[str, Any]]:
    """Return the graded pairs: "first", "second" and "score"."""
    return [json.loads(line) for line in SENTENCE_PAIRS.read_text(encoding="utf-8").splitlines()]


def sentences(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """Return all first sentences of `pairs`, then all second ones."""
    return [pair[side] for side in ("first", "second") for pair in pairs]


class Task(ABC):
    """A measure of quality; the reference is the fp32 model's own."""

    @abstractmethod
    def evaluate(self, model: Any) -> Figures:
        """Return figures of a model, with its "loss"."""


class Outputs(Task):
    """For any model: the cosine between its outputs and the fp32 model's, sample by sample."""

    def __init__(self, reference: Encoder, batches: Iterable[Feeds]) -> None:
        self._batches = batches
        self._expected = [_rows(reference, feeds) for feeds in batches]

    def evaluate(self, model: Encoder) -> Figures:
        pairs = zip(self._batches, self._expected, strict=True)
        cosines = np.concatenate([_cosines(_rows(model, feeds), expected) for feeds, expected in pairs])
        return {"cosine_mean": cosines.mean(), "cosine_min": cosines.min(), "loss": 1 - cosines.mean()}


class Classification(Task):
    """For classifiers: accuracy by labels, and agreement with the fp32 model; the first output holds the scores."""

    def __init__(self, reference: Encoder, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._labels = np.concatenate([np.asarray(batch.labels).ravel() for batch in batches])
        self._expected = self._classes(reference)
        self._accuracy = self._accuracy_of(self._expected)

    def evaluate(self, model: Encoder) -> Figures:
        classes = self._classes(model)
        accuracy = self._accuracy_of(classes)
        agreement = float((classes == self._expected).mean())
        return {"accuracy": accuracy, "agreement": agreement, "loss": self._accuracy - accuracy}

    def _classes(self, model: Encoder) -> NDArray:
        """Return the most likely class of each labelled sample: a batch of a fixed size may be filled up."""
        chosen = [(model.run(batch.feeds)[0].argmax(-1).ravel(), batch.labels) for batch in self._batches]
        return np.concatenate([classes[: np.size(labels)] for classes, labels in chosen])

    def _accuracy_of(self, classes: NDArray) -> float:
        return float((classes == self._labels).mean())


class Embedding(Task):
    """For sentence encoders: how their similarities rank graded pairs (Spearman), and whether a search with a sentence
    finds its paraphrase among all others (recall at 1)."""

    def __init__(self, reference: Encoder, tokenizer: tokenizers.Tokenizer, inputs: Sequence[Input]) -> None:
        pairs = read_pairs()
        texts = sentences(pairs)
        # Sentences of similar length share a batch, and what one text gives does not depend on the order of the file.
        self._order = np.argsort([len(tokenizer.encode(text).ids) for text in texts], kind="stable")
        chunks = [self._order[start : start + ROWS] for start in range(0, len(texts), ROWS)]
        self._batches = [tokenize(tokenizer, [texts[index] for index in chunk], inputs) for chunk in chunks]
        self._scores = np.array([pair["score"] for pair in pairs])
        self._expected = self._vectors(reference)
        self._spearman, self._recall = self._ranking(self._expected)

    def evaluate(self, model: Encoder) -> Figures:
        vectors = self._vectors(model)
        cosines = (vectors * self._expected).sum(-1)
        spearman, recall = self._ranking(vectors)
        return {
            "cosine_mean": float(cosines.mean()),
            "cosine_min": float(cosines.min()),
            "spearman": spearman,
            "spearman_loss": self._spearman - spearman,
            "recall_at_1": recall,
            "recall_at_1_loss": self._recall - recall,
            "loss": max(0.0, self._spearman - spearman, self._recall - recall, 1 - float(cosines.mean())),
        }

    def _vectors(self, model: Encoder) -> Float:
        sorted_vectors = np.concatenate([model.run(feeds)[0] for feeds in self._batches]).astype(np.float64)
        vectors = np.empty_like(sorted_vectors)
        vectors[self._order] = sorted_vectors
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    def _ranking(self, vectors: Float) -> tuple[float, float]:
        first, second = np.split(vectors, 2)
        spearman = np.corrcoef(_ranks((first * second).sum(-1)), _ranks(self._scores))[0, 1]
        paraphrases = np.flatnonzero(self._scores >= PARAPHRASE)
        found = (first[paraphrases] @ second.T).argmax(-1)
        return float(spearman), float((found == paraphrases).mean())


class Text(Task):
    """For language models: perplexity on held-out text, and how often the most likely token is the fp32 model's."""

    def __init__(self, reference: Decoder, texts: Sequence[tuple[list[int], int]]) -> None:
        """`texts` are tokens, and how many of them are a prompt: given, not scored."""
        context = reference.model.context_length
        self._texts = [
            (tokens[:context], given) for tokens, given in texts if max(given, 1) < min(len(tokens), context)
        ]
        if not self._texts:
            raise QuantizationError("the held-out text has no text of two tokens or more")
        self._nll, self._choices = self._read(reference)

    def evaluate(self, model: Decoder) -> Figures:
        nll, choices = self._read(model)
        return {
            "perplexity": float(np.exp(nll)),
            "perplexity_ratio": float(np.exp(nll - self._nll)),
            "greedy_agreement": float((choices == self._choices).mean()),
            "loss": float(np.exp(nll - self._nll)) - 1,
        }

    def _read(self, model: Decoder) -> tuple[float, NDArray]:
        """Return the mean negative log likelihood of the scored tokens, and the most likely token at each."""
        losses, choices = [], []
        for tokens, given in self._texts:
            first = max(given, 1)
            logits = model.logits(tokens)[first - 1 : len(tokens) - 1].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            chosen = logits[np.arange(len(logits)), tokens[first:]]
            losses.append(np.log(np.exp(logits).sum(-1)) - chosen)
            choices.append(logits.argmax(-1))
        return float(np.concatenate(losses).mean()), np.concatenate(choices)


def rows_independent(model: Encoder | Decoder, example: Feeds | None, rows: int = 16) -> bool:
    """Return whether a row's result is the same, to the last bit, alone and among up to `rows` others.

    example: an encoder's inputs for `rows` rows of equal length, or None for a decoder, whose rows are tokens too.
    """
    if isinstance(model, Decoder):
        return _tokens_independent(model, rows)
    assert example is not None
    together = _rows(model, example)
    if len(together) < rows:  # a graph of a fixed batch: the first row among its own likes
        alone = {name: np.repeat(values[:1], len(values), axis=0) for name, values in example.items()}
        return np.array_equal(_rows(model, alone)[0], together[0])
    return all(
        np.array_equal(_rows(model, {name: values[:count] for name, values in example.items()}), together[:count])
        for count in range(1, rows)
    )


def _tokens_independent(model: Decoder, rows: int) -> bool:
    """Feed the same text in calls of 1 to `rows` tokens, and alone and in a batch."""
    decoder = model.model
    tokens = np.random.default_rng(0).integers(decoder.shape.vocabulary, size=rows).tolist()
    whole = model.logits(tokens).copy()
    for width in range(1, rows):
        decoder.truncate(0, 0)
        for start in range(0, rows, width):
            part = np.array([tokens[start : start + width]])
            logits = decoder.forward(0, part, np.array([part.shape[1]], np.int32))[0]
            if not np.array_equal(logits, whole[start : start + width]):
                return False
    for slot in range(decoder.slots):
        decoder.truncate(slot, 0)
    batch = np.random.default_rng(1).integers(decoder.shape.vocabulary, size=(decoder.slots, rows))
    batch[0] = tokens
    logits = decoder.forward(0, batch, np.full(decoder.slots, rows, np.int32))
    return np.array_equal(logits[0], whole)


def _rows(model: Encoder, feeds: Feeds) -> Float:
    """Return the outputs of a batch side by side, [rows, all values]; outputs without a batch axis are left out."""
    batch = len(next(iter(feeds.values())))
    outputs = [output for output in model.run(feeds) if output.ndim and len(output) == batch]
    return np.concatenate([output.reshape(batch, -1) for output in outputs], axis=1).astype(np.float64)


def _cosines(left: Float, right: Float) -> Float:
    """Return the cosine of each pair of rows: 1 for two rows of zeros, 0 for one, NaN where a value is not finite."""
    lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    zeros = (~left.any(-1) & ~right.any(-1)).astype(np.float64)
    return np.divide((left * right).sum(-1), lengths, out=zeros, where=lengths != 0)


def _ranks(values: NDArray) -> Float:
    """Return the rank of each value; equal ones share the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group].astype(np.float64)
