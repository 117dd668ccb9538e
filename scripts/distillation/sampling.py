"""What a language model itself says to prompts."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scripts.distillation.samples import Sample, by_length


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    most: int,
    temperature: float,
    seed: int,
    tokens_at_once: int,
) -> list[Sample]:
    """Return each prompt with the model's answer of at most `most` tokens, in the order of the prompts.

    temperature 0 is greedy. tokens_at_once bounds the prompts' and answers' tokens that are decoded together. The same
    arguments give the same answers on the same machine.
    """
    answers: dict[int, Sample] = {}
    lengths = [len(prompt) + most for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: lengths[index])
    batches = by_length(lengths, order, max(1, tokens_at_once // min(lengths)), tokens_at_once)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for batch in batches:
            texts = _decode(model, [prompts[index] for index in batch], most, temperature)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = Sample(prompts[index] + text, len(prompts[index]))
    return [answers[index] for index in range(len(prompts))]


def _decode(model: PreTrainedModel, prompts: list[list[int]], most: int, temperature: float) -> list[list[int]]:
    ends = end_tokens(model)
    pad = padding(model)
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    output: Tensor = model.generate(
        input_ids=tokens.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=most,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        **({"do_sample": False} | sampling),
    )
    return [_cut(row, ends) for row in output[:, width:].tolist()]


def _cut(tokens: list[int], ends: set[int]) -> list[int]:
    """Return the answer up to its end token, which belongs to it."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Return the tokens that end an answer."""
    ends = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def padding(model: PreTrainedModel) -> int:
    """Return a token to pad with; it is masked, so any will do."""
    pad = model.config.pad_token_id
    return 0 if pad is None else int(pad)
