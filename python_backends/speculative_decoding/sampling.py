"""Which token comes next, given logits: one function for draft and target, whoever asks and whatever is beside it."""

import math
import secrets
from collections.abc import Sequence as Ahead
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from speculative_decoding.adjustments import Adjuster, Adjustments, adjust
from speculative_decoding.noise import MAX_GUMBEL, Stream, gumbel, key_of, keys_of
from speculative_decoding.options import MAX_SEED, GenerationOptions

FEW = 64  # tokens for which noise is cheaper than finding out which of them need it
Row = NDArray[np.float32]  # the logits of one position, [vocabulary]


class Distribution(NamedTuple):
    """What may come next: distinct tokens, and their probabilities, which sum to 1."""

    tokens: NDArray[np.int64]
    probabilities: NDArray[np.float64]

    def of(self, token: int) -> float:
        """Return the probability of a token."""
        return float(self.probabilities[self.tokens == token].sum())


class Filters(NamedTuple):
    """Which tokens may be sampled: temperature, 0 for the likeliest; top-k, 0 for all; top-p; the log of min-p."""

    temperature: float
    top_k: int
    top_p: float
    least: float

    @classmethod
    def of(cls, options: GenerationOptions) -> "Filters":
        """Return what a request asks for."""
        least = math.log(options.min_p) if options.min_p else -math.inf
        return cls(options.temperature, options.top_k, options.top_p, least)


# How one token is to be chosen by filters and noise alone, for a GPU: Filters, and the key of the noise.
WISH = np.dtype(
    [("key", np.uint64), ("temperature", np.float32), ("top_p", np.float32), ("least", np.float32), ("top_k", np.int32)]
)


class Sampler:
    """The choices of one sequence.

    A choice is a function of the logits, the request's options and seed, and the tokens before it: not of the draft,
    the batch or how many positions are asked for at once. `ahead` is what comes between the committed tokens and the
    position asked for: drafted tokens, of the same round.
    """

    def __init__(self, options: GenerationOptions, prompt: list[int], ends: frozenset[int]) -> None:
        """`ends`: the tokens that end this sequence."""
        self._options = options
        self._prompt_length = len(prompt)
        self._length = len(prompt)
        self._adjuster = Adjuster(options, prompt, ends)
        self._filters = Filters.of(options)
        temperature, top_k, top_p, least = self._filters
        self.wish = 0, temperature, top_p, least, top_k  # WISH, but for the key
        self.seed = secrets.randbelow(MAX_SEED + 1) if options.seed is None else options.seed

    def commit(self, tokens: list[int]) -> None:
        """Take in what has become part of the answer."""
        self._length += len(tokens)
        for token in tokens:
            self._adjuster.add(token)

    def choose(self, logits: Row, ahead: Ahead[int] = (), stream: Stream = Stream.CHOICE) -> int:
        """Return the next token: a sample of the filtered distribution, or with temperature 0 the likeliest."""
        return choose(self._adjusted(logits, ahead), self._filters, key_of(self.seed, self.position(ahead), stream))

    def distribution(self, logits: Row, ahead: Ahead[int] = ()) -> Distribution:
        """Return what choose() samples from."""
        logits = self._adjusted(logits, ahead)
        if not self._filters.temperature:
            return Distribution(logits.argmax(keepdims=True), np.ones(1))
        tokens, scaled = _filtered(logits, self._filters)
        weights = np.exp(scaled)
        return Distribution(tokens, weights / weights.sum())

    @property
    def looks_back(self) -> bool:
        """Whether the next choices depend on more than logits, filters and noise: bias, penalties, an end too early."""
        return self._adjusts(())

    def adjustments(self, drafted: Ahead[int]) -> Adjustments:
        """Return what is done to the logits before the next choice and before that after each drafted token."""
        entries = self._adjuster.entries(drafted=drafted)
        return Adjustments(entries, self._adjuster.places(len(entries), len(drafted) + 1, self._missing(())))

    def position(self, ahead: Ahead[int] = ()) -> int:
        """Return the place in the sequence of the token after `ahead`, which keys its noise."""
        return self._length + len(ahead)

    def _missing(self, ahead: Ahead[int]) -> int:
        """Return how many tokens an answer with `ahead` lacks to be long enough."""
        return self._options.min_tokens - (self._length + len(ahead) - self._prompt_length)

    def _adjusts(self, ahead: Ahead[int]) -> bool:
        return self._missing(ahead) > 0 or self._options.has_penalties or bool(self._options.logit_bias)

    def _adjusted(self, logits: Row, ahead: Ahead[int]) -> Row:
        """Return logits with bias, penalties and the least number of tokens applied."""
        if not self._adjusts(ahead):
            return logits
        logits, entries = logits.copy(), self._adjuster.entries(ahead)
        [place] = self._adjuster.places(len(entries), 1, self._missing(ahead))
        adjust(logits, entries, place)
        return logits


