"""How many tokens to draft: the lengths that give the most tokens per second, from measured costs and acceptance."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from speculative_decoding.options import MAX_SPECULATION_LENGTH

STEPS = 128  # acceptance rates are told apart to 1/STEPS
MAX_RATE = 0.98  # no drafter is always right for ever

Seconds = NDArray[np.float64]
Lengths = NDArray[np.int32]


def step_of(rate: float) -> int:
    """Return which of the STEPS an acceptance rate is nearest to."""
    return int(rate * STEPS + 0.5)


class Plan(NamedTuple):
    """Tokens to draft for each row, int32 [rows], and the seconds that the round should take."""

    lengths: Lengths
    seconds: float


def expected_tokens(rate: float, length: int) -> float:
    """Return the tokens a round gives: 1 + a + ... + a^length, for acceptance rate a (Leviathan et al. 2023, eq. 1)."""
    return float(sum(rate**power for power in range(length + 1)))


EXPECTED = np.array(
    [
        [expected_tokens(min(step / STEPS, MAX_RATE), length) for length in range(MAX_SPECULATION_LENGTH + 1)]
        for step in range(STEPS + 1)
    ]
)
ALL_LENGTHS = np.arange(MAX_SPECULATION_LENGTH + 1)


def goodputs_alone(
    draft: Seconds, verify: Seconds, most_drafted: int, most_copied: int
) -> tuple[list[float], list[float]]:
    """Return tokens a second at the best length, by STEPS of the acceptance rate: of copied drafts, and of the model's.

    Seconds as for plan_lengths(), of one row.
    """
    copied = EXPECTED[:, : most_copied + 1] / verify[: most_copied + 1]
    drafted = EXPECTED[:, : most_drafted + 1] / (draft + verify)[: most_drafted + 1]
    return copied.max(1).tolist(), drafted.max(1).tolist()


def plan_lengths(
    rates: list[float],
    most: list[int],
    by_model: list[bool],
    draft: Seconds,
    verify: Seconds,
    idle: int = 0,
    probe: bool = False,
) -> Plan:
    """Return the lengths of the greatest goodput: expected tokens of all rows over the seconds of the round.

    rates, most, by_model: for each row the acceptance rate, the longest draft that may be, and whether the draft model
    drafts (else it costs nothing to). draft[d], verify[w]: seconds for these rows to draft d tokens with the model, and
    to verify w drafted tokens, float64 [MAX_SPECULATION_LENGTH + 1]. One call serves all rows, as wide as its longest:
    so the search is over the model's longest d and the longest of all w. `idle` more rows are in the call that are not
    drafted for. With `probe` something is drafted even if it does not pay.
    """
    steps = np.array([step_of(rate) for rate in rates])
    limits = np.array(most)
    models = np.array(by_model)
    places = np.minimum(ALL_LENGTHS, limits[:, None])
    tokens = EXPECTED[steps[:, None], places]  # [rows, lengths]
    drafted = tokens[models].sum(0) if models.any() else np.zeros(len(ALL_LENGTHS))
    found = tokens[~models].sum(0) if not models.all() else np.zeros(len(ALL_LENGTHS))
    most_drafted = int(limits[models].max(initial=0))
    most_found = int(limits[~models].max(initial=0))
    widest = max(most_drafted, most_found)
    seconds = draft[: most_drafted + 1, None] + verify[None, : widest + 1]  # [d, w]
    goodput = (drafted[: most_drafted + 1, None] + found[None, : widest + 1] + idle) / seconds
    goodput[_TOO_LONG[: most_drafted + 1, : widest + 1]] = 0  # what is drafted is verified
    if probe and widest:
        goodput[0, : 1 if most_found else None] = 0
    model_length, length = divmod(int(goodput.argmax()), widest + 1)
    lengths = np.minimum(np.where(models, model_length, length), limits).astype(np.int32)
    return Plan(lengths, float(seconds[model_length, length]))


_TOO_LONG = ALL_LENGTHS[:, None] > ALL_LENGTHS[None, :]
