"""How many paraphrases are found, and how many near misses are served, by system."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from perf.prompt_pairs import Pair  # puts python_backends on the path

from semantic_cache.policy import VERIFIED_THRESHOLD  # isort: skip
from semantic_cache.verifier.verifier import Verifier  # isort: skip

THRESHOLDS = [round(0.80 + 0.01 * step, 2) for step in range(20)]

Quality = dict[str, float]


def quality(pairs: Sequence[Pair], served: Sequence[bool] | NDArray[np.bool_]) -> Quality:
    """Return recall of paraphrases, share of near misses served, and share of what is served that is right."""
    labels = np.array([pair.label for pair in pairs])
    hits = np.array(served)
    right = hits[labels == "paraphrase"]
    return {
        "recall": round(float(right.mean()), 4),
        "false_hit_rate": round(float(hits[labels == "near_miss"].mean()), 4),
        "precision": round(float(right.sum() / max(1, hits.sum())), 4),
    }


def threshold_curve(pairs: Sequence[Pair], cosines: Sequence[float]) -> dict[str, Quality]:
    """Return the quality of a similarity threshold alone."""
    return {f"threshold_{least:.2f}": quality(pairs, np.array(cosines) >= least) for least in THRESHOLDS}


def verified_curve(pairs: Sequence[Pair], cosines: Sequence[float]) -> list[Quality]:
    """Return the quality of ours at every least probability, from strict to lax."""
    probabilities = _probabilities(pairs, cosines)
    return [quality(pairs, probabilities >= least) for least in np.unique(probabilities[probabilities > 0])[::-1]]


def verified(pairs: Sequence[Pair], cosines: Sequence[float]) -> Quality:
    """Return the quality of ours as it is served."""
    return quality(pairs, _probabilities(pairs, cosines) >= Verifier.load().threshold)


def _probabilities(pairs: Sequence[Pair], cosines: Sequence[float]) -> NDArray[np.float64]:
    verifier = Verifier.load()
    return np.array(
        [
            verifier.judge(pair.second, pair.first, cosine).probability if cosine >= VERIFIED_THRESHOLD else 0.0
            for pair, cosine in zip(pairs, cosines, strict=True)
        ]
    )
