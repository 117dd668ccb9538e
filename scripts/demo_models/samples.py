"""Training samples: tokenized questions and answers, held in memory as rectangular arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from scripts.demo_models.questions import Question
from scripts.demo_models.tokenizer import ASSISTANT, END, PAD, USER

ROW = 96  # tokens; 997 of 1,000 samples fit
CHAT_ROW = 512
IGNORED = -100


class Rows(NamedTuple):
    """Rows for next-token training, int16 [rows, width]: `labels` equal `tokens` in answers and IGNORED elsewhere."""

    tokens: np.ndarray
    labels: np.ndarray


def _encode(tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> list[tuple[list[int], list[int]]]:
    """Return (prompt tokens, answer tokens) of each question, in the chat format."""
    tokenizer.backend_tokenizer.no_padding()  # a padded call leaves padding switched on
    encode = tokenizer.backend_tokenizer.encode_batch
    prompts = encode([f"{USER}{question.prompt}{END}{ASSISTANT}" for question in questions])
    answers = encode([f"{question.answer}{END}" for question in questions])
    return [(prompt.ids, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]


def _fill(turns_per_row: Sequence[Sequence[tuple[list[int], list[int]]]], width: int, pad: int) -> Rows:
    tokens = np.full((len(turns_per_row), width), pad, np.int16)
    labels = np.full((len(turns_per_row), width), IGNORED, np.int16)
    for row, turns in enumerate(turns_per_row):
        position = 0
        for prompt, answer in turns:
            text = (prompt + answer)[: width - position]
            tokens[row, position : position + len(text)] = text
            begin = min(position + len(prompt), width)
            position += len(text)
            labels[row, begin:position] = tokens[row, begin:position]
    return Rows(tokens, labels)


def single_turns(tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> Rows:
    """One question and answer a row, ROW tokens wide."""
    pad = tokenizer.convert_tokens_to_ids(PAD)
    return _fill([[turn] for turn in _encode(tokenizer, questions)], ROW, pad)


def chats(tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> Rows:
    """Several questions and answers a row, CHAT_ROW tokens wide, so that a model knows conversations too."""
    rows: list[list[tuple[list[int], list[int]]]] = [[]]
    length = 0
    for turn in _encode(tokenizer, questions):
        if length >= CHAT_ROW:
            rows.append([])
            length = 0
        rows[-1].append(turn)
        length += len(turn[0]) + len(turn[1])
    return _fill(rows, CHAT_ROW, tokenizer.convert_tokens_to_ids(PAD))
