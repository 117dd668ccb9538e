"""What of a teacher a student was made from."""

from typing import NamedTuple

from torch import Tensor


class Kept(NamedTuple):
    """The teacher's layers that became the student's, in order, and the hidden channels that were kept, sorted."""

    layers: list[int]
    channels: Tensor
