"""What the demo target is asked, so that the draft can learn what it answers."""

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from scripts.demo_models.corpus import Fact
from scripts.demo_models.questions import Question, sample_questions, trained_questions
from scripts.demo_models.tokenizer import ASSISTANT, END, USER

CHATS = 0.02  # of the prompts, and so about an eighth of their tokens
MOST_TURNS = 6
MOST_TOKENS = 400  # of a prompt: the answer must fit too


def trained(tokenizer: PreTrainedTokenizerFast, facts: Sequence[Fact], count: int) -> list[list[int]]:
    """Return the tokens of `count` prompts in trained phrasings, some of them at the end of a chat."""
    questions = trained_questions(facts, count, seed=1)
    rng = random.Random(1)
    texts = []
    for question in questions:
        turns = rng.choices(questions, k=rng.randint(1, MOST_TURNS)) if rng.random() < CHATS else []
        texts.append("".join(_turn(turn) for turn in turns) + _ask(question.prompt))
    return [prompt for prompt in _encode(tokenizer, texts) if len(prompt) <= MOST_TOKENS]


def unseen(tokenizer: PreTrainedTokenizerFast, facts: Sequence[Fact], count: int) -> list[list[int]]:
    """Return the tokens of `count` prompts in phrasings that no model is trained on."""
    questions = sample_questions(facts, count, unseen=True, seed=3)
    return _encode(tokenizer, [_ask(question.prompt) for question in questions])


def _ask(prompt: str) -> str:
    return f"{USER}{prompt}{END}{ASSISTANT}"


def _turn(question: Question) -> str:
    return f"{_ask(question.prompt)}{question.answer}{END}"


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    tokenizer.backend_tokenizer.no_padding()  # a padded call leaves padding switched on
    return [encoded.ids for encoded in tokenizer.backend_tokenizer.encode_batch(texts)]
