"""Groups of prompts written by hand: one request in several phrasings, and other requests that look like it.

To those in groups.jsonl come the pairs of perf/data that are not there to test: their prompts with all that goes with
each are groups, too.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

from perf.prompt_pairs import load_pairs

GROUPS = Path(__file__).with_name("groups.jsonl")
ALIKE, APART = 10, 24  # pairs of a group in an epoch
HELD_OUT = 0.1


class Pair(NamedTuple):
    """Two prompts, and whether they are the same request."""

    first: str
    second: str
    same: bool


@dataclass(frozen=True)
class Group:
    """`same`: phrasings of one request. `near`: two phrasings each of requests that look like it and are not."""

    same: tuple[str, ...]
    near: tuple[tuple[str, ...], ...]

    def alike(self) -> list[Pair]:
        """Return all pairs that are the same request, those of near misses put otherwise among them."""
        return [Pair(a, b, True) for request in (self.same, *self.near) for a, b in combinations(request, 2)]

    def apart(self) -> list[Pair]:
        """Return all pairs that are not."""
        requests = combinations((self.same, *self.near), 2)
        return [Pair(a, b, False) for one, other in requests for a, b in product(one, other)]


def load_groups() -> list[Group]:
    """Read both. A line of groups.jsonl is {"topic", "same": [prompt, ...], "near": [[difference, prompt, ...]]}."""
    lines = [json.loads(line) for line in GROUPS.read_text(encoding="utf-8").splitlines()]
    groups = [Group(tuple(line["same"]), tuple(tuple(near[1:]) for near in line["near"])) for line in lines]
    prompts: dict[str, tuple[list[str], list[tuple[str, ...]]]] = {}
    for pair in load_pairs("tune"):
        same, near = prompts.setdefault(pair.first, ([pair.first], []))
        same.append(pair.second) if pair.label == "paraphrase" else near.append((pair.second,))
    return groups + [Group(tuple(same), tuple(near)) for same, near in prompts.values()]


def split(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Return the groups to learn from, and HELD_OUT of all."""
    mixed = random.Random(0).sample(groups, len(groups))
    held = int(HELD_OUT * len(groups))
    return mixed[held:], mixed[:held]


def epoch(groups: Sequence[Group], rng: random.Random) -> list[Pair]:
    """Return some pairs of every group, in random order and with either prompt first."""
    pairs = []
    for group in groups:
        for kind, count in ((group.alike(), ALIKE), (group.apart(), APART)):
            pairs += rng.sample(kind, min(count, len(kind)))
        pairs.append(Pair(rng.choice(group.same), rng.choice(rng.choice(groups).same), False))
    rng.shuffle(pairs)
    return [Pair(b, a, same) if rng.random() < 0.5 else Pair(a, b, same) for a, b, same in pairs]
