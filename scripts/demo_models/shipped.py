"""The shipped models as transformers models, in fp32: what their INT8 weights stand for."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.quantization.dequantize import dequantize_rows
from scripts.serving.installation import MODEL_REPOSITORY

TARGET = MODEL_REPOSITORY / "language_model" / "1" / "target"


def load(folder: Path) -> LlamaForCausalLM:
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


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a model of this tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TARGET / name, folder)


def save_target(folder: Path) -> None:
    """Write the target as a Hugging Face folder."""
    save(load(TARGET), folder)


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
