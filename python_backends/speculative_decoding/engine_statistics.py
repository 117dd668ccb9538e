"""What the engine has done, counted where it happens at the price of an addition, for other threads to read."""

import copy
from bisect import bisect_left
from dataclasses import dataclass, field

from speculative_decoding.options import MAX_SPECULATION_LENGTH

INTER_TOKEN_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def _by_length() -> list[int]:
    return [0] * (MAX_SPECULATION_LENGTH + 1)


@dataclass(eq=False)
class Statistics:
    """Sums since the start; only the engine's thread writes.

    drafts: drafts verified, one per sequence and round. accepted_at[i]: drafts whose i-th token (from 0) stood.
    lengths[k]: drafts of k tokens. plain_rounds: rounds without any draft. inter_token_counts: by bucket, one more for
    what is beyond the last. step_s: seconds of rounds, model_s: those of them within ONNX Runtime.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    rounds: int = 0
    plain_rounds: int = 0
    inter_token_s: float = 0.0
    step_s: float = 0.0
    model_s: float = 0.0
    accepted_at: list[int] = field(default_factory=_by_length)
    lengths: list[int] = field(default_factory=_by_length)
    inter_token_counts: list[int] = field(default_factory=lambda: [0] * (len(INTER_TOKEN_BUCKETS_S) + 1))

    def copy(self) -> "Statistics":
        """Return the sums as they are now."""
        return copy.deepcopy(self)

    def verified(self, drafted: int, accepted: int) -> None:
        """Count one sequence's draft."""
        if not drafted:
            return
        self.drafts += 1
        self.draft_tokens += drafted
        self.accepted_tokens += accepted
        self.lengths[drafted] += 1
        for place in range(accepted):
            self.accepted_at[place] += 1

    def emitted(self, tokens: int, seconds: float | None) -> None:
        """Count new tokens of a sequence, `seconds` after its last ones, None for the first."""
        self.output_tokens += tokens
        if seconds is not None:
            self.inter_token_s += seconds
            self.inter_token_counts[bisect_left(INTER_TOKEN_BUCKETS_S, seconds)] += 1
