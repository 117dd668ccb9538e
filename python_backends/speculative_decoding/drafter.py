"""Who proposes tokens for the target to verify."""

from abc import ABC, abstractmethod
from collections.abc import Sequence as Rows

import numpy as np
from numpy.typing import NDArray

from speculative_decoding.language_model import LanguageModel


class Drafter(ABC):
    """Proposes tokens for the sequences in slots 0, 1, ...; `committed` are each sequence's tokens, prompt included."""

    @abstractmethod
    def fill(self, slot: int, committed: list[int]) -> None:
        """Take in what a slot has committed, but for its last token."""

    @abstractmethod
    def propose(self, committed: Rows[list[int]], lengths: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return int64 [rows, max(lengths)]; row r's first lengths[r] tokens are proposals, the rest means nothing."""

    @abstractmethod
    def commit(self, slot: int, length: int) -> None:
        """Say that the sequence in `slot` now has `length` committed tokens, whatever was proposed."""

    @abstractmethod
    def move(self, source: int, destination: int) -> None:
        """Move a sequence between slots."""


class ModelDrafter(Drafter):
    """A small language model decodes ahead of the target, greedily."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def fill(self, slot: int, committed: list[int]) -> None:
        missing = committed[self._model.lengths[slot] : -1]
        if missing:
            self._model.forward(slot, np.array([missing], np.int64), np.array([len(missing)], np.int32))

    def propose(self, committed: Rows[list[int]], lengths: NDArray[np.int32]) -> NDArray[np.int64]:
        rows = len(committed)
        proposals = np.zeros((rows, int(lengths.max())), np.int64)
        tokens, counts = self._unseen(committed, lengths)
        picked = np.arange(rows)
        for step in range(proposals.shape[1]):
            counts *= lengths > step
            logits = self._model.forward(0, tokens, counts)
            proposals[:, step] = logits[picked, counts - 1].argmax(-1)
            tokens = proposals[:, step : step + 1]
            counts = np.ones(rows, np.int32)
        return proposals

    def _unseen(
        self, committed: Rows[list[int]], lengths: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return each row's committed tokens that the draft has not seen: one, or two after a full acceptance."""
        for slot, tokens in enumerate(committed):
            if lengths[slot] and len(tokens) - self._model.lengths[slot] > 2:
                self.fill(slot, tokens)
        unseen = [tokens[self._model.lengths[slot] :] if lengths[slot] else [] for slot, tokens in enumerate(committed)]
        counts = np.array([len(tokens) for tokens in unseen], np.int32)
        padded = np.zeros((len(unseen), int(counts.max())), np.int64)
        for row, tokens in enumerate(unseen):
            padded[row, : len(tokens)] = tokens
        return padded, counts

    def commit(self, slot: int, length: int) -> None:
        self._model.truncate(slot, max(0, length - 1))

    def move(self, source: int, destination: int) -> None:
        self._model.move(source, destination)
