"""How much is measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """clients: each sends its next request when it has its answer. requests: in a pass, of which the share `repeats`
    were made before in the same pass. passes: that count, after one that warms up."""

    clients: int = 4
    requests: int = 200
    repeats: float = 0.3
    passes: int = 2
