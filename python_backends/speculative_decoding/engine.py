"""The decoding loop: admit, prefill, draft, verify, accept, emit, over a changing batch of sequences."""

import logging
import threading
import time

import numpy as np
from numpy.typing import NDArray

from speculative_decoding.acceptance import accept
from speculative_decoding.drafter import Drafter
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.scheduler import Scheduler
from speculative_decoding.sequence import FinishReason, Sequence

logger = logging.getLogger(__name__)
PREFILL_CHUNK = 128  # tokens: running sequences wait for one chunk at most


class Engine:
    """Decodes many sequences at once on its own thread; its other methods may be called from any thread.

    Between steps the target has seen all committed tokens of a running sequence but the last.
    """

    def __init__(
        self, target: LanguageModel, drafter: Drafter | None, speculation_length: int, max_waiting: int
    ) -> None:
        self._target = target
        self._drafter = drafter
        self._speculation_length = speculation_length if drafter else 0
        self._scheduler = Scheduler(target.slots, max_waiting)
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer that a sequence can have."""
        return self._target.context_length

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence of fewer than `context_length` tokens. Raises QueueFullError."""
        with self._changed:
            self._scheduler.add(sequence)
            self._changed.notify()

    def cancel(self, sequence: Sequence) -> None:
        """Have a sequence dropped before the next step; its listener hears "cancelled"."""
        with self._changed:
            sequence.cancelled = True
            self._changed.notify()

    def load(self) -> tuple[int, int]:
        """Return how many sequences run (or are being prefilled) and how many wait."""
        with self._changed:
            return len(self._scheduler.running) + bool(self._scheduler.prefilling), len(self._scheduler.waiting)

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
                self._drop_cancelled()
                self._prefill()
                if self._scheduler.running:
                    self._round()
            except Exception:
                logger.exception("a decoding step failed; its sequences are answered with an error")
                self._fail_all("error")
        self._fail_all("cancelled")

    def _drop_cancelled(self) -> None:
        with self._changed:
            everyone = self._scheduler.everyone()
        for sequence in everyone:
            if sequence.cancelled:
                self._finish(sequence, [], "cancelled")

    def _prefill(self) -> None:
        """Feed the next chunk of the next prompt."""
        with self._changed:
            sequence = self._scheduler.next_prefill()
        if sequence is None:
            return
        slot = len(self._scheduler.running)
        if not sequence.admitted:
            sequence.admitted = time.monotonic()
            self._target.truncate(slot, 0)
            if self._drafter:
                self._drafter.commit(slot, 0)
        done = int(self._target.lengths[slot])
        chunk = np.array([sequence.prompt[done : done + PREFILL_CHUNK]], np.int64)
        logits = self._target.forward(slot, chunk, np.array([chunk.shape[1]], np.int32))
        if done + chunk.shape[1] < len(sequence.prompt):
            return
        first = logits[0, -1:].argmax(-1)
        if self._drafter and self._wanted_length(sequence):
            self._drafter.fill(slot, [*sequence.prompt, int(first[0])])
        self._scheduler.start_decoding()
        sequence.first_token = time.monotonic()
        self._commit(slot, sequence, first)

    def _round(self) -> None:
        """Draft, verify and accept for every running sequence, in one call of the target."""
        running = list(self._scheduler.running)
        drafts, lengths = self._draft(running)
        chosen = self._verify(running, drafts, lengths)
        for slot in reversed(range(len(running))):  # a sequence that ends is replaced by a later one, already served
            sequence, length = running[slot], lengths[slot]
            tokens = accept(drafts[slot, :length], chosen[slot, : length + 1])
            sequence.drafted += int(length)
            sequence.accepted += len(tokens) - 1
            self._commit(slot, sequence, tokens)

    def _draft(self, running: list[Sequence]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return proposals int64 [rows, k] and how many of them each row has, int32 [rows]."""
        room = self.context_length - max(len(sequence.tokens) for sequence in running)
        lengths = np.array([min(self._wanted_length(sequence), room) for sequence in running], np.int32)
        if self._drafter is None or not lengths.any():
            return np.zeros((len(running), 0), np.int64), lengths * 0
        return self._drafter.propose([sequence.tokens for sequence in running], lengths), lengths

    def _wanted_length(self, sequence: Sequence) -> int:
        wanted = sequence.options.speculation_length
        if self._drafter is None or wanted is None:
            wanted = self._speculation_length
        return max(0, min(wanted, sequence.options.max_tokens - sequence.answered - 1))

    def _verify(
        self, running: list[Sequence], drafts: NDArray[np.int64], lengths: NDArray[np.int32]
    ) -> NDArray[np.int64]:
        """Return the target's choice after the last committed token and after each draft, int64 [rows, k + 1]."""
        tokens = np.zeros((len(running), drafts.shape[1] + 1), np.int64)
        tokens[:, 0] = [sequence.tokens[-1] for sequence in running]
        tokens[:, 1:] = drafts
        chosen: NDArray[np.int64] = self._target.forward(0, tokens, lengths + 1).argmax(-1)
        return chosen

    def _commit(self, slot: int, sequence: Sequence, tokens: NDArray[np.int64]) -> None:
        """Add tokens to a running sequence, roll both models back to what stands, and emit; end it where it ends."""
        room = min(sequence.options.max_tokens - sequence.answered, self.context_length - len(sequence.tokens))
        new = tokens[:room].tolist()
        reason: FinishReason | None = "length" if len(new) == room else None
        for position, token in enumerate(new):
            if token in self._target.shape.end_tokens:
                new, reason = new[:position], "stop"
                break
        sequence.tokens += new
        if reason:
            self._finish(sequence, new, reason)
            return
        self._target.truncate(slot, len(sequence.tokens) - 1)
        if self._drafter:
            self._drafter.commit(slot, len(sequence.tokens))
        sequence.listener(sequence, new, None)

    def _finish(self, sequence: Sequence, tokens: list[int], reason: FinishReason) -> None:
        with self._changed:
            moves = self._scheduler.remove(sequence)
        for source, destination in moves:
            self._target.move(source, destination)
            if self._drafter:
                self._drafter.move(source, destination)
        sequence.finished = time.monotonic()
        sequence.listener(sequence, tokens, reason)

    def _fail_all(self, reason: FinishReason) -> None:
        with self._changed:
            everyone = self._scheduler.clear()
        for sequence in everyone:
            sequence.finished = time.monotonic()
            sequence.listener(sequence, [], reason)
