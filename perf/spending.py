"""What contenders spend on the same work, taking turns: a noisy machine is noisy for all of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass
class Spent:
    """Wall-clock and CPU seconds of so many answers."""

    answers: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0


class Saving(NamedTuple):
    """Changes of one contender to another, per answer, as fractions: -0.4 is 40% less.

    With as many clients on both sides, none of whom ever pauses, mean latency is clients x seconds / answers (Little's
    law), and its change that of the seconds.
    """

    latency: float
    cost: float


def take_turns(
    contenders: Mapping[str, Callable[[], int]], passes: int, cpu_s: Callable[[], float]
) -> dict[str, Spent]:
    """Call every contender in each pass, after one pass that warms up; a contender returns how many answers it gave.

    cpu_s: the CPU seconds used so far by what is measured.
    """
    spent = {name: Spent() for name in contenders}
    for number in range(passes + 1):
        for name, contender in contenders.items():
            cpu, began = cpu_s(), time.perf_counter()
            answers = contender()
            seconds, cpu = time.perf_counter() - began, cpu_s() - cpu
            if number:
                spent[name].answers += answers
                spent[name].seconds += seconds
                spent[name].cpu_s += cpu
    return spent


def saving(new: Spent, old: Spent) -> Saving:
    """Return what `new` changes to `old`."""
    share = old.answers / new.answers
    return Saving(share * new.seconds / old.seconds - 1, share * new.cpu_s / old.cpu_s - 1)
