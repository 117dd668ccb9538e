"""Whether a token's logits depend on what is fed with it: if they do, speculation and batching can change an answer."""

import numpy as np
from numpy.typing import NDArray

from speculative_decoding.decoder import Decoder

PAST = 12  # tokens in a slot before the comparison
WIDTHS = (2, 5, 9)  # tokens at once: a round verifies one more than it drafts
ROWS = 4


def rows_are_independent(model: Decoder) -> bool:
    """Return whether logits have the same bits fed one token at a time, several at once, and among other rows.

    The rows hold different tokens, and their order is changed too. All slots are empty before and after.
    """
    rows = min(ROWS, model.slots)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.shape.vocabulary, (rows, PAST))
    tokens = rng.integers(0, model.shape.vocabulary, (rows, max(WIDTHS)))
    try:
        alone = np.concatenate([_one_by_one(model, prompts[row : row + 1], tokens[row]) for row in range(rows)])
        orders = [list(range(rows)), list(reversed(range(rows)))]
        same = all(
            np.array_equal(_at_once(model, prompts[order], tokens[order, :width]), alone[order, :width])
            for order in orders
            for width in (1, *WIDTHS)
        )
        return same and all(
            np.array_equal(_at_once(model, prompts[:1], tokens[:1, :width]), alone[:1, :width]) for width in WIDTHS
        )
    finally:
        for slot in range(model.slots):
            model.truncate(slot, 0)


def _one_by_one(model: Decoder, prompt: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return logits [1, tokens, vocabulary] of decoding without speculation, alone."""
    _prefill(model, prompt)
    one = np.ones(1, np.int32)
    return np.concatenate([model.forward(0, token.reshape(1, 1), one).copy() for token in tokens], axis=1)


def _at_once(model: Decoder, prompts: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return logits [rows, tokens, vocabulary] of one call."""
    _prefill(model, prompts)
    return model.forward(0, tokens, np.full(len(tokens), tokens.shape[1], np.int32)).copy()


def _prefill(model: Decoder, prompts: NDArray[np.int64]) -> None:
    for slot, prompt in enumerate(prompts):
        model.truncate(slot, 0)
        model.forward(slot, prompt[None], np.array([len(prompt)], np.int32))
