"""The verdict: refused for a reason, or as likely the same question as a logistic model of the figures says."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from semantic_cache.verifier.comparison import FIGURES, compare
from semantic_cache.verifier.reading import read

WEIGHTS = Path(__file__).parent / "weights.json"
MOST_CHARACTERS = 8000  # of a prompt that is read: beyond, two prompts are not the same unless their bytes are


class Verdict(NamedTuple):
    """`refusal`: why it is not the same question, None if it is. `probability`: that it is, 0 where a rule refused.

    `is_settled`: whether nothing but the words is to be asked.
    """

    refusal: str | None
    probability: float
    is_settled: bool = False


@dataclass(frozen=True, slots=True)
class Verifier:
    """Says whether two prompts ask the same. `version` names rules and weights: it is part of every partition.

    The rules come first (numbers, literals, names, negation, opposites, roles, kind of question), then a logistic
    regression on what is left unexplained; scripts/train_verifier.py fits it and chooses `threshold`.
    """

    version: str
    threshold: float
    bias: float
    weights: tuple[float, ...]

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Self:
        """Read the weights. Raises ValueError when they are not for these figures."""
        return cls.from_json(json.loads(path.read_text("utf-8")))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Make a verifier of what scripts/train_verifier.py wrote. Raises ValueError when it is for other figures."""
        if list(content["weights"]) != list(FIGURES):
            raise ValueError(f"the verifier's weights are for {list(content['weights'])}, not {list(FIGURES)}")
        return cls(content["version"], content["threshold"], content["bias"], tuple(content["weights"].values()))

    def judge(self, first: str, second: str, similarity: float) -> Verdict:
        """Judge two prompts whose vectors have the cosine `similarity`."""
        if max(len(first), len(second)) > MOST_CHARACTERS:
            return Verdict("long", 0.0, is_settled=True)
        refusal, figures, is_settled = compare(read(first), read(second), similarity)
        if refusal:
            return Verdict(refusal, 0.0, is_settled)
        probability = 1 / (1 + math.exp(-self.bias - sum(w * x for w, x in zip(self.weights, figures, strict=True))))
        if probability < self.threshold:
            return Verdict("unlike", probability)
        return Verdict(None, probability, is_settled)

    def verdicts(self, prompt: str, candidates: Sequence[tuple[str, float]]) -> Iterator[Verdict]:
        """Judge stored prompts with their cosines, one after the other."""
        for stored, similarity in candidates:
            yield self.judge(prompt, stored, similarity)
