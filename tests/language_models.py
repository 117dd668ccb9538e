"""Small language models for tests of the exporter and of the decoding engine."""

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import tokenizers
import torch
from onnx import numpy_helper
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

Architecture = Literal["llama", "qwen2", "qwen3"]

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
VOCABULARY, CONTEXT, END = 512, 160, 4
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer(*extra: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of a few tokens, and of the special tokens `extra`."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "<unk>", "<sep>", "</s>", *extra]
    made.train_from_iterator([], tokenizers.trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def save_random(
    folder: Path, architecture: Architecture, tied: bool, context: int = CONTEXT, seed: int = 0
) -> PreTrainedModel:
    """Store a random model with its tokenizer as a Hugging Face folder, and return it.

    Biases and norms are random too, and weights are large enough for attention to matter in the logits.
    """
    torch.manual_seed(seed)
    config = CONFIGS[architecture](
        **SHAPE,
        vocab_size=VOCABULARY,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
        **({"head_dim": 16} if architecture != "qwen2" else {}),
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def perturb(folder: Path, into: Path, noise: float, seed: int = 0) -> Path:
    """Store a copy of an exported model whose weights are off by `noise` standard deviations: a draft half right."""
    rng = np.random.default_rng(seed)
    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if weights.ndim == 2 and weights.dtype in (np.float32, np.int8) and "cache" not in tensor.name:
            noisy = weights + noise * weights.std() * rng.standard_normal(weights.shape)
            if weights.dtype == np.int8:
                noisy = np.rint(noisy).clip(-127, 127)
            tensor.CopyFrom(numpy_helper.from_array(noisy.astype(weights.dtype), tensor.name))
    into.mkdir(parents=True)
    onnx.save(model, into / "model.onnx")
    for file in folder.iterdir():
        if file.name != "model.onnx":
            (into / file.name).write_bytes(file.read_bytes())
    return into
