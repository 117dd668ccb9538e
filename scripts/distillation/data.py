"""Texts as samples for a model: tokenized, cut to length, and split into what is learned from and what is held out."""

import random
from collections.abc import Sequence
from typing import TypeVar

from transformers import AutoTokenizer

from scripts.distillation.errors import DistillationError
from scripts.distillation.model_folder import ModelFolder
from scripts.distillation.samples import Sample
from scripts.distillation.texts import Text

HELD_OUT_SHARE, MOST_HELD_OUT = 0.05, 500
Item = TypeVar("Item")


def split(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """Return what is learned from and what is held out. Raises DistillationError when there are fewer than two."""
    if len(items) < 2:
        raise DistillationError("there is one text only: learning takes at least two, of which one is held out")
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    held_out = min(MOST_HELD_OUT, max(1, int(len(items) * HELD_OUT_SHARE)))
    return [items[index] for index in order[held_out:]], [items[index] for index in order[:held_out]]


def sentences(texts: Sequence[Text], model: ModelFolder, length: int) -> list[Sample]:
    """Return each text as an encoder reads it, its first `length` tokens."""
    read = [text.text or text.prompt or "" for text in texts]
    encoded = model.tokenizer.encode_batch([text for text in read if text])
    samples = []
    for encoding in encoded:
        encoding.truncate(length)
        samples.append(Sample(encoding.ids))
    return _some(samples, model)


def passages(texts: Sequence[Text], model: ModelFolder, length: int) -> list[Sample]:
    """Return texts for a language model: plain ones in pieces of `length` tokens, completions after their prompts."""
    samples = []
    for text in texts:
        if text.prompt is None:
            tokens = model.tokenizer.encode(text.text).ids
            pieces = [tokens[begin : begin + length] for begin in range(0, len(tokens), length)]
            samples += [Sample(piece) for piece in pieces if len(piece) > 1]
            continue
        if not text.text:
            raise DistillationError("a prompt without a completion is for --on-policy, where the teacher completes it")
        prompt = prompt_tokens([text], model)[0]
        tokens = [*prompt, *model.tokenizer.encode(text.text, add_special_tokens=False).ids, *_end(model)]
        if len(tokens) <= length:
            samples.append(Sample(tokens, len(prompt)))
    return _some(samples, model)


def prompt_tokens(texts: Sequence[Text], model: ModelFolder, most: int | None = None) -> list[list[int]]:
    """Return each prompt's tokens, by the chat template where the model has one; plain texts are prompts too.

    Prompts of more than `most` tokens are left out.
    """
    prompts = [text.text if text.prompt is None else text.prompt for text in texts]
    tokenizer = AutoTokenizer.from_pretrained(model.folder, local_files_only=True)
    if tokenizer.chat_template:
        rendered = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        encoded = model.tokenizer.encode_batch(rendered, add_special_tokens=False)
    else:
        encoded = model.tokenizer.encode_batch(prompts)
    kept = [encoding.ids for encoding in encoded if encoding.ids and (most is None or len(encoding.ids) <= most)]
    if not kept:
        raise DistillationError(f"no prompt has from 1 to {most} tokens")
    return kept


def _end(model: ModelFolder) -> list[int]:
    end = model.model.config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else [end[0]]


def _some(samples: list[Sample], model: ModelFolder) -> list[Sample]:
    if not samples:
        raise DistillationError("no text is left to learn from: completions that do not fit into --length are left out")
    size = model.model.config.vocab_size
    if max(max(sample.tokens) for sample in samples) >= size:
        raise DistillationError(f"{model.folder}: the tokenizer gives tokens beyond the model's vocabulary of {size}")
    return samples
