"""Who proposes tokens for the target to verify."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as Rows
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from speculative_decoding.decoder import Decoder
from speculative_decoding.draft_loop import LARGEST_BYTES, DraftLoop
from speculative_decoding.followed import ON_DEVICE, Followed
from speculative_decoding.kv_layout import SlotMemory
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.noise import Stream
from speculative_decoding.paged_call import LEAST_WIDTH
from speculative_decoding.paged_model import FOLLOWED_WIDTH, WIDTHS, PagedModel
from speculative_decoding.sampling import Distribution, wishes_of
from speculative_decoding.sequence import Sequence

FILL_TOKENS = 64  # taken in between two of the target's steps, for each prompt that one call can have


class Proposals(NamedTuple):
    """tokens: int64 [rows, longest]; of a row with fewer the rest means nothing. distributions: for rows whose drafts
    are judged by rejection, what each was sampled from. followed: what the tokens are that are ON_DEVICE.
    """

    tokens: NDArray[np.int64]
    distributions: dict[int, list[Distribution]]
    followed: Followed | None = None


class Drafter(ABC):
    """Proposes tokens for the sequences in slots 0, 1, ..."""

    @property
    @abstractmethod
    def ran_s(self) -> float:
        """Seconds spent within ONNX Runtime so far."""

    @abstractmethod
    def fill(self, committed: Mapping[int, list[int]]) -> set[int]:
        """Take in what slots have committed, as much of it as a round can wait for; return which can propose now."""

    @abstractmethod
    def propose(self, sequences: Rows[Sequence], lengths: NDArray[np.int32]) -> Proposals:
        """Propose lengths[r] tokens for row r."""

    @abstractmethod
    def slot(self, slot: int) -> SlotMemory:
        """Return a slot's keys and values."""

    @abstractmethod
    def seen(self, slot: int) -> int:
        """Return how many tokens a slot has the keys and values of."""

    @abstractmethod
    def resume(self, slot: int, length: int) -> None:
        """Say that the keys and values of the first `length` tokens have been written to a slot."""

    @abstractmethod
    def commit(self, slot: int, length: int) -> None:
        """Say that the sequence in `slot` now has `length` committed tokens, whatever was proposed."""

    @abstractmethod
    def move(self, source: int, destination: int) -> None:
        """Move a sequence between slots."""


