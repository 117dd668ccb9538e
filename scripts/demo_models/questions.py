"""Questions to train on and to measure with."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.demo_models.corpus import Fact
from scripts.demo_models.phrasings import OFF_TOPIC_ANSWER, off_topic_question, trained_question, unseen_question

OFF_TOPIC_SHARE = 0.03


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that is right for it."""

    prompt: str
    answer: str


def trained_questions(facts: Sequence[Fact], count: int, seed: int) -> list[Question]:
    """Return `count` questions in trained phrasings, each fact equally often, a few of them off topic."""
    rng = random.Random(seed)
    words = _words(facts)
    questions = []
    for index in range(count):
        if rng.random() < OFF_TOPIC_SHARE:
            questions.append(Question(off_topic_question(words, rng), OFF_TOPIC_ANSWER))
        else:
            fact = facts[index % len(facts)]
            questions.append(Question(trained_question(fact, words, rng), fact.answer))
    rng.shuffle(questions)
    return questions


def sample_questions(facts: Sequence[Fact], count: int, unseen: bool, seed: int) -> list[Question]:
    """Return questions about `count` facts drawn at random, in trained or in unseen phrasings."""
    rng = random.Random(seed)
    words = _words(facts)
    chosen = rng.sample(list(facts), count)
    return [
        Question(unseen_question(fact, rng) if unseen else trained_question(fact, words, rng), fact.summary)
        for fact in chosen
    ]


def _words(facts: Sequence[Fact]) -> list[str]:
    return sorted({word for fact in facts for word in fact.summary.split()})
