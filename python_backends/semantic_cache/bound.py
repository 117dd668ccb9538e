"""How sure is a hit? vCache's bound per entry (arXiv 2502.03771), and what shadow checks say of a partition."""

import math
import threading
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from semantic_cache.records import Checks, Observation

LEAST_OBSERVATIONS = 6  # below, an entry always explores
# The paper's search over epsilon, on a logarithmic grid: a linear one never gets near 0, and so caps what is served.
EPSILONS = np.logspace(-7, math.log10(0.5), 64)
QUANTILES = np.array([NormalDist().inv_cdf(1 - epsilon) for epsilon in EPSILONS])
# What is known before anything was observed: prompts without likeness differ, equal ones do not.
PRIOR_SIMILARITIES, PRIOR_CORRECT = (0.0, 1.0), (0.0, 1.0)
RIDGE = 1e-3
STEPS = 15
CONFIDENCE = 0.95


def exploration_probability(observations: Sequence[Observation], similarity: float, error_target: float) -> float:
    """Return how likely an entry must be passed over so that at most `error_target` of its answers are wrong.

    A logistic curve of correctness over similarity is fitted to the entry's observations. For each epsilon its
    threshold is moved up by the one-sided confidence interval; (1 - epsilon) times the curve is then a lower bound of
    being right, alpha, and 1 - error_target / (1 - alpha) the share that has to explore. The least over epsilon holds.
    """
    if len(observations) < LEAST_OBSERVATIONS:
        return 1.0
    similarities = np.array([*(made.similarity for made in observations), *PRIOR_SIMILARITIES])
    correct = np.array([*(float(made.correct) for made in observations), *PRIOR_CORRECT])
    threshold, slope, deviation = _fit(similarities, correct)
    if slope <= 0:
        return 1.0
    thresholds = threshold + QUANTILES * deviation
    exponents = np.clip(-slope * (similarity - thresholds), -500, 500)
    alpha = (1 - EPSILONS) / (1 + np.exp(exponents))
    explore = 1 - error_target / np.maximum(1 - alpha, 1e-12)
    return float(np.clip(explore.min(), 0.0, 1.0))


def _fit(similarities: npt.NDArray[np.float64], correct: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Return threshold and slope of the likeliest logistic curve, and the threshold's standard deviation."""
    inputs = np.column_stack([similarities, np.ones_like(similarities)])
    weights = np.array([8.0, -6.0])  # a curve that rises at 0.75
    hessian = np.eye(2)
    for _ in range(STEPS):
        likely = 1 / (1 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        hessian = (inputs * (likely * (1 - likely))[:, None]).T @ inputs + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, inputs.T @ (likely - correct) + RIDGE * weights)
        weights = weights - step * min(1.0, 5.0 / (np.abs(step).max() + 1e-12))
    slope, offset = weights
    if slope <= 0:
        return 1.0, float(slope), 0.0
    gradient = np.array([offset / slope**2, -1 / slope])
    variance = gradient @ np.linalg.solve(hessian, gradient)
    return float(-offset / slope), float(slope), math.sqrt(max(0.0, float(variance)))


class FalseHits:
    """Checked hits and wrong ones per partition, as the store has them for all servers. Thread-safe."""

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self._checks: dict[bytes, Checks] = {}
        self._lock = threading.Lock()

    def load(self, checks: Mapping[bytes, Checks]) -> None:
        """Take what the store has."""
        with self._lock:
            self._checks = dict(checks)

    def add(self, partition: bytes, correct: bool) -> None:
        """Count one check, which the store has been told of."""
        with self._lock:
            self._checks[partition] = self._checks.get(partition, Checks(0.0, 0.0)).plus(correct)

    def is_over(self, partition: bytes) -> bool:
        """Whether a partition's share of wrong hits is above the budget beyond doubt (its lower bound is)."""
        checks = self._checks.get(partition)
        return checks is not None and wilson_bounds(checks.wrong, checks.made)[0] > self._budget

    def bounds(self) -> dict[bytes, float]:
        """Return the upper bound of the share of wrong hits, of each partition that was checked."""
        with self._lock:
            return {name: wilson_bounds(checks.wrong, checks.made)[1] for name, checks in self._checks.items()}


def wilson_bounds(count: float, total: float) -> tuple[float, float]:
    """Return one-sided bounds of a share at CONFIDENCE, by Wilson's score interval."""
    if total <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(CONFIDENCE)
    share = count / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    margin = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, center - margin), min(1.0, center + margin)
