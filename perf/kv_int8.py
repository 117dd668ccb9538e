"""What INT8 blocks buy, and what they cost: tokens held in a budget, and perplexity of the shipped target's answers."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "python_backends"))

from speculative_decoding.kv_cache import KVCache
from speculative_decoding.kv_layout import BlockLayout, KeyValueShape, SlotMemory, dequantize, quantize
from speculative_decoding.kv_memory import KVCacheSettings
from speculative_decoding.language_model import LanguageModel, Logits
from speculative_decoding.messages import Message
from speculative_decoding.tokenizer import Tokenizer

from scripts.demo_models.corpus import collect_facts
from scripts.demo_models.questions import Question, sample_questions
from scripts.serving.installation import MODEL_REPOSITORY

TARGET = MODEL_REPOSITORY / "language_model" / "1" / "target"
TURNS = 4  # of a conversation whose last answer is scored
BLOCK = 16


def capacity_ratio(shape: KeyValueShape, budget: int) -> float:
    """Return how many times the tokens of fp32 blocks a cache of INT8 blocks holds within `budget` bytes."""
    return _capacity(shape, budget, int8=True) / _capacity(shape, budget, int8=False)


def perplexity_ratio(conversations: int) -> float:
    """Return the perplexity of documented answers after a conversation in INT8 blocks over that after one in fp32."""
    model, tokenizer = LanguageModel(TARGET, 1, threads=0, spinning=True), Tokenizer(TARGET, "chat")
    questions = sample_questions(collect_facts(), conversations * TURNS, unseen=False, seed=6)
    exact = quantized = 0.0
    tokens = 0
    for begin in range(0, len(questions), TURNS):
        turns = questions[begin : begin + TURNS]
        prompt, answer = _tokens(tokenizer, turns)
        exact += _surprise(model, prompt, answer, int8=False)
        quantized += _surprise(model, prompt, answer, int8=True)
        tokens += len(answer)
    return math.exp((quantized - exact) / tokens)


def _capacity(shape: KeyValueShape, budget: int, int8: bool) -> int:
    cache = KVCache(BlockLayout(shape, block_tokens=BLOCK), KVCacheSettings(budget, int8))
    slot = np.ones((shape.planes, shape.kv_heads, BLOCK, shape.head_size), np.float32)
    number = 0
    while not cache.snapshot().counters.blocks_evicted:
        cache.insert("", [number] * BLOCK, slot)
        number += 1
    return cache.snapshot().blocks * BLOCK


def _tokens(tokenizer: Tokenizer, turns: Sequence[Question]) -> tuple[list[int], list[int]]:
    """Return the tokens of a conversation up to its last answer, and those of that answer."""
    *earlier, last = turns
    said = [
        message for turn in earlier for message in (Message("user", turn.prompt), Message("assistant", turn.answer))
    ]
    return tokenizer.encode_messages([*said, Message("user", last.prompt)]), tokenizer.encode(last.answer)


def _surprise(model: LanguageModel, prompt: list[int], answer: list[int], int8: bool) -> float:
    """Return the negative log-likelihood of an answer, after the prompt's whole blocks were in INT8 or not."""
    model.truncate(0, 0)
    _feed(model, prompt[:-1])
    if int8:
        _round_blocks(model.slot(0), (len(prompt) - 1) // BLOCK)
    logits = _feed(model, [prompt[-1], *answer[:-1]]).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    likelihoods = logits[range(len(answer)), answer] - np.log(np.exp(logits).sum(-1))
    return -float(likelihoods.sum())


def _feed(model: LanguageModel, tokens: list[int]) -> Logits:
    return model.forward(0, np.array([tokens], np.int64), np.array([len(tokens)], np.int32))[0]


def _round_blocks(slot: SlotMemory, blocks: int) -> None:
    """Replace keys and values of a slot's first blocks by what is left of them in INT8."""
    codes = np.empty((*slot.shape[:2], BLOCK, slot.shape[3]), np.int8)
    scales = np.empty(slot.shape[:2], np.float32)
    for number in range(blocks):
        block = slot[:, :, number * BLOCK : (number + 1) * BLOCK]
        quantize(block, codes, scales)
        dequantize(codes, scales, block)
