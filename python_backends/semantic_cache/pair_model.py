"""Two prompts to how alike they are as requests: tokens of both, through a cross-encoder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from semantic_cache.embedder import open_tokenizer

LENGTHS = (32, 48, 64, 96, 128, 256, 512)  # in tokens of both prompts: equal shapes share a batch


class PairModel:
    """Callable: (prompt, prompt) -> logit, above 0 where they are rather the same request.

    None for a pair of more than 512 tokens, or with a word that has none: what would not be read may differ.
    """

    def __init__(self, tokenizer_file: Path, infer: Callable[..., npt.NDArray[np.float32]]) -> None:
        """`infer` maps input_ids, attention_mask and token_type_ids [1, length] to a logit [1, 1].

        Raises FileNotFoundError when there is no tokenizer.
        """
        self._tokenizer = open_tokenizer(tokenizer_file)
        self._unknown = self._tokenizer.token_to_id("[UNK]")
        self._infer = infer

    def words(self) -> frozenset[str]:
        """Return the words that are one token each, in lower case: the common ones."""
        return frozenset(token for token in self._tokenizer.get_vocab() if token.isascii() and token.isalpha())

    def __call__(self, first: str, second: str) -> float | None:
        """Score a pair. Raises what the model raises, ValueError for nonsense."""
        encoding = self._tokenizer.encode(first, second)
        length = next((length for length in LENGTHS if len(encoding.ids) <= length), None)
        if length is None or self._unknown in encoding.ids:
            return None
        encoding.pad(length)
        given = {
            "input_ids": encoding.ids,
            "attention_mask": encoding.attention_mask,
            "token_type_ids": encoding.type_ids,
        }
        logits = self._infer(**{name: np.array([values], np.int64) for name, values in given.items()})
        if logits.shape != (1, 1) or not np.isfinite(logits).all():
            raise ValueError(f"the pair model gave no finite logit (shape {list(logits.shape)})")
        return float(logits[0, 0])
