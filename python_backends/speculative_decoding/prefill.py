"""Prompts on their way into slots, chunk by chunk, between the rounds of those who decode already."""

import time
from collections.abc import Sequence as Row
from typing import NamedTuple

from speculative_decoding.decoder import Decoder, Logits
from speculative_decoding.paged_call import LEAST_WIDTH
from speculative_decoding.prefix_reuse import PagedReuse, PrefixReuse
from speculative_decoding.sequence import Sequence
from speculative_decoding.step_costs import StepCosts, clipped

PREFILL_CHUNK = 128  # tokens, where nothing was measured
LEAST_CHUNK, MOST_CHUNK = 8, 512
CHUNK_ROUNDS = 1.0  # a chunk may cost so many rounds: who is decoding then waits twice as long as otherwise
ROUND_WEIGHT = 0.1  # of a round, in how long rounds take lately
SHARED_TOKENS = 32  # that two prompts fed at once both compute, at most; of more the second waits, to find the first's
LONGEST_CHUNK_S = 0.03  # when nobody waits for the next token: a cancellation is noticed after it


class Chunk(NamedTuple):
    """The next tokens of a sequence's prompt."""

    sequence: Sequence
    tokens: list[int]
    is_last: bool


class Prefill:
    """Feeds prompts to the target, from where the key/value cache knows no more of them."""

    def __init__(self, target: Decoder, prefixes: PrefixReuse | PagedReuse, costs: StepCosts | None) -> None:
        self._target = target
        self._prefixes = prefixes
        self._costs = costs
        self._round_s = 0.0  # lately

    def budget(self, decoding: bool, along: bool) -> int:
        """Return how many tokens may be fed before the next round, if there are sequences `decoding`, or with it."""
        if self._costs is None:
            return PREFILL_CHUNK
        seconds = min(CHUNK_ROUNDS * self._round_s, LONGEST_CHUNK_S) if decoding else LONGEST_CHUNK_S
        return min(max(self._costs.prefill.tokens(seconds, along), LEAST_CHUNK), MOST_CHUNK)

    def record_round(self, seconds: float) -> None:
        """Learn how long a round took."""
        self._round_s = self._round_s * clipped(seconds / self._round_s) ** ROUND_WEIGHT if self._round_s else seconds

    def plan(self, first: int, sequences: Row[Sequence], most: int) -> list[Chunk]:
        """Return what is fed next of these sequences' prompts, in the slots first, first + 1, ..., in one call.

        At most so many tokens, each prompt whole but the last. Whose prompt begins like one before it waits for that.
        """
        left, chunks = max(min(most, self._target.longest_chunk), LEAST_WIDTH), list[Chunk]()
        for slot, sequence in enumerate(sequences, first):
            if left < LEAST_WIDTH or any(
                self._is_computing(at, one.sequence, sequence) for at, one in enumerate(chunks, first)
            ):
                break
            if not sequence.admitted:
                sequence.admitted = time.monotonic()
                self._prefixes.admit(slot, sequence)
            done = int(self._target.lengths[slot])
            tokens = sequence.prompt[done : done + left]
            chunks.append(Chunk(sequence, tokens, done + len(tokens) == len(sequence.prompt)))
            left -= max(len(tokens), LEAST_WIDTH)
        return chunks

    def feed(self, first: int, chunks: Row[Chunk]) -> Logits:
        """Feed chunks to the slots first, first + 1, ..., and return the logits [chunks, 1, vocabulary] after each."""
        started = time.perf_counter()
        logits = self._target.forward_prompts(first, [chunk.tokens for chunk in chunks])
        if self._costs:
            logits.argmax(-1)  # waits for the device
            self._costs.prefill.observe(total_tokens(chunks), time.perf_counter() - started)
        return logits

    def _is_computing(self, slot: int, one: Sequence, other: Sequence) -> bool:
        """Return whether what a slot is about to compute is what another sequence will want to find."""
        end = int(self._target.lengths[slot]) + SHARED_TOKENS + 1
        begin = one.prompt[:end]
        return len(begin) == end and begin == other.prompt[:end] and one.options.tenant == other.options.tenant


def total_tokens(chunks: Row[Chunk]) -> int:
    """Return how many tokens chunks have together."""
    return sum(len(chunk.tokens) for chunk in chunks)
