"""What passes between the cache and its stores."""

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]


class Key(NamedTuple):
    """`partition`: whose answers may be seen (32 bytes). `exact`: this prompt in that partition (32 bytes)."""

    partition: bytes
    exact: bytes


class Entry(NamedTuple):
    """One answer to store.

    tenant: id derived from the tenant's name. model: name and version of who answered. info: a JSON object. vector:
    unit vector of the prompt; None: found by its bytes only. tokens: what decoding it again would cost. Times are
    seconds since 1970.
    """

    key: Key
    tenant: bytes
    model: str
    prompt: str
    answer: str
    info: str
    vector: Vector | None
    tags: tuple[str, ...]
    tokens: int
    created: float
    expires: float

    @property
    def bytes(self) -> int:
        """About how much room it takes."""
        texts = len(self.prompt.encode()) + len(self.answer.encode()) + len(self.info.encode())
        return texts + (0 if self.vector is None else 4 * self.vector.size) + OVERHEAD_BYTES


OVERHEAD_BYTES = 400  # keys, times, counters and their indexes


class Found(NamedTuple):
    """A stored answer, what was stored with it (a JSON object), and when."""

    answer: str
    info: str
    created: float


class Candidate(NamedTuple):
    """A stored answer whose prompt may mean the same."""

    key: Key
    prompt: str
    vector: Vector
    found: Found


class Hit(NamedTuple):
    """A candidate taken for the same question, and the cosine of the two prompts."""

    candidate: Candidate
    similarity: float


class Vectors(NamedTuple):
    """Vectors to index: ids [n], times of expiry [n], vectors [n, dimensions]."""

    ids: npt.NDArray[np.uint64]
    expiries: list[float]
    matrix: Vector


class Usage(NamedTuple):
    """How much a store holds, or may hold."""

    entries: int
    bytes: int


class Selector(NamedTuple):
    """Which entries to invalidate: those that match all that is given."""

    exact: bytes | None = None
    tag: str | None = None
    tenant: bytes | None = None
    model: str | None = None


class Checks(NamedTuple):
    """Hits of a partition that were checked, and how many of them were wrong; old ones fade, so both are shares."""

    made: float
    wrong: float

    def plus(self, correct: bool) -> Self:
        """Return these and one more, with a memory of about MEMORY."""
        fade = min(1.0, MEMORY / (self.made + 1))
        return self._replace(made=fade * (self.made + 1), wrong=fade * (self.wrong + (not correct)))


MEMORY = 500.0  # checks of a partition that count fully


class Observation(NamedTuple):
    """An answer compared with the one decoded for another prompt: how alike the prompts were, and whether it fitted."""

    key: Key
    similarity: float
    correct: bool
    made: float
