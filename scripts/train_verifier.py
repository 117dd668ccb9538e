"""Fit the semantic cache's verifier to the tune split of perf/data: `python -m scripts.train_verifier`.

The threshold is chosen on scores that each topic got from a model which had not seen that topic, at no more false hits
than FALSE_HITS; the test split is not read.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scripts.serving.installation import PYTHON_BACKENDS

sys.path.append(str(PYTHON_BACKENDS))

from semantic_cache.verifier.comparison import FIGURES, compare
from semantic_cache.verifier.reading import read
from semantic_cache.verifier.verifier import WEIGHTS

from perf.prompt_pairs import Pair, load_pairs, similarities

FALSE_HITS = 0.006  # of near misses: below what is promised, since unseen prompts are harder
LEAST = 0.6  # threshold: what may as well be another question is never served
RIDGE = 10.0
STEPS = 60
JUDGED = frozenset({None, "exchange", "change", "addition"})  # refusals for what figures count: learnt from too
RULES = ("forms.py", "frames.py", "lexicon.py", "reading.py", "alignment.py", "comparison.py",
         "synonyms.txt", "opposites.txt", "families.txt", "classes.txt")  # fmt: skip

Float = NDArray[np.float64]


class Model(NamedTuple):
    """A logistic regression on the figures as they are."""

    weights: Float
    bias: float

    def probabilities(self, figures: Float) -> Float:
        scores: Float = 1 / (1 + np.exp(-(figures @ self.weights + self.bias)))
        return scores


def fit(figures: Float, same: Float) -> Model:
    """Fit by Newton's method with a ridge on the standardized weights."""
    mean, deviation = figures.mean(0), figures.std(0) + 1e-6
    inputs = np.column_stack([(figures - mean) / deviation, np.ones(len(figures))])
    ridge = RIDGE * np.diag([*np.ones(len(mean)), 0.0])
    weights = np.zeros(inputs.shape[1])
    for _ in range(STEPS):
        likely = 1 / (1 + np.exp(-inputs @ weights))
        hessian = (inputs * (likely * (1 - likely))[:, None]).T @ inputs + ridge
        weights -= np.linalg.solve(hessian, inputs.T @ (likely - same) + ridge @ weights)
    scaled = weights[:-1] / deviation
    return Model(scaled, float(weights[-1] - scaled @ mean))


def held_out_scores(pairs: list[Pair], figures: Float, judged: NDArray[np.bool_], refused: NDArray[np.bool_]) -> Float:
    """Score each topic by a model fitted to the others; what a rule refused scores 0."""
    same = np.array([pair.label == "paraphrase" for pair in pairs], float)
    topics = np.array([pair.topic for pair in pairs])
    scores = np.zeros(len(pairs))
    for topic in sorted(set(topics)):
        seen, held = (topics != topic) & judged, topics == topic
        scores[held] = fit(figures[seen], same[seen]).probabilities(figures[held])
    return np.where(refused, 0.0, scores)


def main() -> None:
    """Fit, choose the threshold, write the weights, print what the tune split's held-out scores promise."""
    pairs = load_pairs("tune")
    compared = [
        compare(read(pair.first), read(pair.second), cosine)
        for pair, cosine in zip(pairs, similarities(pairs), strict=True)
    ]
    figures = np.array([comparison.figures for comparison in compared])
    refused = np.array([comparison.refusal is not None for comparison in compared])
    judged = np.array([comparison.refusal in JUDGED for comparison in compared])
    same = np.array([pair.label == "paraphrase" for pair in pairs])
    near = np.array([pair.label == "near_miss" for pair in pairs])
    scores = held_out_scores(pairs, figures, judged, refused)
    allowed = int(FALSE_HITS * near.sum())
    threshold = max(LEAST, float(np.sort(scores[near])[::-1][allowed]) + 1e-3)
    model = fit(figures[judged], same[judged].astype(float))
    content = {
        "version": _version(),
        "threshold": round(threshold, 4),
        "bias": round(model.bias, 4),
        "weights": {name: round(float(weight), 4) for name, weight in zip(FIGURES, model.weights, strict=True)},
    }
    WEIGHTS.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"threshold {threshold:.3f}: recall {(scores[same] >= threshold).mean():.3f}, "
          f"false hits {(scores[near] >= threshold).mean():.4f} on held-out topics of the tune split")  # fmt: skip


def _version() -> str:
    digest = hashlib.sha256()
    for name in RULES:
        digest.update((Path(WEIGHTS).parent / name).read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    main()
