"""Words and pair model together: what words rule out is not asked, and what they leave open the model decides."""

import pytest
from semantic_cache.verifier.pair_verifier import AGREED, MOST_ASKED, REFUSED, PairVerifier
from semantic_cache.verifier.slips import Slips
from semantic_cache.verifier.verifier import MOST_CHARACTERS, Verifier

from perf.prompt_pairs import make_verifier

PROMPT = "How do I delete a folder?"


class Score:
    """Stands in for the pair model, and counts what it is asked."""

    def __init__(self, logit: float | None) -> None:
        self.logit = logit
        self.asked: list[str] = []

    def __call__(self, first: str, second: str) -> float | None:
        self.asked.append(second)
        return self.logit


def judge(score: Score, *stored: str) -> list[str | None]:
    verifier = PairVerifier(Verifier.load(), score, "pair_model:1", Slips({"delete", "folder"}))
    return [verdict.refusal for verdict in verifier.verdicts(PROMPT, [(text, 0.9) for text in stored])]


def test_what_words_say_sets_how_sure_the_model_must_be() -> None:
    for stored, refusal, least in (
        ("How can I remove a directory?", "unlike", AGREED),
        ("How do I find a folder?", "exchange", REFUSED),
        ("How do I delete 2 folders?", "number", REFUSED),
    ):
        assert judge(Score(least), stored) == [None]
        assert judge(Score(least - 0.1), stored) == [refusal]


@pytest.mark.parametrize(
    "stored",
    [
        "how do i delete a folder",
        "Hi there! How do I delete a folder?",
        "Can you help me? How do I delete a folder, please",
        "How do I dleete a foldder?",
    ],
)
def test_the_same_words_are_served_without_asking(stored: str) -> None:
    score = Score(-9.0)
    assert judge(score, stored) == [None]
    assert not score.asked


def test_literals_that_differ_in_case_are_refused_whatever_the_model_says() -> None:
    score = Score(9.0)
    verifier = PairVerifier(Verifier.load(), score, "pair_model:1", Slips({"delete", "folder"}))
    [verdict] = verifier.verdicts("What does ls -r do?", [("Tell me what ls -R does", 0.99)])
    assert verdict.refusal == "literal"
    assert not score.asked


def test_prompts_too_long_for_the_words_are_not_the_models_business_either() -> None:
    score = Score(9.0)
    assert judge(score, "a" * (MOST_CHARACTERS + 1)) == ["long"]
    assert not score.asked


def test_a_pair_too_long_for_the_model_is_left_to_the_words() -> None:
    assert judge(Score(None), "How can I remove a directory?") == [None]
    assert judge(Score(None), "How do I find a folder?") == ["exchange"]


def test_of_many_candidates_few_are_asked_about() -> None:
    score = Score(-9.0)
    stored = [f"How can I remove a directory{'?' * number}" for number in range(MOST_ASKED + 2)]
    assert len(judge(score, *stored)) == len(score.asked) == MOST_ASKED


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (
            "How do I undo my last commit without losing the changes?",
            "git: take back the latest commit, keep my edits",
            True,
        ),
        ("How do I convert a PDF to Word?", "Turn a pdf file into a docx document, how?", True),
        ("Why is the sky dark at night?", "what is the reason that it's dark in the night sky", True),
        ("How do I merge the branch dev into main?", "How do I merge the branch main into dev?", False),
        ("Remind me to call Ann before lunch", "Remind me to call Ann after lunch", False),
        ("How do I disable the firewall on Ubuntu?", "How do I turn on the firewall on Ubuntu?", False),
        ("Which planet is closest to the sun?", "Which planet is farthest from the sun?", False),
        ("Refund my order 48213", "Refund my order 48231", False),
        ("how do i recieve an email in pyhton", "How do I receive an email in python?", True),
        ("which foods are high in insulin", "which foods are high in inulin", False),
        ("What is the formula of sodium nitrate?", "What is the formula of sodium nitrite?", False),
    ],
)
def test_the_shipped_model_and_weights_tell_the_same_from_the_similar(first: str, second: str, same: bool) -> None:
    [verdict] = make_verifier().verdicts(first, [(second, 0.9)])
    assert (verdict.refusal is None) == same
