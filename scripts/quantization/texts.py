"""Texts for language models: calibration and held-out data.

A .txt file holds a text a paragraph; a .jsonl file holds {"text": ...}, or {"prompt": ..., "completion": ...}: the
prompt is rendered by the model's chat template, if it has one, and only the completion is scored.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from scripts.quantization.errors import QuantizationError
from scripts.quantization.graph import Feeds, Input
from scripts.quantization.tasks import read_pairs
from scripts.serving.installation import PYTHON_BACKENDS

sys.path.append(str(PYTHON_BACKENDS))

from speculative_decoding.language_model import DecoderShape
from speculative_decoding.tokenizer import Tokenizer

TokenizedText = tuple[list[int], int]  # tokens, and how many of them are a prompt
DEFAULT_SENTENCES = 6  # of the shipped ones, joined to a text


def read(path: Path, folder: Path) -> Iterator[TokenizedText]:
    """Tokenize the texts in a file with the tokenizer of the model in `folder`."""
    plain = Tokenizer(folder, "raw")
    for origin, item in _items(path):
        text, prompt, completion = (item.get(name) for name in ("text", "prompt", "completion"))
        if isinstance(text, str):
            yield plain.encode_prompt(text), 0
        elif isinstance(prompt, str) and isinstance(completion, str):
            given = _chat(folder).encode_prompt(prompt)
            yield [*given, *plain.encode_prompt(completion)], len(given)
        else:
            raise QuantizationError(f'{origin} must be {{"text": ...}} or {{"prompt": ..., "completion": ...}}')


def shipped(folder: Path) -> list[TokenizedText]:
    """Return the project's own English sentences as texts of a few sentences each."""
    tokenizer = Tokenizer(folder, "raw")
    sentences = [pair["first"] for pair in read_pairs()]
    starts = range(0, len(sentences), DEFAULT_SENTENCES)
    return [(tokenizer.encode_prompt(" ".join(sentences[start : start + DEFAULT_SENTENCES])), 0) for start in starts]


def decoder_feeds(inputs: Sequence[Input], tokens: Sequence[int], folder: Path) -> Feeds:
    """Return the inputs of the exported decoder in `folder` for one text without a past."""
    decoder = DecoderShape.load(folder)
    feeds: Feeds = {}
    for taken in inputs:
        if taken.name == "input_ids":
            values = np.array([tokens])
        elif taken.name == "attention_mask":
            values = np.ones((1, len(tokens)))
        elif taken.name == "position_ids":
            values = np.arange(len(tokens))[None]
        else:  # keys and values
            values = np.zeros((1, decoder.kv_heads, 0, decoder.head_size))
        feeds[taken.name] = values.astype(taken.data_type)
    return feeds


def _items(path: Path) -> Iterator[tuple[str, dict]]:
    if path.suffix == ".txt":
        try:
            paragraphs = path.read_text(encoding="utf-8").split("\n\n")
        except ValueError as error:
            raise QuantizationError(f"{path} is not UTF-8: {error}") from error
        yield from ((f"{path}", {"text": text.strip()}) for text in paragraphs if text.strip())
        return
    if path.suffix != ".jsonl" or not path.is_file():
        raise QuantizationError(f"{path} is not a .jsonl or .txt file: a language model takes texts")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                item = json.loads(line)
            except ValueError as error:
                raise QuantizationError(f"{path}, line {number} is not JSON: {error}") from error
            yield f"{path}, line {number}", item if isinstance(item, dict) else {}


def _chat(folder: Path) -> Tokenizer:
    try:
        return Tokenizer(folder, "chat")
    except ValueError:
        return Tokenizer(folder, "raw")