class ModelDrafter(Drafter):
    """A small language model decodes ahead of the target, choosing as the target would."""

    def __init__(self, model: Decoder, loops: Collection[int] = ()) -> None:
        """`loops`: numbers of greedy steps to have in one call, where the model is small enough to gain by it."""
        self._model = model
        self._loops: list[DraftLoop] = []
        if isinstance(model, LanguageModel) and model.weight_bytes <= LARGEST_BYTES:
            self._loops = [DraftLoop(model, steps) for steps in sorted(loops)]
        self._most_unseen = FOLLOWED_WIDTH if isinstance(model, PagedModel) else 2  # what propose() takes in by itself

    @property
    def ran_s(self) -> float:
        return self._model.ran_s

    def fill(self, committed: Mapping[int, list[int]]) -> set[int]:
        left = min(FILL_TOKENS * self._model.prompts_at_once, self._model.longest_chunk)
        chunks, able = dict[int, list[int]](), set[int]()
        for slot, tokens in committed.items():
            missing = tokens[self._model.lengths[slot] : -1]
            if len(missing) < self._most_unseen:
                able.add(slot)
            elif left >= LEAST_WIDTH:
                chunks[slot] = missing[:left]
                left -= len(chunks[slot])
                if len(chunks[slot]) == len(missing):
                    able.add(slot)
        for first, group in _neighbours(chunks, self._model.prompts_at_once):
            self._model.forward_prompts(first, group)
        return able

    def propose(self, sequences: Rows[Sequence], lengths: NDArray[np.int32]) -> Proposals:
        longest, drafting = int(lengths.max()), np.flatnonzero(lengths).tolist()
        sampled = [row for row in drafting if not sequences[row].options.is_bare]
        if isinstance(self._model, PagedModel) and not any(sequences[row].by_rejection for row in sampled):
            followed = self._follow(self._model, sequences, lengths, bool(sampled))
            return Proposals(np.full(followed.shape, ON_DEVICE), {}, followed)
        rows = drafting[-1] + 1
        sequences, lengths = sequences[:rows], lengths[:rows]
        tokens, counts = self._unseen(sequences, lengths > 0)
        if not sampled and (loop := self._loop(rows, longest)):
            return Proposals(loop.run(tokens, counts)[:, :longest], {})
        return self._step_by_step(sequences, lengths, tokens, counts, sampled)

    def _follow(
        self, model: PagedModel, sequences: Rows[Sequence], lengths: NDArray[np.int32], sampled: bool
    ) -> Followed:
        """Propose on the device. Rows that nothing is proposed for take in what they lack: in this call it is free."""
        longest = int(lengths.max())
        behind = np.array([len(one.tokens) for one in sequences]) - model.lengths[: len(sequences)]
        keeping_up = (lengths == 0) & (behind <= self._most_unseen)
        tokens, counts = self._unseen(sequences, (lengths > 0) | keeping_up)
        wishes = wishes_of([one.sampler for one in sequences], longest).T if sampled else None
        proposed = model.follow(tokens, counts, longest, wishes)
        for row in np.flatnonzero(keeping_up).tolist():
            model.truncate(row, len(sequences[row].tokens))
        return proposed

    def _step_by_step(
        self,
        sequences: Rows[Sequence],
        lengths: NDArray[np.int32],
        tokens: NDArray[np.int64],
        counts: NDArray[np.int32],
        sampled: list[int],
    ) -> Proposals:
        """Propose with one call for each token: `tokens` and `counts` are what is fed first."""
        rows, longest = len(sequences), int(lengths.max())
        proposals = Proposals(np.zeros((rows, longest), np.int64), {row: [] for row in sampled})
        picked = np.arange(rows)
        for step in range(longest):
            counts *= lengths > step
            logits = self._model.forward(0, tokens, counts)
            logits = logits[:, 0] if tokens.shape[1] == 1 else logits[picked, counts - 1]
            proposals.tokens[:, step] = logits.argmax(-1)
            for row in sampled:
                if lengths[row] > step:
                    ahead = proposals.tokens[row, :step].tolist()
                    proposals.tokens[row, step] = self._sample(
                        sequences[row], logits[row], ahead, proposals.distributions[row]
                    )
            tokens = proposals.tokens[:, step : step + 1]
            counts = np.ones(rows, np.int32)
        return proposals

    def warm_up(self) -> None:
        """Make, in slots that are empty again after, each call that is captured when it is first made."""
        if not isinstance(self._model, PagedModel):
            return
        for rows, width in product(self._model.row_counts, (LEAST_WIDTH, FOLLOWED_WIDTH)):
            self.rehearse(rows, 1, width)
        for size in (*WIDTHS, *self._model.chunks):
            self._model.forward_prompts(0, [[0] * size])
            self._model.truncate(0, 0)

    def rehearse(self, rows: int, length: int, unseen: int = 2) -> None:
        """Make the calls that proposing `length` tokens for so many rows takes, in slots that are empty again after.

        Each row has so many tokens that the draft has not seen, more than two only on a device.
        """
        tokens, counts = np.zeros((rows, unseen), np.int64), np.full(rows, unseen, np.int32)
        if isinstance(self._model, PagedModel):
            self._model.follow(tokens, counts, length, None).tokens()
        elif loop := self._loop(rows, length):
            loop.run(tokens, counts)
        else:
            for step in range(length):
                self._model.forward(0, tokens if step == 0 else tokens[:, :1], counts if step == 0 else counts // 2)
        self._model.lengths[:] = 0

    def _loop(self, rows: int, length: int) -> DraftLoop | None:
        """Return the shortest loop of at least so many steps, None where single steps are as good."""
        fitting = (loop for loop in self._loops if loop.steps >= length > loop.steps // 2 and loop.fits(rows))
        return next(fitting, None)

    def _sample(
        self, sequence: Sequence, logits: NDArray[np.float32], ahead: list[int], distributions: list[Distribution]
    ) -> int:
        """Choose with the noise that the target will use, or, to be judged by rejection, with noise of its own."""
        if not sequence.by_rejection:
            return sequence.sampler.choose(logits, ahead)
        distributions.append(sequence.sampler.distribution(logits, ahead))
        return sequence.sampler.choose(logits, ahead, Stream.DRAFT)

    def _unseen(
        self, sequences: Rows[Sequence], wanted: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return the committed tokens of the rows `wanted` that the draft has not seen: one, two or a few of each."""
        unseen = [
            sequence.tokens[self._model.lengths[slot] :] if wanted[slot] else []
            for slot, sequence in enumerate(sequences)
        ]
        counts = np.array([len(tokens) for tokens in unseen], np.int32)
        padded = np.zeros((len(unseen), int(counts.max())), np.int64)
        for row, tokens in enumerate(unseen):
            padded[row, : len(tokens)] = tokens
        return padded, counts

    @property
    def model(self) -> Decoder:
        """The draft model."""
        return self._model

    def slot(self, slot: int) -> SlotMemory:
        assert isinstance(self._model, LanguageModel)
        return self._model.slot(slot)

    def seen(self, slot: int) -> int:
        return int(self._model.lengths[slot])

    def resume(self, slot: int, length: int) -> None:
        assert isinstance(self._model, LanguageModel)
        self._model.resume(slot, length)

    def commit(self, slot: int, length: int) -> None:
        self._model.truncate(slot, max(0, length - 1))

    def move(self, source: int, destination: int) -> None:
        self._model.move(source, destination)


def _neighbours(chunks: Mapping[int, list[int]], most: int) -> Iterator[tuple[int, list[list[int]]]]:
    """Yield the chunks of slots that follow each other, so many at once at most, each time with the first slot."""
    first, group = 0, list[list[int]]()
    for slot, chunk in chunks.items():
        if group and (slot != first + len(group) or len(group) == most):
            yield first, group
            group = []
        first = first if group else slot
        group.append(chunk)
    if group:
        yield first, group
