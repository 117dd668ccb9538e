"""Drafts for speculative decoding: the student learns from what the target itself says (Zhou et al. 2023, DistillSpec).

A draft only ever continues the target's words, so those are the texts to learn from, with the target's whole
distribution at each of their tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scripts.distillation.acceptance import Acceptance, measure
from scripts.distillation.language_model import Imitation
from scripts.distillation.samples import Order, Sample
from scripts.distillation.sampling import answer
from scripts.distillation.settings import Settings


@dataclass(frozen=True)
class Sampling:
    """How the target's answers are drawn."""

    most_tokens: int = 96  # of an answer
    temperature: float = 1.0
    pool: int = 1024  # prompts that are answered at a time
    passes: int = 4  # over the answers of a pool, before others are drawn
    tokens_at_once: int = 8192
    speculation_length: int = 8  # that acceptance is reported for


class OnPolicy:
    """Learn from the target's samples, drawn as they are needed, and report the acceptance on held-out prompts."""

    def __init__(
        self,
        target: PreTrainedModel,
        prompts: Sequence[list[int]],
        held_out: Sequence[list[int]],
        settings: Settings,
        sampling: Sampling,
        dtype: torch.dtype,
    ) -> None:
        self._target, self._prompts, self._settings, self._sampling = target, prompts, settings, sampling
        greedy = answer(target, held_out, sampling.most_tokens, 0.0, 0, sampling.tokens_at_once)
        self._imitation = Imitation(target, [], greedy, settings, None, dtype)
        self._steps_a_pool = max(1, min(sampling.pool, len(prompts)) * sampling.passes // settings.rows)
        self._number = -1
        self._pool: list[Sample] = []
        self._order: Order | None = None

    def loss(self, student: nn.Module, step: int) -> Tensor:
        """Return the loss on answers of the pool that this step belongs to."""
        number, place = divmod(step, self._steps_a_pool)
        if number != self._number:
            self._draw(number)
        assert self._order is not None
        return self._imitation.loss_of(student, [self._pool[index] for index in self._order.at(place)])

    def _draw(self, number: int) -> None:
        """Answer the prompts of a pool, seeded with its number: a run taken up again draws the same."""
        sampling, seed = self._sampling, self._settings.seed * 1_000_003 + number
        self._pool = [
            sample
            for sample in answer(
                self._target, self._chosen(number), sampling.most_tokens, sampling.temperature, seed,
                sampling.tokens_at_once,
            )
            if len(sample.tokens) > max(sample.given, 1)
        ]  # fmt: skip
        self._order = Order(self._pool, self._settings.rows, self._settings.length, seed)
        self._number = number

    def _chosen(self, number: int) -> list[list[int]]:
        """Return the prompts of a pool: all are asked before any is asked again."""
        pool, count = min(self._sampling.pool, len(self._prompts)), len(self._prompts)
        epoch, place = divmod(number, count // pool)
        generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)[place * pool : (place + 1) * pool]
        return [self._prompts[index] for index in order.tolist()]

    def held_out(self, student: nn.Module) -> dict[str, float]:
        """Return `loss` (KL, nats a token), and what speculation with the student would bring."""
        loss, accepted = self.measure(student)
        return {
            "loss": loss,
            "acceptance_rate": accepted.rate,
            "tokens_per_round": accepted.tokens_per_round,
            "tokens_per_round_bound": accepted.bound,
            "overlap": accepted.overlap,
        }

    def measure(self, student: nn.Module) -> tuple[float, Acceptance]:
        """Return the KL divergence and the acceptance on what the target greedily answers to the held-out prompts."""
        agreed, overlaps, answers, kl = [], [], [], []
        first = 0
        for wanted, own, labels, rows in self._imitation.compared(student):
            agreed.append((own.argmax(-1) == labels).cpu())
            overlaps.append(torch.minimum(wanted.exp(), own.exp()).sum(-1).cpu())
            kl.append((wanted.exp() * (wanted - own)).sum(-1).cpu())
            answers.append(rows.cpu() + first)
            first = int(answers[-1][-1]) + 1
        length = self._sampling.speculation_length
        accepted = measure(torch.cat(agreed), torch.cat(overlaps), torch.cat(answers), length)
        return torch.cat(kl).mean().item(), accepted
