"""The decoding loop: admit, prefill, draft, verify, accept, emit, over a changing batch of sequences."""

import logging
import math
import threading
import time
from typing import NamedTuple

import numpy as np

from speculative_decoding.acceptance import accept, accept_by_rejection
from speculative_decoding.drafter import Drafter
from speculative_decoding.engine_statistics import Statistics
from speculative_decoding.language_model import LanguageModel, Logits
from speculative_decoding.logprobs import token_logprobs
from speculative_decoding.sampling import Distribution
from speculative_decoding.scheduler import Scheduler
from speculative_decoding.sequence import FinishReason, Sequence
from speculative_decoding.speculation import Drafts, Speculation
from speculative_decoding.step_costs import StepCosts, clipped

logger = logging.getLogger(__name__)
PREFILL_CHUNK = 128  # tokens, where nothing was measured
LEAST_CHUNK, MOST_CHUNK = 8, 512
CHUNK_ROUNDS = 1.5  # a chunk may cost so many rounds: who is decoding then waits 2.5 times as long as otherwise
LONGEST_CHUNK_S = 0.03  # when nobody waits for the next token: a cancellation is noticed after it
ROUND_WEIGHT = 0.1  # of a round, in how long rounds take lately


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
        target: LanguageModel,
        drafter: Drafter | None,
        speculation_length: int,
        max_waiting: int,
        costs: StepCosts | None = None,
        kv_tokens: int | None = None,
    ) -> None:
        """speculation_length: drafted tokens at most, unless a request says otherwise; without `costs` never fewer.

        kv_tokens: tokens that all sequences in slots may come to have together, None for as many as fit.
        """
        self.statistics = Statistics()
        self.kv_tokens = kv_tokens
        self._target = target
        self._drafter = drafter
        self._costs = costs
        self._speculation = Speculation(drafter, speculation_length, costs)
        self._scheduler = Scheduler(target.slots, max_waiting, kv_tokens, self.most_tokens)
        self._round_s = 0.0  # lately
        self._changed = threading.Condition()
        self._dropped: list[tuple[Sequence, FinishReason]] = []
        self._timed: set[Sequence] = set()
        self._next_deadline = math.inf
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
                sequence.submitted = True
                if sequence.cancelled:
                    self._dropped.append((sequence, "cancelled"))
                if sequence.deadline < math.inf:
                    self._timed.add(sequence)
                    self._next_deadline = min(self._next_deadline, sequence.deadline)
            self._changed.notify()

    def cancel(self, sequence: Sequence) -> None:
        """Have a sequence dropped before the next step; its listener hears "cancelled"."""
        with self._changed:
            if sequence.submitted and not sequence.cancelled:
                self._dropped.append((sequence, "cancelled"))
                self._changed.notify()
            sequence.cancelled = True

    def load(self) -> Load:
        """Return how full the engine is."""
        with self._changed:
            in_slots = self._scheduler.in_slots()
            return Load(len(in_slots), self._scheduler.waiting, sum(len(sequence.tokens) for sequence in in_slots))

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
                self._prefill()
                if self._scheduler.running:
                    self._round()
            except Exception:
                logger.exception("a decoding step failed; its sequences are answered with an error")
                self._fail_all("error")
        self._fail_all("cancelled")

    def _drop(self) -> None:
        """End the sequences whose clients have gone or wait no longer."""
        now = time.monotonic()
        if not self._dropped and now < self._next_deadline:
            return
        with self._changed:
            dropped, self._dropped = self._dropped, []
            dropped += [(sequence, "timeout") for sequence in self._timed if sequence.deadline <= now]
            self._next_deadline = min((one.deadline for one in self._timed if one.deadline > now), default=math.inf)
        for sequence, reason in dropped:
            if not sequence.finished:
                self._finish(sequence, [], reason)

    def _prefill(self) -> None:
        """Feed the next chunks of the next prompts, as many tokens as the running sequences can wait for."""
        budget = self._prefill_budget()
        while budget > 0:
            with self._changed:
                sequence = self._scheduler.next_prefill()
            if sequence is None:
                return
            budget -= self._prefill_chunk(sequence, budget)

    def _prefill_budget(self) -> int:
        if self._costs is None:
            return PREFILL_CHUNK
        seconds = CHUNK_ROUNDS * self._round_s if self._scheduler.running else LONGEST_CHUNK_S
        tokens = self._costs.prefill.tokens(min(seconds, LONGEST_CHUNK_S))
        return min(max(tokens, LEAST_CHUNK), MOST_CHUNK)

    def _prefill_chunk(self, sequence: Sequence, most: int) -> int:
        """Feed at most so many tokens of a prompt, and begin to decode when it is done; return how many."""
        slot = len(self._scheduler.running)
        if not sequence.admitted:
            sequence.admitted = time.monotonic()
            self._target.truncate(slot, 0)
            if self._drafter:
                self._drafter.commit(slot, 0)
        done = int(self._target.lengths[slot])
        chunk = np.array([sequence.prompt[done : done + most]], np.int64)
        width = chunk.shape[1]
        started = time.perf_counter()
        logits = self._target.forward(slot, chunk, np.array([width], np.int32))
        if self._costs:
            self._costs.prefill.observe(width, time.perf_counter() - started)
        if done + width == len(sequence.prompt):
            self._begin(slot, sequence, logits[0, -1:])
        return width

    def _begin(self, slot: int, sequence: Sequence, logits: Logits) -> None:
        """Commit the first token of an answer, logits [1, vocabulary] being those of the prompt's last."""
        self._scheduler.start_decoding()
        sequence.first_token = time.monotonic()
        self.statistics.prompt_tokens += len(sequence.prompt)
        self._commit(slot, sequence, self._accept(sequence, [], [], logits), logits)

    def _round(self) -> None:
        """Draft, verify and accept for every running sequence, in one call of the target."""
        started, ran = time.perf_counter(), self._ran_s()
        running = list(self._scheduler.running)
        drafts = self._draft(running)
        drafted_at = time.perf_counter()
        logits = self._verify(running, drafts)
        for slot in reversed(range(len(running))):  # a sequence that ends is replaced by a later one, already served
            sequence, length = running[slot], int(drafts.lengths[slot])
            drafted = drafts.tokens[slot, :length].tolist()
            tokens = self._accept(sequence, drafted, drafts.distributions.get(slot, []), logits[slot, : length + 1])
            self._record(sequence, length, len(tokens) - 1)
            self._commit(slot, sequence, tokens, logits[slot])
        self.statistics.model_s += self._ran_s() - ran
        ended = time.perf_counter()
        self._record_round(drafts, ended - started, ended - drafted_at)

    def _ran_s(self) -> float:
        """Return the seconds spent within ONNX Runtime so far."""
        return self._target.ran_s + (self._drafter.ran_s if self._drafter else 0.0)

    def _draft(self, running: list[Sequence]) -> Drafts:
        """Return what the drafters propose for the running sequences, as far as all have room."""
        room = self.context_length - max(len(sequence.tokens) for sequence in running)
        return self._speculation.draft(running, room)

    def _verify(self, running: list[Sequence], drafts: Drafts) -> Logits:
        """Return the target's logits after the last committed token and after each draft, [rows, k + 1, vocabulary]."""
        rows, longest = drafts.tokens.shape
        tokens = np.empty((rows, longest + 1), np.int64)
        tokens[:, 0] = [sequence.tokens[-1] for sequence in running]
        tokens[:, 1:] = drafts.tokens
        return self._target.forward(0, tokens, drafts.lengths + 1)

    def _accept(
        self, sequence: Sequence, drafted: list[int], proposed: list[Distribution], logits: Logits
    ) -> list[int]:
        """Return the drafted tokens that stand and one more, given logits [drafted + 1, vocabulary]."""
        sampler = sequence.sampler
        if sequence.options.is_bare:
            best = logits.argmax(-1).tolist()
            return accept(drafted, best.__getitem__)
        if sequence.by_rejection:
            return accept_by_rejection(
                drafted,
                proposed,
                lambda place: sampler.distribution(logits[place], drafted[:place]),
                sampler.seed,
                len(sequence.tokens),
            )
        return accept(drafted, lambda place: sampler.choose(logits[place], drafted[:place]))

    def _record(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        sequence.drafted += drafted
        sequence.accepted += accepted
        self._speculation.record(sequence, drafted, accepted)
        self.statistics.verified(drafted, accepted)

    def _record_round(self, drafts: Drafts, seconds: float, verify_s: float) -> None:
        """Learn from what a round took, and its part after drafting: verifying, choosing and committing."""
        rows, longest = drafts.tokens.shape
        if self._costs:
            self._costs.verify.observe(rows, longest, verify_s)
        self._speculation.record_round(rows, drafts.lengths, seconds)
        self._round_s = self._round_s * clipped(seconds / self._round_s) ** ROUND_WEIGHT if self._round_s else seconds
        self.statistics.rounds += 1
        self.statistics.plain_rounds += not longest
        self.statistics.step_s += seconds

    def _commit(self, slot: int, sequence: Sequence, tokens: list[int], logits: Logits) -> None:
        """Add tokens to a running sequence, roll both models back to what stands, and emit; end it where it ends."""
        options = sequence.options
        room = min(options.max_tokens - sequence.answered, self.context_length - len(sequence.tokens))
        new = tokens[:room]
        reason: FinishReason | None = "length" if len(new) == room else None
        for position, token in enumerate(new):
            if token in sequence.ends:
                new, reason = new[:position], "stop"
                break
        if options.logprobs is not None:
            for place, token in enumerate(new):
                sequence.logprobs.append(token_logprobs(logits[place], token, options.logprobs))
        sequence.commit(new)
        self._count(sequence, len(new))
        if reason:
            self._finish(sequence, new, reason)
            return
        self._target.truncate(slot, len(sequence.tokens) - 1)
        if self._drafter:
            self._drafter.commit(slot, len(sequence.tokens))
        sequence.listener(sequence, new, None)

    def _count(self, sequence: Sequence, tokens: int) -> None:
        now = time.monotonic()
        self.statistics.emitted(tokens, now - sequence.last_token if sequence.last_token else None)
        sequence.last_token = now

    def _finish(self, sequence: Sequence, tokens: list[int], reason: FinishReason) -> None:
        with self._changed:
            moves = self._scheduler.remove(sequence)
            self._timed.discard(sequence)
        for source, destination in moves:
            self._target.move(source, destination)
            if self._drafter:
                self._drafter.move(source, destination)
        sequence.finished = time.monotonic()
        sequence.listener(sequence, tokens, reason)

    def _fail_all(self, reason: FinishReason) -> None:
        with self._changed:
            everyone = self._scheduler.clear()
            self._dropped.clear()
            self._timed.clear()
        for sequence in everyone:
            sequence.finished = time.monotonic()
            sequence.listener(sequence, [], reason)
