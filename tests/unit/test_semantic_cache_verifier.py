"""The verifier: the same question in other words, and another question in nearly the same words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from semantic_cache.verifier.comparison import FIGURES
from semantic_cache.verifier.lexicon import default_lexicon
from semantic_cache.verifier.reading import read
from semantic_cache.verifier.verifier import MOST_CHARACTERS, Verifier

VERIFIER = Verifier.load()
ALIKE = 0.95  # vectors are no help in these: what must be refused is as near as what must not


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("How do I delete a folder?", "How can I remove a directory?"),
        ("How do I delete a folder?", "Could you please tell me how to delete a folder?"),
        ("How do I delete a folder?", "Delete a folder"),
        ("What does os.path.join do?", "what is it that os.path.join does?"),
        ("In winter, is the museum open?", "Is the museum open in winter?"),
        ("Switch the heating on", "Turn on the heating"),
        ("How many people live in Peru?", "What is the population of Peru?"),
        ("Can I pay by card?", "Is it possible to pay by card?"),
        ("Is the EU bigger than the US?", "Is the European Union larger than the United States?"),
        ("What colour is the flag of Peru?", "What color is Peru's flag?"),
        ("What does bufio.Scanner do?", "What good is bufio.Scanner?"),
        ("What does sync.Once do?", "Please clarify the role of sync.Once"),
        ("What does sync.Once do?", "Would you mind telling me the job of sync.Once?"),
        ("What does sync.Once do?", "sync.Once - what does it do?"),
        ("Who painted the ceiling?", "The ceiling was painted by whom?"),
        ("In 1939, did Germany attack Poland?", "Did Germany attack Poland in 1939?"),
        ("How far is Rome from Oslo?", "How far is Oslo from Rome?"),
        ("Can I bake without sugar?", "Can I bake if I don't want to use sugar?"),
    ],
)
def test_the_same_question_in_other_words_passes(first: str, second: str) -> None:
    assert VERIFIER.judge(first, second, ALIKE).refusal is None
    assert VERIFIER.judge(second, first, ALIKE).refusal is None


@pytest.mark.parametrize(
    ("first", "second", "refusals"),
    [
        ("Wait for 5 minutes", "Wait for 15 minutes", {"number"}),
        ("Wait for 5 minutes", "Wait for 5 hours", {"unit", "opposite"}),
        ("Call me on Monday", "Call me on Tuesday", {"date"}),
        ("What is new in v1.2.3?", "What is new in v1.2.4?", {"literal"}),
        ("What does os.path.join do?", "What does os.path.split do?", {"literal"}),
        ("Delete /etc/hosts", "Delete /etc/passwd", {"literal"}),
        ('Say "hello there"', 'Say "hello here"', {"literal"}),
        ("What does f(1, 2) return?", "What does f(2, 1) return?", {"literal"}),
        ("Is x == y?", "Is x != y?", {"literal"}),
        ("Who rules in Peru?", "Who rules in Chile?", {"name"}),
        ("Is the shop open?", "Is the shop not open?", {"negation"}),
        ("Coffee with sugar", "Coffee without sugar", {"negation"}),
        ("Enable the alarm", "Disable the alarm", {"opposite"}),
        ("Sort the list in ascending order", "Sort the list in descending order", {"opposite"}),
        ("Call me before lunch", "Call me after lunch", {"opposite", "change"}),
        ("Which tower is the highest?", "Which tower is the lowest?", {"opposite"}),
        ("Fly from Rome to Oslo", "Fly from Oslo to Rome", {"roles"}),
        ("Merge develop into main", "Merge main into develop", {"roles"}),
        ("Is gold heavier than lead?", "Is lead heavier than gold?", {"roles"}),
        ("Did Rome attack Carthage?", "Did Carthage attack Rome?", {"roles"}),
        ("Why did the war end?", "When did the war end?", {"question"}),
        ("What is the fee?", "What is the limit?", {"exchange"}),
        ("How do I bake bread?", "How do I buy bread?", {"exchange"}),
        ("What is a tree?", "What is a balanced tree?", {"addition"}),
        ("What is the square of 9?", "What is the square root of 9?", {"addition", "opposite"}),
        ("How do I bake salmon?", "How do I cook salmon?", {"exchange"}),
        ("What does ls -r do?", "What does ls -R do?", {"literal"}),
        ("What is x after x += 1?", "What is x after x -= 1?", {"literal"}),
        ("Is C# compiled?", "Is C compiled?", {"literal", "name"}),
        ("What does [] mean here?", "What does {} mean here?", {"literal"}),
        ("Is a Proc a Lambda?", "Is a Lambda a Proc?", {"roles"}),
        (
            "Does Peru sell more to Chile than Chile to Peru?",
            "Does Chile sell more to Peru than Peru to Chile?",
            {"roles"},
        ),
        ("Can children swim here?", "Should children swim here?", {"question"}),
        ("How many messages are unread?", "Which messages are unread?", {"question"}),
        ("What does sync.Once return?", "What does sync.Once do?", {"addition", "change"}),
    ],
)
def test_another_question_in_nearly_the_same_words_is_refused(first: str, second: str, refusals: set[str]) -> None:
    assert VERIFIER.judge(first, second, ALIKE).refusal in refusals
    assert VERIFIER.judge(second, first, ALIKE).refusal in refusals


@given(st.text(max_size=200))
def test_any_text_is_read_and_is_the_same_as_itself(text: str) -> None:
    read(text)
    assert VERIFIER.judge(text, text, 1.0).refusal is None


@given(st.text(max_size=80), st.text(max_size=80), st.floats(-1, 1))
def test_a_verdict_is_a_probability_and_its_order_does_not_refuse(first: str, second: str, similarity: float) -> None:
    verdict = VERIFIER.judge(first, second, similarity)
    assert 0 <= verdict.probability <= 1
    assert (verdict.refusal is None) == (verdict.probability >= VERIFIER.threshold)


def test_what_is_too_long_to_be_read_is_refused() -> None:
    long = "word " * (MOST_CHARACTERS // 5 + 1)
    assert VERIFIER.judge(long, long, 1.0).refusal == "long"


def test_weights_for_other_figures_are_refused() -> None:
    weights = dict.fromkeys([*FIGURES, "more of them"], 0.0)
    with pytest.raises(ValueError, match="the verifier's weights are for"):
        Verifier.from_json({"version": "x", "threshold": 0.5, "bias": 0.0, "weights": weights})


def test_no_word_is_its_own_opposite_and_a_synonym_at_once() -> None:
    """Such a pair would be served and refused by the order in which the two lists are asked."""
    lexicon = default_lexicon()
    for one, other in (("enable", "disable"), ("open", "close"), ("first", "last"), ("buy", "sell"), ("min", "max")):
        assert lexicon.groups((one,)).isdisjoint(lexicon.groups((other,)))
