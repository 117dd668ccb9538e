"""Tokenized samples and the batches made of them, in an order that depends on seed and step only."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
SORTED_TOGETHER = 16  # batches; the longer and the shorter samples of so many are kept apart, which saves padding


class Sample(NamedTuple):
    """The tokens of a text; the first `given` of them are a prompt, which is read and not learned."""

    tokens: list[int]
    given: int = 0


class Batch(NamedTuple):
    """Samples side by side, padded on the right: int64 [rows, width]. Labels are IGNORED where nothing is learned."""

    tokens: Tensor
    mask: Tensor
    labels: Tensor

    @property
    def chosen(self) -> Tensor:
        """Which positions' following tokens are learned: bool [rows, width - 1]."""
        return self.labels[:, 1:] != IGNORED


def collate(samples: Sequence[Sample], pad: int, device: torch.device) -> Batch:
    """Return the samples as one batch on `device`."""
    width = max(len(sample.tokens) for sample in samples)
    tokens = torch.full((len(samples), width), pad)
    mask = torch.zeros((len(samples), width), dtype=torch.int64)
    labels = torch.full((len(samples), width), IGNORED)
    for row, (text, given) in enumerate(samples):
        tokens[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
        labels[row, given : len(text)] = torch.tensor(text[given:])
    return Batch(tokens.to(device), mask.to(device), labels.to(device))


def by_length(lengths: Sequence[int], order: Sequence[int], rows: int, most: int) -> list[list[int]]:
    """Cut `order` into batches of samples of about equal length: `rows` at most, and `most` padded tokens at most."""
    batches: list[list[int]] = []
    together = SORTED_TOGETHER * rows
    for begin in range(0, len(order), together):
        batch: list[int] = []
        for index in sorted(order[begin : begin + together], key=lambda index: lengths[index]):
            if batch and (len(batch) == rows or (len(batch) + 1) * lengths[index] > most):
                batches.append(batch)
                batch = []
            batch.append(index)
        batches.append(batch)
    return batches


class Order:
    """Which samples each step takes: every sample once an epoch, those of about equal length together."""

    def __init__(self, samples: Sequence[Sample], rows: int, length: int, seed: int) -> None:
        self._lengths = [len(sample.tokens) for sample in samples]
        self._rows, self._most = rows, rows * length
        self._seed = seed
        self._forget()

    def _forget(self) -> None:
        self._epoch, self._begin, self._batches = -1, 0, list[list[int]]()

    def at(self, step: int) -> list[int]:
        """Return the indices of the samples of a step. Going back is slow: it counts epochs from the first."""
        if step < self._begin:
            self._forget()
        while step >= self._begin + len(self._batches):
            self._begin += len(self._batches)
            self._epoch += 1
            self._batches = self._shuffled(self._epoch)
        return self._batches[step - self._begin]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        batches = by_length(self._lengths, order, self._rows, self._most)
        return [batches[index] for index in torch.randperm(len(batches), generator=generator)]