def wishes_of(samplers: Ahead[Sampler], count: int) -> NDArray[np.void]:
    """Return how the next `count` tokens of each are chosen but for adjustments, WISH [samplers, count]."""
    wishes = np.repeat(np.array([sampler.wish for sampler in samplers], WISH)[:, None], count, axis=1)
    positions = np.array([[sampler.position()] for sampler in samplers]) + np.arange(count)
    wishes["key"] = keys_of([sampler.seed for sampler in samplers], positions, Stream.CHOICE)
    return wishes


def choose(logits: Row, filters: Filters, key: int) -> int:
    """Return a sample of the filtered distribution that the noise of `key` picks; at temperature 0 the likeliest."""
    if not filters.temperature:
        return int(logits.argmax())
    return sample(*_filtered(logits, filters), key)


def sample(tokens: NDArray[np.int64], scaled: NDArray[np.float64], key: int) -> int:
    """Return the one of `tokens`, with log-probabilities `scaled` but for a constant, that the noise picks."""
    if len(tokens) == 1:
        return int(tokens[0])
    if len(tokens) > FEW:
        best = scaled.argmax()
        least = scaled[best] + float(gumbel(key, tokens[best : best + 1])[0]) - MAX_GUMBEL
        possible = np.flatnonzero(scaled >= least)  # no noise lifts the others above the likeliest
        tokens, scaled = tokens[possible], scaled[possible]
    return int(tokens[(scaled + gumbel(key, tokens)).argmax()])


def _filtered(logits: Row, filters: Filters) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the tokens that temperature, min-p, top-k and top-p leave, by id, and log p but for a constant."""
    scaled = (logits - logits.max()) / np.float32(filters.temperature)
    kept = _likeliest(scaled, filters.top_k) if 0 < filters.top_k < len(scaled) else None
    if filters.least > -math.inf:
        kept = _narrowed(kept, np.flatnonzero((scaled if kept is None else scaled[kept]) >= filters.least))
    if filters.top_p < 1:
        kept = _narrowed(kept, _nucleus(scaled if kept is None else scaled[kept], filters.top_p))
    if kept is None:
        return np.arange(len(scaled)), scaled.astype(np.float64)
    return kept, scaled[kept].astype(np.float64)


def _narrowed(kept: NDArray[np.int64] | None, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what stands at these places of what is kept, None meaning all."""
    return places if kept is None else kept[places]


def _likeliest(scaled: Row, count: int) -> NDArray[np.int64]:
    """Return the `count` likeliest tokens, the lower id before the higher where they tie."""
    least = np.partition(scaled, len(scaled) - count)[len(scaled) - count]
    tokens = np.flatnonzero(scaled >= least)
    if len(tokens) > count:
        tokens = np.sort(tokens[np.argsort(-scaled[tokens], kind="stable")[:count]])
    return tokens


def _nucleus(scaled: Row, top_p: float) -> NDArray[np.int64]:
    """Return the places of the fewest likeliest entries whose probabilities sum to `top_p` (Holtzman et al. 2020).

    The likeliest entry is 0.
    """
    weights = np.exp(scaled)
    total = float(weights.sum(dtype=np.float64))
    if top_p * total <= 1:  # the likeliest alone
        return np.array([scaled.argmax()])
    # All that are less likely than this sum to less than 1 - top_p: not worth sorting.
    likely = np.flatnonzero(weights >= total * (1 - top_p) / len(weights))
    order = likely[np.argsort(-weights[likely], kind="stable")]
    sums = np.cumsum(weights[order], dtype=np.float64)
    return np.sort(order[: int(np.searchsorted(sums, top_p * total)) + 1])
