"""accept: what it commits is what a loop over the tokens commits."""

from hypothesis import given
from hypothesis import strategies as st
from speculative_decoding.acceptance import accept

TOKENS = st.integers(0, 2)  # so few that drafts often agree


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """What was drafted, and the target's choices: one more."""
    drafted = draw(st.lists(TOKENS, max_size=16))
    return drafted, draw(st.lists(TOKENS, min_size=len(drafted) + 1, max_size=len(drafted) + 1))


def commit_one_by_one(drafted: list[int], chosen: list[int]) -> list[int]:
    committed = []
    for position, choice in enumerate(chosen):
        committed.append(choice)
        if position == len(drafted) or drafted[position] != choice:
            break
    return committed


@given(rounds())
def test_it_commits_what_a_loop_over_the_tokens_commits(example: tuple[list[int], list[int]]) -> None:
    drafted, chosen = example
    committed = accept(drafted, chosen.__getitem__)
    assert committed == commit_one_by_one(drafted, chosen)


@given(st.lists(TOKENS, max_size=16), TOKENS)
def test_a_draft_that_agrees_throughout_is_committed_whole_with_the_targets_next(drafted: list[int], last: int) -> None:
    assert accept(drafted, [*drafted, last].__getitem__) == [*drafted, last]
