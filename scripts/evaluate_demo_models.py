"""How good the shipped pair is: right answers on trained and unseen phrasings, and how often drafts are accepted.

    python -m scripts.evaluate_demo_models [--facts 300]

The questions are about documented objects of the running interpreter's standard library, drawn with a fixed seed. The
models were trained on Python 3.11's docstrings: on another version, objects whose docstrings differ count as wrong.
The last line of output is JSON.
"""

import argparse
import json
import queue
import sys

from scripts.demo_models.corpus import collect_facts
from scripts.demo_models.questions import Question, sample_questions
from scripts.serving.installation import MODEL_REPOSITORY, PYTHON_BACKENDS

sys.path.append(str(PYTHON_BACKENDS))

from speculative_decoding.drafter import ModelDrafter
from speculative_decoding.engine import Engine
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.options import GenerationOptions
from speculative_decoding.sequence import Sequence
from speculative_decoding.tokenizer import Tokenizer

PAIR = MODEL_REPOSITORY / "language_model" / "1"
SLOTS = 8
SPECULATION_LENGTH = 8


def answer(engine: Engine, tokenizer: Tokenizer, questions: list[Question]) -> list[Sequence]:
    """Decode an answer to each question, SLOTS at a time."""
    finished: queue.SimpleQueue[Sequence] = queue.SimpleQueue()
    sequences = [
        Sequence(
            tokenizer.encode_prompt(question.prompt),
            GenerationOptions(),
            lambda sequence, _, reason: finished.put(sequence) if reason else None,
        )
        for question in questions
    ]
    for sequence in sequences:
        engine.submit(sequence)
    for _ in sequences:
        finished.get()
    return sequences


def evaluate(count: int) -> dict[str, float]:
    """Return the share of answers that begin with the documented summary, and what was accepted of the drafts."""
    tokenizer = Tokenizer(PAIR / "target", "chat")
    target = LanguageModel(PAIR / "target", SLOTS, threads=0, spinning=True)
    draft = ModelDrafter(LanguageModel(PAIR / "draft", SLOTS, threads=1, spinning=False))
    engine = Engine(target, draft, SPECULATION_LENGTH, max_waiting=count)
    facts = collect_facts()
    figures: dict[str, float] = {"facts": len(facts), "asked": count}
    for phrasings in ("trained", "unseen"):
        questions = sample_questions(facts, count, unseen=phrasings == "unseen", seed=4)
        answers = answer(engine, tokenizer, questions)
        texts = [tokenizer.decode(sequence.tokens[len(sequence.prompt) :]) for sequence in answers]
        right = sum(text.startswith(question.answer) for text, question in zip(texts, questions, strict=True))
        drafted, accepted = (sum(getattr(sequence, name) for sequence in answers) for name in ("drafted", "accepted"))
        figures[f"right_on_{phrasings}_phrasings"] = round(right / count, 4)
        figures[f"acceptance_rate_on_{phrasings}_phrasings"] = round(accepted / drafted, 4)
    engine.stop()
    return figures


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=300, help="how many objects to ask about")
    print(json.dumps(evaluate(parser.parse_args().facts)))


if __name__ == "__main__":
    main()
