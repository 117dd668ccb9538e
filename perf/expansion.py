"""The demo target as a transformers model, and made larger without changing what it computes.

A model that fits in a CPU's caches hides what speculation is for. The expanded target has more feed-forward units and
more layers, whose output projections are zero, so that they add nothing, and whose other weights are random: it costs
what a large model costs and answers what the demo target answers.
"""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.quantization.dequantize import dequantize_rows

LAYERS, FEED_FORWARD = 30, 8192  # 0.4 billion parameters
SPREAD = 0.005  # of random weights: units smaller than the real ones leave the INT8 scales of a row as they are


def demo_target(folder: Path) -> LlamaForCausalLM:
    """Return the Llama model in `folder` (ONNX Runtime GenAI's layout, row-wise INT8) with its weights in fp32."""
    described = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    decoder = described["decoder"]
    graph = dequantize_rows(onnx.load(folder / "model.onnx")).graph
    weights = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    config = LlamaConfig(
        vocab_size=described["vocab_size"],
        hidden_size=decoder["hidden_size"],
        intermediate_size=weights["model.layers.0.mlp.gate_proj.MatMul.weight"].shape[1],
        num_hidden_layers=decoder["num_hidden_layers"],
        num_attention_heads=decoder["num_attention_heads"],
        num_key_value_heads=decoder["num_key_value_heads"],
        head_dim=decoder["head_size"],
        max_position_embeddings=described["context_length"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=described["eos_token_id"],
        pad_token_id=described["pad_token_id"],
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(_state(weights, config), strict=False)
    model.tie_weights()
    return model


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


def _state(weights: dict[str, torch.Tensor], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Return transformers' names and shapes for ONNX Runtime GenAI's: matrices transposed, q, k and v apart."""
    heads, size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    state = {"model.embed_tokens.weight": weights["lm_head.MatMul.weight"]}
    for name, values in weights.items():
        if match := re.fullmatch(r"(model\.layers\.\d+)\.attn\.qkv_proj\.MatMul\.weight", name):
            parts = np.split(values.numpy().T, [heads, heads + size])
            for part, matrix in zip("qkv", parts, strict=True):
                state[f"{match[1]}.self_attn.{part}_proj.weight"] = torch.from_numpy(matrix.copy())
        elif match := re.fullmatch(r"(model\.layers\.\d+)\.attn\.o_proj\.MatMul\.weight", name):
            state[f"{match[1]}.self_attn.o_proj.weight"] = values.T
        elif match := re.fullmatch(r"(model\.layers\.\d+\.mlp\.\w+_proj)\.MatMul\.weight", name):
            state[f"{match[1]}.weight"] = values.T
        elif name.endswith("final_norm_layernorm.weight"):
            state["model.norm.weight"] = values
        elif name.endswith("_layernorm.weight"):
            state[name] = values
    return state
