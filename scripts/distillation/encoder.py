"""Sentence encoders: the student learns the teacher's vectors, the mean over a sentence's tokens scaled to length 1."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from scripts.distillation import losses, precision
from scripts.distillation.samples import Batch, Order, Sample, by_length, collate
from scripts.distillation.sampling import padding
from scripts.distillation.settings import Settings

TEACHER_ROWS = 64


class SentenceVectors:
    """Learn the direction of each sentence's vector and the cosines between those of a batch.

    Where the student's vectors are narrower than the teacher's, only the cosines between them can be learned.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        samples: Sequence[Sample],
        held_out: Sequence[Sample],
        settings: Settings,
        dtype: torch.dtype,
        stored: Path | None = None,
    ) -> None:
        """`stored` keeps the teacher's vectors between runs: reading them again takes longer than learning an epoch."""
        self._device, self._dtype, self._pad = teacher.device, dtype, padding(teacher)
        self._settings = settings
        self._samples, self._held_out = samples, held_out
        self._order = Order(samples, settings.rows, settings.length, settings.seed)
        self._wanted, self._held_out_wanted = self._teacher_vectors(teacher, stored)

    def _teacher_vectors(self, teacher: PreTrainedModel, stored: Path | None) -> list[Tensor]:
        if stored is not None and stored.exists():
            vectors: list[Tensor] = torch.load(stored, weights_only=True)
            return vectors
        vectors = [self.vectors(teacher, part) for part in (self._samples, self._held_out)]
        if stored is not None:
            partial = stored.with_suffix(".partial")
            torch.save(vectors, partial)
            partial.replace(stored)
        return vectors

    @torch.no_grad()
    def vectors(self, model: nn.Module, samples: Sequence[Sample]) -> Tensor:
        """Return the vectors [samples, width] of length 1, fp32 on the CPU."""
        lengths = [len(sample.tokens) for sample in samples]
        order = sorted(range(len(samples)), key=lambda index: lengths[index])
        batches = by_length(lengths, order, TEACHER_ROWS, TEACHER_ROWS * self._settings.length)
        read = [
            self._read(model, collate([samples[index] for index in batch], self._pad, self._device))
            for batch in batches
        ]
        vectors = torch.cat(read).cpu()
        return torch.empty_like(vectors).index_copy_(0, torch.tensor([i for batch in batches for i in batch]), vectors)

    def _read(self, model: nn.Module, batch: Batch) -> Tensor:
        with precision.autocast(self._device, self._dtype):
            hidden = model(input_ids=batch.tokens, attention_mask=batch.mask).last_hidden_state
        weights = batch.mask[:, :, None].float()
        return functional.normalize((hidden.float() * weights).sum(1), dim=-1)

    def loss(self, student: nn.Module, step: int) -> Tensor:
        """Return the weighted losses of a step's sentences."""
        chosen = self._order.at(step)
        own = self._read(student, collate([self._samples[index] for index in chosen], self._pad, self._device))
        return self._losses(own, self._wanted[chosen].to(self._device))

    def _losses(self, own: Tensor, wanted: Tensor) -> Tensor:
        weights = self._settings.weights
        total = weights.pairs * losses.pair_similarity(own, wanted)
        if own.shape == wanted.shape:
            total = total + weights.cosine * losses.direction(own, wanted)
        return total

    def held_out(self, student: nn.Module) -> dict[str, float]:
        """Return `loss`, as learned; the mean cosine to the teacher; and how often the nearest sentence is the same."""
        own, wanted = self.vectors(student, self._held_out), self._held_out_wanted
        figures = {"loss": self._losses(own, wanted).item()}
        if own.shape == wanted.shape:
            figures["cosine"] = (own * wanted).sum(-1).mean().item()
        nearest = [(vectors @ vectors.T).fill_diagonal_(-2).argmax(-1) for vectors in (own, wanted)]
        figures["nearest_neighbour_agreement"] = (nearest[0] == nearest[1]).float().mean().item()
        return figures
