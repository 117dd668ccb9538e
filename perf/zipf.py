"""How often each of several things is asked for: few often, many rarely."""

import numpy as np
from numpy.typing import NDArray

EXPONENT = 1.1  # of Zipf's law


def zipf(count: int) -> NDArray[np.float64]:
    """Return the share of each of `count` things, the most frequent first."""
    weights = 1 / np.arange(1, count + 1) ** EXPONENT
    return weights / weights.sum()
