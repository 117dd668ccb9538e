"""Sentences as the embedder takes them: in perf_analyzer's JSON, and as arrays."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from scripts.build_repository import ENCODER
from scripts.demo_models.corpus import collect_facts
from scripts.demo_models.questions import sample_questions

VOCABULARY = (1000, 30000)  # whole words
Tokens = NDArray[np.int64]


class Padding(NamedTuple):
    """To which lengths sentences are padded (none: they are not), and whether the padding is computed as if it were
    text."""

    lengths: tuple[int, ...]
    computed: bool = False

    def of(self, tokens: int) -> int:
        """Return the padded length of a sentence of so many tokens."""
        return next((length for length in self.lengths if tokens <= length), tokens)


def equal_sentences(count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Return `count` random sentences of so many tokens."""
    return np.random.default_rng(seed).integers(*VOCABULARY, (count, tokens)).tolist()


def real_sentences(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Return the tokens of `count` texts, questions and documentation, equally many and in random order."""
    tokenizer = Tokenizer.from_file(str(ENCODER / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    questions = sample_questions(collect_facts(), count // 2, True, seed)
    texts = [text for question in questions for text in (question.prompt, question.answer)]
    random.Random(seed).shuffle(texts)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def rows(sentences: Sequence[Sequence[int]], length: int) -> dict[str, Tokens]:
    """Return the inputs for `sentences` as one batch padded to `length`."""
    ids = np.zeros((len(sentences), length), np.int64)
    mask = np.zeros_like(ids)
    for row, sentence in enumerate(sentences):
        ids[row, : len(sentence)] = sentence
        mask[row, : len(sentence)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def write_requests(path: Path, sentences: Sequence[Sequence[int]], padding: Padding) -> Path:
    """Write a request for each sentence in perf_analyzer's format; return `path`."""
    path.write_text(json.dumps({"data": [_request(sentence, padding) for sentence in sentences]}), encoding="utf-8")
    return path


def _request(sentence: Sequence[int], padding: Padding) -> dict[str, object]:
    inputs = rows([sentence], padding.of(len(sentence)))
    if padding.computed:
        inputs["attention_mask"][:] = 1
    return {name: {"content": values[0].tolist(), "shape": [values.shape[1]]} for name, values in inputs.items()}
