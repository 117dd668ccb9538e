"""Random numbers that depend on what they are for, and not on who asks, in which order or how often."""

import enum
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
MASK = 2**64 - 1
RESOLUTION = 2.0**-32  # uniform numbers are odd multiples of half of it
MAX_GUMBEL = float(-np.log(-np.log1p(-RESOLUTION / 2)))  # no noise is greater


class Stream(enum.IntEnum):
    """What a random number decides; one position may need one of each."""

    CHOICE = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


def gumbel(key: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return standard Gumbel noise for each of `tokens`, a function of the token and the key of its position.

    argmax(log p + noise) is then a sample of p (Gumbel 1954; Maddison et al. 2014).
    """
    uniform = (_bits(key, tokens) + 0.5) * RESOLUTION
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def uniform(key: int) -> float:
    """Return a number between 0 and 1, neither included."""
    return float((_bits(key, np.zeros(1, np.int64))[0] + 0.5) * RESOLUTION)


def key_of(seed: int, position: int, stream: Stream) -> int:
    """Return 64 bits that are another number for each position of each sequence, and for each purpose."""
    return _mix((_mix(seed & MASK) + position * len(Stream) + stream) & MASK)


def keys_of(seeds: Sequence[int], positions: NDArray[np.int64], stream: Stream) -> NDArray[np.uint64]:
    """Return key_of() of each of `positions` [rows, any number], a row for each seed."""
    begins = np.array([(_mix(seed & MASK) + GOLDEN) & MASK for seed in seeds], np.uint64)
    counters = positions.astype(np.uint64) * np.uint64(len(Stream)) + np.uint64(stream)
    return _mixed(counters + begins[:, None])


def _bits(key: int, tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return 32 random bits for each token: splitmix64 (Steele et al. 2014) on a counter."""
    return _mixed(tokens.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(key)) >> np.uint64(32)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


def _mix(value: int) -> int:
    value = (value + GOLDEN) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
