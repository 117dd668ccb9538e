"""Stop strings: the answer ends before the first that is complete, whatever pieces its text comes in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from speculative_decoding.stop_strings import StopStrings

LETTERS = st.text("ab漢\n", max_size=30)
STOPS = st.lists(st.text("ab漢\n", min_size=1, max_size=4), max_size=4)


def feed(text: str, stops: list[str], sizes: list[int], ignored: int = 0) -> tuple[list[str], bool]:
    """Return the pieces given out, and whether a stop string was found; none may end in the first `ignored`."""
    made, pieces, place = StopStrings(stops), [], 0
    for size in [*sizes, *[1] * len(text)]:
        for begin, end in ((place, min(place + size, ignored)), (max(place, ignored), place + size)):
            if begin < end:
                pieces.append(made.feed(text[begin:end], active=begin >= ignored))
        place += size
    return [*pieces, made.flush()], made.found


def end_of(text: str, stops: list[str], ignored: int = 0) -> int | None:
    """Where the text ends when it is looked at character by character."""
    for end in range(ignored + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end - max(map(len, ending))
    return None


@given(LETTERS, STOPS, st.lists(st.integers(0, 5)), st.integers(0, 10))
def test_the_text_ends_before_the_stop_string_that_is_complete_first(
    text: str, stops: list[str], sizes: list[int], ignored: int
) -> None:
    pieces, found = feed(text, stops, sizes, ignored)
    end = end_of(text, stops, ignored)
    assert ("".join(pieces), found) == (text[:end], end is not None)


@given(LETTERS, STOPS, st.lists(st.integers(0, 5)))
def test_what_was_given_out_is_never_part_of_a_stop_string(text: str, stops: list[str], sizes: list[int]) -> None:
    pieces, _ = feed(text, stops, sizes)
    given_out = ""
    for piece in pieces:
        given_out += piece
        end = end_of(text, stops)
        assert end is None or len(given_out) <= end


def test_only_what_may_be_a_beginning_is_held_back() -> None:
    made = StopStrings(["\n\nEND", "STOP"])
    assert [made.feed(piece) for piece in ("text S", "T", "x\n", "\nE", "N", "!")] == [
        "text ",
        "",
        "STx",
        "",
        "",
        "\n\nEN!",
    ]


@pytest.mark.parametrize("stops", [[], ["zzz"]])
def test_without_a_stop_string_all_text_comes(stops: list[str]) -> None:
    made = StopStrings(stops)
    assert made.feed("hello") + made.flush() == "hello" and not made.found
