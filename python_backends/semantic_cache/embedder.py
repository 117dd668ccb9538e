"""Prompts to vectors: tokens, padded to a few lengths, through an embedding model."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from semantic_cache.records import Vector

Tokens = npt.NDArray[np.int64]

LENGTHS = (16, 32, 64, 128, 256)  # in tokens: equal shapes share a batch, and short prompts stay cheap


class Embedder:
    """Callable: [prompt] -> [unit vector, or None for a prompt of more than 256 tokens].

    A longer prompt gets no vector: one made from its beginning would call two prompts the same that differ at the end.
    """

    def __init__(self, tokenizer_file: Path, infer: Callable[[Tokens, Tokens], Vector]) -> None:
        """`infer` maps input_ids and attention_mask [n, length] to embeddings [n, dimensions].

        Raises FileNotFoundError when there is no tokenizer.
        """
        self._tokenizer = open_tokenizer(tokenizer_file)
        self._tokenizer.enable_truncation(LENGTHS[-1])
        self._infer = infer

    def __call__(self, prompts: Sequence[str]) -> list[Vector | None]:
        """Embed with one call of the model per padded length. Raises what the model raises, ValueError for nonsense."""
        encodings = self._tokenizer.encode_batch(list(prompts))
        rows_of: dict[int, list[int]] = defaultdict(list)
        for row, encoding in enumerate(encodings):
            if not encoding.overflowing:
                rows_of[_padded(len(encoding.ids))].append(row)
        vectors: list[Vector | None] = [None] * len(encodings)
        for length, rows in rows_of.items():
            for row, vector in zip(rows, self._embed([encodings[row] for row in rows], length), strict=True):
                vectors[row] = vector
        return vectors

    def _embed(self, encodings: list[Encoding], length: int) -> Vector:
        ids = np.zeros((len(encodings), length), np.int64)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding.ids)] = encoding.ids
            mask[row, : len(encoding.ids)] = 1
        raw = self._infer(ids, mask)
        vectors: Vector = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
        if vectors.ndim != 2 or not np.isfinite(vectors).all():
            raise ValueError(f"the embedder gave no finite vector per prompt (shape {list(vectors.shape)})")
        return vectors


def open_tokenizer(file: Path) -> Tokenizer:
    """Read a tokenizer that neither truncates nor pads. Raises FileNotFoundError when there is none."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: build the model repository with `make models`")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _padded(tokens: int) -> int:
    return next(length for length in LENGTHS if tokens <= length)
