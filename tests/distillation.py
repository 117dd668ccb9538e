"""Small teachers and texts for tests of distillation."""

import json
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from tests import language_models

WORDS = ("red", "blue", "small", "large", "cat", "dog", "bird", "house", "tree", "runs", "sleeps", "sings", "near")


def save_encoder(folder: Path, layers: int = 4, width: int = 32) -> BertModel:
    """Store a random sentence encoder with its tokenizer as a Hugging Face folder, and return it."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=language_models.VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
    )
    model = BertModel(config).eval()
    model.save_pretrained(folder)
    language_models.tokenizer().save_pretrained(folder)
    return model


def save_texts(path: Path, count: int = 120, prompts: bool = False) -> Path:
    """Store `count` different texts of a few words, or prompts, and return `path`."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 7))) for _ in range(count)]
    if path.suffix == ".jsonl":
        lines = [json.dumps({"prompt" if prompts else "text": text}) for text in texts]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        path.write_text("\n\n".join(texts), encoding="utf-8")
    return path
