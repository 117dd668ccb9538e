"""Words typed wrong are put right where the other prompt has what was meant, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from semantic_cache.verifier.slips import Slips, are_neighbours, is_slip

KNOWN = {"receive", "database", "folder", "frozen", "running", "menu", "insulin", "nitrate", "sync", "payer", "prison"}
KNOWN |= {"trail", "trial", "docker", "what", "display"}
WORDS = st.text("abcdeo", min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("recieve", "receive"),
        ("waht", "what"),
        ("emnu", "menu"),
        ("foldre", "folder"),
        ("foldder", "folder"),
        ("runing", "running"),
        ("froxen", "frozen"),
        ("databse", "database"),
        ("datapbase", "database"),
    ],
)
def test_a_slip_is_put_right_on_either_side(typed: str, meant: str) -> None:
    wrong, right = f"Why is my {typed} like that?", f"why is my {meant} so slow"
    mend = Slips(KNOWN)
    assert mend(wrong, right) == (wrong.replace(typed, meant), right)
    assert mend(right, wrong) == (right, wrong.replace(typed, meant))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("is inulin healthy", "is insulin healthy"),  # a short word without a letter
        ("what is a prion", "what is a prison"),
        ("salts of nitrite", "salts of nitrate"),  # keys far from each other
        ("async calls", "sync calls"),  # at an end
        ("who is the payee", "who is the payer"),
        ("the trail begins", "the trial begins"),  # both known
        ("the foldre abcd", "the abdc foldre"),  # neither known
        ("why is `dispaly: flex` wrong", "why is `display: flex` wrong"),  # quoted
        ('what does "waht" mean', "what does what mean"),
        ("call Dcoker", "call docker"),  # a name
        ("run dcoker.io", "run docker"),  # part of something else
        ("the waht folder", "the what folder waht"),  # said by both
    ],
)
def test_what_may_be_meant_is_left_as_it_is(first: str, second: str) -> None:
    assert Slips(KNOWN)(first, second) == (first, second)
    assert Slips(KNOWN)(second, first) == (second, first)


def test_the_first_word_may_have_a_capital() -> None:
    assert Slips(KNOWN)("Waht now?", "what now") == ("what now?", "what now")


@given(WORDS, WORDS)
def test_a_slip_changes_little(word: str, meant: str) -> None:
    if is_slip(word, meant):
        assert word != meant and abs(len(word) - len(meant)) <= 1 and len(meant) >= 4
        assert is_slip(meant, word) or len(word) < 8 or len(meant) < 8
        assert sorted(word) == sorted(meant) or (word[0], word[-1]) == (meant[0], meant[-1])


def test_keys_beside_each_other() -> None:
    around = {"g": "tyfhvb", "q": "wa", "z": "asx", "p": "ol", "m": "njk"}
    for key, others in around.items():
        assert {one for one in "abcdefghijklmnopqrstuvwxyz" if one != key and are_neighbours(one, key)} == set(others)
