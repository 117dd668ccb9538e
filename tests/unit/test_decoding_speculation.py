"""Who drafts for a sequence: the model, or copying, whichever has shown to give more."""

from collections.abc import Mapping

import numpy as np
from speculative_decoding.acceptance_rate import AcceptanceRate
from speculative_decoding.drafter import Drafter, Proposals
from speculative_decoding.options import MAX_SPECULATION_LENGTH, GenerationOptions
from speculative_decoding.sequence import Sequence
from speculative_decoding.speculation import Speculation, most_copied
from speculative_decoding.step_costs import CostTable, PrefillCost, StepCosts

LENGTHS = np.arange(MAX_SPECULATION_LENGTH + 1)
COPY = [5, 6, 7, 8, 9] * 8  # what copying continues rightly


class NineDrafter(Drafter):
    """Proposes the token 9 over and over."""

    ran_s = 0.0

    def fill(self, committed: Mapping[int, list[int]]) -> set[int]:
        return set(committed)

    def propose(self, sequences: list[Sequence], lengths: np.ndarray) -> Proposals:
        return Proposals(np.full((len(lengths), lengths.max()), 9, np.int64), {})

    def slot(self, slot: int) -> np.ndarray:
        raise NotImplementedError

    def seen(self, slot: int) -> int:
        raise NotImplementedError

    def resume(self, slot: int, length: int) -> None:
        raise NotImplementedError

    def commit(self, slot: int, length: int) -> None:
        raise NotImplementedError

    def move(self, source: int, destination: int) -> None:
        raise NotImplementedError


def costs(rows: int = 4) -> StepCosts:
    draft, verify = LENGTHS * 0.1, 1 + LENGTHS * 0.01
    return StepCosts(CostTable(np.tile(draft, (rows, 1))), CostTable(np.tile(verify, (rows, 1))), PrefillCost(1.0, 1.0))


def sequence(tokens: list[int], **options: object) -> Sequence:
    return Sequence(tokens, GenerationOptions(max_tokens=500, **options), lambda *_: None, frozenset())


def decode(speculation: Speculation, one: Sequence, following: list[int], rounds: int) -> list[list[int]]:
    """Let a sequence go on as `following` says, over and over; return what was drafted."""
    drafted, place = [], 0
    for _ in range(rounds):
        drafts = speculation.draft([one], 100)
        length = int(drafts.lengths[0])
        proposed = drafts.tokens[0, :length].tolist()
        drafted.append(proposed)
        right = [following[(place + ahead) % len(following)] for ahead in range(length + 1)]
        stood = next((at for at in range(length) if proposed[at] != right[at]), length)
        tokens = right[: stood + 1]
        speculation.record(one, length, tokens)
        one.commit(tokens)
        place += len(tokens)
    return drafted


def test_what_repeats_is_copied_and_further_than_the_model_would_draft() -> None:
    drafted = decode(Speculation(NineDrafter(), 8, costs()), sequence(COPY), COPY[:5], 12)
    assert all(tokens[:2] == [5, 6] or len(tokens) > 8 for tokens in drafted[2:])
    assert max(map(len, drafted)) == most_copied(8) == 16


def test_how_a_copy_would_have_done_is_learnt_while_the_model_drafts() -> None:
    speculation = Speculation(NineDrafter(), 4, costs())
    for following, is_better in ((COPY[:5], True), ([9] * 5, False)):
        one = sequence([*COPY[:7], 1, 2, *COPY[:5]], drafter="auto")  # the match is of 5 tokens
        one.rates[2] = AcceptanceRate(0.05)
        first = one.rates[2].value
        drafts = speculation.draft([one], 100)
        assert set(drafts.tokens[0].tolist()) == {9}
        speculation.record(one, int(drafts.lengths[0]), following[:3])
        assert (one.rates[2].value > first) == is_better


def test_a_plan_that_is_kept_never_drafts_further_than_a_request_allows() -> None:
    speculation, one = Speculation(NineDrafter(), 8, costs()), sequence([9, 9, 9], drafter="model")
    one.options = GenerationOptions(max_tokens=12, drafter="model")
    drafted = decode(speculation, one, [9], 2)
    assert sum(map(len, drafted)) + len(drafted) == 12
    given = sequence([9, 9, 9], speculation_length=3)
    assert max(map(len, decode(speculation, given, [9], 10))) == 3
