"""Plain steps that a GPU takes one after another by itself, while nobody looks."""

from collections.abc import Sequence as Rows

import numpy as np

from speculative_decoding.decoder import Decoder
from speculative_decoding.followed import Followed
from speculative_decoding.paged_model import PagedModel
from speculative_decoding.sampling import wishes_of
from speculative_decoding.sequence import Sequence
from speculative_decoding.step_costs import StepCosts

MOST_STEPS, MOST_S = 4, 0.01  # who comes meanwhile waits so long


class Burst:
    """Has a target feed itself what it chooses: it waits for the host once in several steps."""

    def __init__(self, target: Decoder, costs: StepCosts | None) -> None:
        self._target = target if isinstance(target, PagedModel) else None
        self._costs = costs

    def length(self, running: Rows[Sequence]) -> int:
        """Return how many steps may be taken for the sequences in slots 0, 1, ...: 1 where the host looks at each."""
        if not self._target or not self._costs or any(sequence.needs_host for sequence in running):
            return 1
        wanted = max(sequence.options.max_tokens - sequence.answered for sequence in running)
        room = self._target.context_length - max(len(sequence.tokens) for sequence in running)
        in_time = int(MOST_S / self._costs.verify.row(len(running))[0])
        return max(1, min(MOST_STEPS, in_time, wanted, room))

    def start(self, running: Rows[Sequence], steps: int) -> Followed:
        """Ask for the next `steps` tokens of each sequence, which the target has seen but for the last."""
        assert self._target
        tokens = np.array([sequence.tokens[-1:] for sequence in running])
        is_sampled = not all(sequence.options.is_bare for sequence in running)
        wishes = wishes_of([sequence.sampler for sequence in running], steps).T if is_sampled else None
        return self._target.follow(tokens, np.ones(len(running), np.int32), steps, wishes)
