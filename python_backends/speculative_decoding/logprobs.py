"""How likely the model itself found a chosen token, before any filter: what `logprobs` asks for."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class TokenLogprob(NamedTuple):
    """A token with the logarithm of its probability and its rank, 1 for the likeliest."""

    token: int
    logprob: float
    rank: int


def token_logprobs(logits: NDArray[np.float32], chosen: int, count: int) -> tuple[TokenLogprob, ...]:
    """Return the chosen token, then the `count` likeliest ones without it, given logits [vocabulary]."""
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    best = np.argpartition(-exact, count)[:count].tolist() if count else []
    likeliest = sorted(best, key=lambda token: (-exact[token], token))
    described = [TokenLogprob(chosen, float(exact[chosen]), 1 + int((exact > exact[chosen]).sum()))]
    for rank, token in enumerate(likeliest, 1):
        if token != chosen:
            described.append(TokenLogprob(token, float(exact[token]), rank))
    return tuple(described)
