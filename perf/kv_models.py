"""A Llama of random weights: what a prompt costs does not depend on what a model has learned."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "python_backends"))

from speculative_decoding.language_model import LanguageModel

from scripts.export_model import export_model
from tests.language_models import tokenizer


@dataclass(frozen=True)
class Size:
    """A Llama's dimensions."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    context: int


TENTH_OF_A_BILLION = Size(768, 12, 12, 4, 2048, 16384, 4096)  # 100 million parameters


def export_random_llama(size: Size, folder: Path) -> None:
    """Export a random model to `folder`, in ONNX Runtime GenAI's layout and row-wise INT8."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=4,
        pad_token_id=0,
    )
    with tempfile.TemporaryDirectory() as source:
        LlamaForCausalLM(config).save_pretrained(source)
        tokenizer().save_pretrained(source)
        export_model(Path(source), folder, "row-int8")


def load(folder: Path, slots: int) -> LanguageModel:
    """Load an exported model as the backend does."""
    return LanguageModel(folder, slots, threads=0, spinning=True)
