"""Causal language models: the student learns the teacher's distribution of next tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from scripts.distillation import losses, precision
from scripts.distillation.kept import Kept
from scripts.distillation.samples import Batch, Order, Sample, by_length, collate
from scripts.distillation.sampling import padding
from scripts.distillation.settings import Settings


class Reading(NamedTuple):
    """What a model makes of a batch: logits [learned tokens, vocabulary], and the hidden states [same, width]."""

    logits: Tensor
    hidden: list[Tensor]


class Imitation:
    """Learn from texts: KL on the teacher's distribution, cross-entropy, and the direction of hidden states.

    Hidden states are compared where the student's layers and channels are known to be the teacher's (`kept`).
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        samples: Sequence[Sample],
        held_out: Sequence[Sample],
        settings: Settings,
        kept: Kept | None,
        dtype: torch.dtype,
    ) -> None:
        self.teacher, self.settings, self._kept, self._dtype = teacher, settings, kept, dtype
        self._device, self._pad = teacher.device, padding(teacher)
        self._samples = samples
        self._order = Order(samples, settings.rows, settings.length, settings.seed) if samples else None
        lengths = [len(sample.tokens) for sample in held_out]
        batches = by_length(lengths, range(len(held_out)), settings.rows, settings.rows * settings.length)
        self._held_out = [[held_out[index] for index in batch] for batch in batches]

    def loss(self, student: nn.Module, step: int) -> Tensor:
        """Return the weighted losses of a step's texts."""
        assert self._order is not None
        return self.loss_of(student, [self._samples[index] for index in self._order.at(step)])

    def loss_of(self, student: nn.Module, samples: Sequence[Sample]) -> Tensor:
        """Return the weighted losses of `samples`."""
        batch, weights = collate(samples, self._pad, self._device), self.settings.weights
        with precision.autocast(self._device, self._dtype):
            with torch.no_grad():
                wanted = self._read(self.teacher, batch, weights.hidden > 0)
            own = self._read(student, batch, weights.hidden > 0)
        total = weights.kl * losses.divergence(own.logits, wanted.logits, self.settings.temperature)
        total = total + weights.ce * functional.cross_entropy(own.logits.float(), batch.labels[:, 1:][batch.chosen])
        if own.hidden and self._kept is not None:
            total = total + weights.hidden * self._directions(own.hidden, wanted.hidden, self._kept)
        return total

    @staticmethod
    def _directions(own: list[Tensor], wanted: list[Tensor], kept: Kept) -> Tensor:
        pairs = zip(own[1:], kept.layers, strict=True)  # the first hidden states are the embeddings
        each = [losses.direction(hidden, wanted[layer + 1][:, kept.channels]) for hidden, layer in pairs]
        return torch.stack(each).mean()

    def _read(self, model: nn.Module, batch: Batch, hidden: bool) -> Reading:
        chosen = batch.chosen
        first = int(chosen.any(0).int().argmax())  # of the positions that anything is learned from
        output = model(
            input_ids=batch.tokens,
            attention_mask=batch.mask,
            use_cache=False,
            output_hidden_states=hidden and self._kept is not None,
            logits_to_keep=batch.tokens.shape[1] - first,
        )
        states = [state[:, :-1][chosen] for state in output.hidden_states] if output.hidden_states else []
        return Reading(output.logits[:, :-1][chosen[:, first:]], states)

    def compared(self, student: nn.Module) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return for each held-out batch: the teacher's and the student's log probabilities [tokens, vocabulary], the
        tokens' labels, and the row of the batch that each belongs to."""
        read = []
        for samples in self._held_out:
            batch = collate(samples, self._pad, self._device)
            with precision.autocast(self._device, self._dtype):
                wanted, own = (self._read(model, batch, False).logits for model in (self.teacher, student))
            rows = batch.chosen.nonzero()[:, 0]
            both = (functional.log_softmax(logits.float(), -1) for logits in (wanted, own))
            read.append((*both, batch.labels[:, 1:][batch.chosen], rows))
        return read  # type: ignore[return-value]

    def held_out(self, student: nn.Module) -> dict[str, float]:
        """Return `loss`, the KL divergence in nats a token; perplexities of both; and how often their choices agree."""
        sums = torch.zeros(4)
        count = 0
        for wanted, own, labels, _ in self.compared(student):
            count += len(labels)
            sums += torch.stack(
                [
                    functional.kl_div(own, wanted, reduction="sum", log_target=True),
                    functional.nll_loss(own, labels, reduction="sum"),
                    functional.nll_loss(wanted, labels, reduction="sum"),
                    (own.argmax(-1) == wanted.argmax(-1)).sum(),
                ]
            ).cpu()
        kl, own_nll, teacher_nll, agreed = (sums / count).tolist()
        perplexity, teacher_perplexity = torch.tensor([own_nll, teacher_nll]).exp().tolist()
        return {
            "loss": kl,
            "perplexity": perplexity,
            "teacher_perplexity": teacher_perplexity,
            "agreement": agreed,
        }
