"""The demo target made larger without changing what it computes.

A model that fits in a CPU's caches hides what speculation is for. The expanded target has more feed-forward units and
more layers, whose output projections are zero, so that they add nothing, and whose other weights are random: it costs
what a large model costs and answers what the demo target answers.
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, FEED_FORWARD = 30, 8192  # 0.4 billion parameters
SPREAD = 0.005  # of random weights: units smaller than the real ones leave the INT8 scales of a row as they are


def expanded(model: LlamaForCausalLM, layers: int = LAYERS, feed_forward: int = FEED_FORWARD) -> LlamaForCausalLM:
    """Return a larger model that gives the same logits as `model`."""
    config = LlamaConfig(**model.config.to_dict() | {"num_hidden_layers": layers, "intermediate_size": feed_forward})
    torch.manual_seed(0)
    larger = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            _fill(name, parameter, model.state_dict().get(name))
    larger.tie_weights()
    return larger


def _fill(name: str, parameter: nn.Parameter, known: torch.Tensor | None) -> None:
    """Set a parameter: random, zero where it would be heard, and the known weights in the first rows and columns."""
    if parameter.dim() == 1:
        parameter.fill_(1)
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        parameter.zero_()
    else:
        parameter.normal_(0, SPREAD)
    if known is not None:
        parameter[tuple(slice(size) for size in known.shape)] = known
