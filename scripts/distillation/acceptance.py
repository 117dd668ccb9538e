"""How many of a draft's tokens a target accepts, counted without decoding: what a draft is for."""

from typing import NamedTuple

import torch
from torch import Tensor


class Acceptance(NamedTuple):
    """What speculation would bring, on texts that the target wrote.

    rate: the share of the target's tokens that the draft picks after the tokens before them.
    tokens_per_round: tokens an answer grows by in a round of drafting and verifying, on average.
    bound: the same of a draft that is always right: answers end, and drafts reach past their ends.
    overlap: the mean of sum(min(p, q)), the share of drafts that rejection sampling accepts (Leviathan et al. 2023).
    """

    rate: float
    tokens_per_round: float
    bound: float
    overlap: float


def rounds(agreed: list[bool], length: int) -> int:
    """Return how many rounds of `length` drafted tokens give an answer whose tokens the draft picks where `agreed`.

    Drafting starts at the target's own tokens in every round, so what the draft picks after each of the target's
    prefixes says all: a round yields the run of agreeing tokens, `length` at most, and the target's next token.
    """
    done = count = 0
    while done < len(agreed):
        run = agreed[done : done + length]
        done += (run.index(False) if False in run else len(run)) + 1
        count += 1
    return count


def measure(agreed: Tensor, overlap: Tensor, answers: Tensor, length: int) -> Acceptance:
    """Return the acceptance of drafts `length` tokens long.

    agreed and overlap are one value a token of all answers; answers is the row that each token belongs to, sorted.
    """
    rows = [part.tolist() for part in agreed.split(torch.unique_consecutive(answers, return_counts=True)[1].tolist())]
    tokens = len(agreed)
    taken = sum(rounds(row, length) for row in rows)
    least = sum(rounds([True] * len(row), length) for row in rows)
    return Acceptance(agreed.float().mean().item(), tokens / taken, tokens / least, overlap.mean().item())
