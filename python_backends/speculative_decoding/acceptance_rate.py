"""How often a drafter's tokens stand, estimated from few and recent rounds."""

PRIOR_TRIALS = 4.0
MEMORY = 0.9  # weight of a round's trials after one more round


class AcceptanceRate:
    """The share of a sequence's drafted tokens that stood, recent ones first, leaning on a prior while they are few.

    A round of k drafted tokens of which n stood is n successes and, if n < k, one failure: what comes after a token
    that fell was never judged.
    """

    def __init__(self, prior: float, memory: float = MEMORY) -> None:
        self._memory = memory
        self._successes = prior * PRIOR_TRIALS
        self._trials = PRIOR_TRIALS

    @property
    def value(self) -> float:
        """The estimate, from 0 to 1."""
        return self._successes / self._trials

    def update(self, drafted: int, accepted: int) -> None:
        """Take in a round."""
        if drafted:
            self._successes = self._memory * self._successes + accepted
            self._trials = self._memory * self._trials + accepted + (accepted < drafted)
