"""The pair model in torch, to be trained: low-rank changes to a sentence encoder, and a head (LoRA, Hu et al. 2021)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

ADAPTED = ("query", "key", "value", "dense")
SECOND_TYPE = 0.02  # how far the second prompt's type begins from the first's, which is all that the encoder has seen
MULTIPLE = 8  # lengths of batches are a multiple of it


class LowRank(nn.Linear):
    """A dense layer whose matrix stays as it is, plus what is learned: W + up @ down."""

    def __init__(self, dense: nn.Linear, rank: int) -> None:
        super().__init__(dense.in_features, dense.out_features)
        self.weight, self.bias = dense.weight, dense.bias
        self.down = nn.Parameter(torch.randn(rank, dense.in_features) / math.sqrt(dense.in_features))
        self.up = nn.Parameter(torch.zeros(dense.out_features, rank))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + functional.linear(functional.linear(input, self.down), self.up)


class PairNetwork(nn.Module):
    """[CLS] first [SEP] second [SEP] to a logit: above 0 where they are rather the same request.

    The head compares the means over both texts' tokens, each of which has looked at the other text.
    """

    def __init__(self, encoder: Path, rank: int) -> None:
        super().__init__()
        config = BertConfig.from_dict(json.loads((encoder / "config.json").read_text(encoding="utf-8")))
        self.bert = BertModel(config, add_pooling_layer=False)
        weights = {name: value.float() for name, value in load_file(encoder / "model.safetensors").items()}
        self.bert.load_state_dict({name: weights[name] for name in self.bert.state_dict() if name in weights}, False)
        width = config.hidden_size
        self.dense, self.out = nn.Linear(4 * width, width), nn.Linear(width, 1)
        self._tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(config.max_position_embeddings)
        self._prepare(rank)

    def _prepare(self, rank: int) -> None:
        for name, parameter in self.bert.named_parameters():
            parameter.requires_grad = "LayerNorm" in name or name.endswith(".bias") or "token_type" in name
        types = self.bert.embeddings.token_type_embeddings.weight
        with torch.no_grad():
            types[1] = types[0] + SECOND_TYPE * torch.randn_like(types[0])
        for module in list(self.bert.encoder.modules()):
            for name, child in list(module.named_children()):
                if name in ADAPTED and isinstance(child, nn.Linear):
                    setattr(module, name, LowRank(child, rank))

    def trained(self) -> list[nn.Parameter]:
        """Return what is learned."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def forward(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """Return the logits [pairs]."""
        tokens, mask, types = self._tokens(pairs)
        hidden = self.bert(input_ids=tokens, attention_mask=mask, token_type_ids=types).last_hidden_state
        first, second = (_mean(hidden, mask * kind) for kind in (1 - types, types))
        compared = torch.cat([hidden[:, 0], first * second, (first - second).abs(), first + second], -1)
        logits: Tensor = self.out(functional.gelu(self.dense(compared))).squeeze(-1)
        return logits

    def _tokens(self, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
        encodings = self._tokenizer.encode_batch(list(pairs))
        length = -(-max(len(encoding.ids) for encoding in encodings) // MULTIPLE) * MULTIPLE
        for encoding in encodings:
            encoding.pad(length)
        rows = [[getattr(encoding, name) for encoding in encodings] for name in ("ids", "attention_mask", "type_ids")]
        ids, mask, types = (torch.tensor(row, device=self.out.weight.device) for row in rows)
        return ids, mask, types

    def save(self, path: Path) -> None:
        """Write what was learned, in fp16, as graph.pair_model reads it."""
        learned = {
            name.removeprefix("bert."): parameter.detach().half().cpu().contiguous()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }
        save_file(learned, path)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
