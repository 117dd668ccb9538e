"""Prompts on their way into slots, chunk by chunk, between the rounds of those who decode already."""

import time

import numpy as np

from speculative_decoding.decoder import Decoder, Logits
from speculative_decoding.prefix_reuse import PagedReuse, PrefixReuse
from speculative_decoding.sequence import Sequence
from speculative_decoding.step_costs import StepCosts, clipped

PREFILL_CHUNK = 128  # tokens, where nothing was measured
LEAST_CHUNK, MOST_CHUNK = 8, 512
CHUNK_ROUNDS = 1.0  # a chunk may cost so many rounds: who is decoding then waits twice as long as otherwise
ROUND_WEIGHT = 0.1  # of a round, in how long rounds take lately
LONGEST_CHUNK_S = 0.03  # when nobody waits for the next token: a cancellation is noticed after it


class Prefill:
    """Feeds prompts to the target, from where the key/value cache knows no more of them."""

    def __init__(self, target: Decoder, prefixes: PrefixReuse | PagedReuse, costs: StepCosts | None) -> None:
        self._target = target
        self._prefixes = prefixes
        self._costs = costs
        self._round_s = 0.0  # lately

    def budget(self, decoding: bool) -> int:
        """Return how many tokens may be fed before the next round, if there are sequences `decoding`."""
        if self._costs is None:
            return PREFILL_CHUNK
        seconds = min(CHUNK_ROUNDS * self._round_s, LONGEST_CHUNK_S) if decoding else LONGEST_CHUNK_S
        return min(max(self._costs.prefill.tokens(seconds), LEAST_CHUNK), MOST_CHUNK)

    def record_round(self, seconds: float) -> None:
        """Learn how long a round took."""
        self._round_s = self._round_s * clipped(seconds / self._round_s) ** ROUND_WEIGHT if self._round_s else seconds

    def feed(self, slot: int, sequence: Sequence, most: int) -> tuple[int, Logits | None]:
        """Feed at most so many tokens of a prompt, and return how many.

        With them, once the prompt is done, the logits [1, 1, vocabulary] after its last token.
        """
        if not sequence.admitted:
            sequence.admitted = time.monotonic()
            self._prefixes.admit(slot, sequence)
        done = int(self._target.lengths[slot])
        most = min(most, self._target.widest(1))
        chunk = np.array([sequence.prompt[done : done + most]], np.int64)
        width = chunk.shape[1]
        started = time.perf_counter()
        logits = self._target.forward(slot, chunk, np.array([width], np.int32))
        if self._costs:
            logits[:, -1:].argmax(-1)  # waits for the device
            self._costs.prefill.observe(width, time.perf_counter() - started)
        return width, logits[:, -1:] if done + width == len(sequence.prompt) else None
