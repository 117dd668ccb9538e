"""The decoding loop: admit, prefill, draft, verify, accept, emit, over a changing batch of sequences."""

import logging
import threading
import time
from collections import deque
from typing import NamedTuple

import numpy as np

from speculative_decoding.acceptance import accept_drafts
from speculative_decoding.burst import Burst
from speculative_decoding.decoder import Decoder, Logits
from speculative_decoding.departures import Departures
from speculative_decoding.drafter import Drafter
from speculative_decoding.engine_statistics import Statistics
from speculative_decoding.logprobs import token_logprobs
from speculative_decoding.paged_model import PagedModel
from speculative_decoding.prefill import Chunk, Prefill, total_tokens
from speculative_decoding.prefix_cache import PrefixCache
from speculative_decoding.prefix_reuse import prefix_reuse
from speculative_decoding.scheduler import Scheduler
from speculative_decoding.sequence import FinishReason, Sequence
from speculative_decoding.speculation import Drafts, Speculation
from speculative_decoding.step_costs import StepCosts

logger = logging.getLogger(__name__)


class Load(NamedTuple):
    """How full the engine is: sequences in slots, sequences that wait, tokens in slots."""

    running: int
    waiting: int
    tokens: int


class Engine:
    """Decodes many sequences at once on its own thread; its other methods may be called from any thread.

    Between steps the target has seen all committed tokens of a running sequence but the last.
    """

    def __init__(
        self,
        target: Decoder,
        drafter: Drafter | None,
        speculation_length: int,
        max_waiting: int,
        costs: StepCosts | None = None,
        kv_tokens: int | None = None,
        kv_cache: PrefixCache | None = None,
    ) -> None:
        """speculation_length: drafted tokens at most, unless a request says otherwise; without `costs` never fewer.

        kv_tokens: tokens that all sequences in slots may come to have together, None for as many as fit.
        kv_cache: where prefixes are found and kept, of the shapes of target and draft; paged models keep
            their own.
        """
        self.statistics = Statistics()
        self.kv_tokens = kv_tokens
        self._target = target
        self._drafter = drafter
        self._is_queued = isinstance(target, PagedModel)  # its calls return before they are done
        self._news = deque[tuple[Sequence, list[int], FinishReason | None]]()  # that listeners have not heard
        self._burst = Burst(target, costs)
        self._prefixes = prefix_reuse(kv_cache, target, drafter)
        self._prefill = Prefill(target, self._prefixes, costs)
        self._speculation = Speculation(drafter, speculation_length, costs)
        self._scheduler = Scheduler(target.slots, max_waiting, kv_tokens, self.most_tokens)
        self._changed = threading.Condition()
        self._departures = Departures()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer that a sequence can have."""
        return self._target.context_length

    @property
    def end_tokens(self) -> frozenset[int]:
        """The model's own end tokens."""
        return self._target.shape.end_tokens

    def most_tokens(self, sequence: Sequence) -> int:
        """Return how many tokens of keys and values a sequence can come to need."""
        return min(len(sequence.prompt) + sequence.options.max_tokens, self.context_length)

    def submit(self, *sequences: Sequence) -> None:
        """Queue sequences of fewer than `context_length` tokens, all or none. Raises QueueFullError."""
        with self._changed:
            self._scheduler.add(*sequences)
            for sequence in sequences:
                self._departures.watch(sequence)
            self._changed.notify()

    def cancel(self, sequence: Sequence) -> None:
        """Have a sequence dropped before the next step; its listener hears "cancelled"."""
        with self._changed:
            self._departures.cancel(sequence)

    def load(self) -> Load:
        """Return how full the engine is."""
        with self._changed:
            in_slots = self._scheduler.in_slots()
            return Load(len(in_slots), self._scheduler.waiting, sum(len(sequence.tokens) for sequence in in_slots))

    def is_idle(self) -> bool:
        """Whether nobody is decoding or waits for it."""
        with self._changed:
            return self._scheduler.idle

    def stop(self) -> None:
        """End the thread; whoever is still in the engine hears "cancelled"."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or not self._scheduler.idle)
            try:
                self._drop()
                chunks = self._admit()
                if self._scheduler.running:
                    self._round(chunks)
                if not self._scheduler.running:
                    self._tell_all()
            except Exception:
                logger.exception("a decoding step failed; its sequences are answered with an error")
                self._fail_all("error")
        self._fail_all("cancelled")

    def _drop(self) -> None:
        """End the sequences whose clients have gone or wait no longer."""
        now = time.monotonic()
        if not self._departures.any(now):
            return
        with self._changed:
            leaving = self._departures.take(now)
        for sequence, reason in leaving:
            if not sequence.finished:
                self._finish(sequence, [], reason)

    def _admit(self) -> list[Chunk]:
        """Feed the next chunks of the next prompts, as many tokens as the running sequences can wait for.

        Returns those that may be fed with the round that follows.
        """
        is_decoding = bool(self._scheduler.running)
        along = is_decoding and self._is_queued
        budget = self._prefill.budget(is_decoding, along)
        while budget > 0:
            with self._changed:
                sequences = self._scheduler.next_prefills(self._target.prompts_at_once)
            if not sequences:
                break
            chunks = self._prefill.plan(len(self._scheduler.running), sequences, budget)
            if along:
                return chunks
            budget -= total_tokens(chunks)
            self._feed(chunks)
        return []

    def _feed(self, chunks: list[Chunk]) -> None:
        """Feed chunks to the slots after the running sequences'."""
        self._prepare(chunks)
        self._tell_all()
        logits = self._prefill.feed(len(self._scheduler.running), chunks)
        self._begin(chunks, logits)

    def _prepare(self, chunks: list[Chunk]) -> None:
        """Have the draft take in the prompts that a GPU is giving to the target: at the same time it costs little."""
        if chunks and self._drafter and self._is_queued:
            first = len(self._scheduler.running)
            ending = [(slot, chunk.sequence) for slot, chunk in enumerate(chunks, first) if chunk.is_last]
            self._drafter.fill({slot: one.prompt for slot, one in ending if one.options.wants_draft_model})

    def _begin(self, chunks: list[Chunk], logits: Logits) -> None:
        """Commit the first token of each answer whose prompt is done, given the logits [chunks, 1, vocabulary]."""
        begun = [chunk.sequence for chunk in chunks if chunk.is_last]
        if not begun:
            return
        logits = logits[: len(begun)]
        first_tokens = accept_drafts(begun, Drafts.none(len(begun)), logits)
        first = len(self._scheduler.running)
        self._scheduler.start_decoding(len(begun))
        for place in reversed(range(len(begun))):  # a sequence that ends is replaced by a later one, already served
            slot, sequence = first + place, begun[place]
            sequence.first_token = time.monotonic()
            self.statistics.prompt_tokens += len(sequence.prompt)
            self._commit(slot, sequence, first_tokens[place], logits, place)
            if not sequence.finished:  # its first token is on its way: now others may use the prompt
                self._prefixes.keep(slot, sequence)

    def _round(self, chunks: list[Chunk]) -> None:
        """Draft, verify and accept for every running sequence, in one call of the target, which takes chunks along.

        Or decode plainly, in a burst.
        """
        started, ran = time.perf_counter(), self._ran_s()
        running = list(self._scheduler.running)
        drafts = self._draft(running)
        steps = 1 if chunks or drafts.tokens.size else self._burst.length(running)
        draft_s = time.perf_counter() - started
        if chunks and not self._can_take_along(drafts, chunks):
            self._feed(chunks)
            chunks = []
        verify_at = time.perf_counter()
        logits: Logits | None = None
        if steps > 1:
            followed = self._burst.start(running, steps)
            self._tell_all()
            accepted = followed.tokens().tolist()
        else:
            logits, of_chunks = self._verify(running, drafts, chunks)
            self._prepare(chunks)
            self._tell_all()
            accepted = accept_drafts(running, drafts, logits)
            if drafts.followed:  # the device was still drafting while it was given what to verify
                late_s = max(0.0, drafts.followed.ready_at() - verify_at)
                draft_s, verify_at = draft_s + late_s, verify_at + late_s
            if of_chunks is not None:
                self._begin(chunks, of_chunks)
        for slot in reversed(range(len(running))):  # a sequence that ends is replaced by a later one, already served
            sequence, length, tokens = running[slot], int(drafts.lengths[slot]), accepted[slot]
            self._record(sequence, length, tokens)
            self._commit(slot, sequence, tokens, logits, slot)
        self.statistics.model_s += self._ran_s() - ran
        verify_s = time.perf_counter() - verify_at
        self.statistics.rounds += steps
        self.statistics.plain_rounds += 0 if drafts.tokens.size else steps
        self.statistics.step_s += draft_s + verify_s
        if not chunks:
            self._learn(drafts, (draft_s + verify_s) / steps, verify_s / steps)

    def _ran_s(self) -> float:
        """Return the seconds spent within ONNX Runtime so far."""
        return self._target.ran_s + (self._drafter.ran_s if self._drafter else 0.0)

    def _draft(self, running: list[Sequence]) -> Drafts:
        """Return what the drafters propose for the running sequences, as far as all have room."""
        room = self.context_length - max(len(sequence.tokens) for sequence in running)
        return self._speculation.draft(running, min(room, self._target.widest(len(running)) - 1))

    def _can_take_along(self, drafts: Drafts, chunks: list[Chunk]) -> bool:
        """Return whether one call of the target can verify drafts and take chunks of prompts along."""
        rows, longest = drafts.tokens.shape
        tokens = [chunk.tokens for chunk in chunks]
        return isinstance(self._target, PagedModel) and self._target.mixes(rows, longest + 1, tokens)

    def _verify(self, running: list[Sequence], drafts: Drafts, chunks: list[Chunk]) -> tuple[Logits, Logits | None]:
        """Return the target's logits after the last committed token and after each draft, [rows, k + 1, vocabulary].

        With chunks of prompts, also those after each of them, [chunks, 1, vocabulary].
        """
        rows, longest = drafts.tokens.shape
        tokens = np.empty((rows, longest + 1), np.int64)
        tokens[:, 0] = [sequence.tokens[-1] for sequence in running]
        tokens[:, 1:] = drafts.tokens
        counts = drafts.lengths + 1
        if not isinstance(self._target, PagedModel):
            return self._target.forward(0, tokens, counts), None
        if not chunks:
            return self._target.forward(0, tokens, counts, drafts.followed), None
        return self._target.forward_mixed(tokens, counts, [chunk.tokens for chunk in chunks], drafts.followed)

    def _record(self, sequence: Sequence, drafted: int, tokens: list[int]) -> None:
        """Learn from how many drafted tokens stood, of which the next `tokens` begin with."""
        accepted = len(tokens) - 1 if drafted else 0
        sequence.drafted += drafted
        sequence.accepted += accepted
        self._speculation.record(sequence, drafted, tokens)
        self.statistics.verified(drafted, accepted)

    def _learn(self, drafts: Drafts, seconds: float, verify_s: float) -> None:
        """Learn from what a round took, and its part after drafting: verifying, choosing and committing."""
        self._speculation.record_round(drafts, seconds, verify_s)
        self._prefill.record_round(seconds)

    def _commit(self, slot: int, sequence: Sequence, tokens: list[int], logits: Logits | None, row: int) -> None:
        """Add tokens to a running sequence, roll both models back to what stands, and emit; end it where it ends.

        `row` of the logits is what they were chosen of, where the host has any.
        """
        new, reason = sequence.until_end(tokens, self.context_length)
        if logits is not None and (most := sequence.options.logprobs) is not None:
            sequence.logprobs += [token_logprobs(logits[row][place], token, most) for place, token in enumerate(new)]
        sequence.commit(new)
        self._count(sequence, len(new))
        if reason:
            self._finish(sequence, new, reason)
            return
        self._target.truncate(slot, len(sequence.tokens) - 1)
        if self._drafter:
            self._drafter.commit(slot, len(sequence.tokens))
        self._tell(sequence, new, None)

    def _tell(self, sequence: Sequence, tokens: list[int], reason: FinishReason | None) -> None:
        """Have a listener told, on a GPU once it has the next step to work on."""
        self._news.append((sequence, tokens, reason))
        if not self._is_queued:
            self._tell_all()

    def _tell_all(self) -> None:
        """Tell listeners what they have not been told."""
        while self._news:
            sequence, tokens, reason = self._news.popleft()
            sequence.listener(sequence, tokens, reason)

    def _count(self, sequence: Sequence, tokens: int) -> None:
        now = time.monotonic()
        self.statistics.emitted(tokens, now - sequence.last_token if sequence.last_token else None)
        sequence.last_token = now

    def _finish(self, sequence: Sequence, tokens: list[int], reason: FinishReason) -> None:
        slots = self._scheduler.in_slots()
        if sequence in slots and sequence.admitted:
            self._prefixes.keep(slots.index(sequence), sequence)
        with self._changed:
            moves = self._scheduler.remove(sequence)
            self._departures.forget(sequence)
        for source, destination in moves:
            self._target.move(source, destination)
            if self._drafter:
                self._drafter.move(source, destination)
        sequence.finished = time.monotonic()
        self._tell(sequence, tokens, reason)

    def _fail_all(self, reason: FinishReason) -> None:
        self._tell_all()
        with self._changed:
            everyone = self._scheduler.clear()
            self._departures.clear()
        for sequence in everyone:
            sequence.finished = time.monotonic()
            sequence.listener(sequence, [], reason)
