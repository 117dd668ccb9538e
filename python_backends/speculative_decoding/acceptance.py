"""Which drafted tokens stand."""

import numpy as np
from numpy.typing import NDArray


def accept(drafted: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tokens to commit after a round: the drafted ones that the target would have chosen, then its own next.

    drafted: int64 [k]. chosen: int64 [k + 1], the target's choice after the committed tokens and each drafted one.
    A drafted token stands when it equals the target's choice and all before it stood, so what is returned (1 to k + 1
    tokens) is what decoding with the target alone gives (Leviathan et al. 2023, for deterministic choices).
    """
    agreed = drafted == chosen[:-1]
    accepted = len(agreed) if agreed.all() else int(agreed.argmin())
    return chosen[: accepted + 1]
