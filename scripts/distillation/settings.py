"""How to learn: every number that a run depends on."""

import math
from dataclasses import dataclass

from scripts.distillation.errors import DistillationError


@dataclass(frozen=True)
class Weights:
    """Weights of the losses. `kl`, `ce` and `hidden` are a language model's, `cosine` and `pairs` an encoder's.

    The teacher's distribution says more than the text it read, so the other losses of a language model only assist it.
    """

    kl: float = 1.0
    ce: float = 0.1
    hidden: float = 0.1
    cosine: float = 1.0
    pairs: float = 1.0


@dataclass(frozen=True)
class Settings:
    """AdamW with a linear warm-up and a cosine decay, on `rows` samples a step of at most `length` tokens on average.

    A run is `steps` long, or `minutes`: only the first gives the same student every time. Raises DistillationError
    for a value that cannot work.
    """

    steps: int | None = None
    minutes: float | None = None
    rows: int = 16
    length: int = 128
    peak_rate: float = 5e-4
    temperature: float = 2.0
    seed: int = 0
    evaluations: int = 20  # of held-out data in a run
    patience: int = 5  # evaluations without a better held-out loss, after which learning stops
    warmup: float = 0.03
    weight_decay: float = 0.0
    weights: Weights = Weights()

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise DistillationError("a run has a number of steps or of minutes: give one of them, not both")
        for name in ("rows", "evaluations", "patience", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DistillationError(f"{name} is {value}: it must be at least 1")
        if self.length < 2:
            raise DistillationError(f"length is {self.length}: it must be at least 2 tokens")
        for name in ("peak_rate", "temperature", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise DistillationError(f"{name} is {value}: it must be above 0")

    def done(self, steps: int, seconds: float) -> float:
        """Return how much of a run lies behind after so many steps and seconds, from 0 to 1."""
        if self.steps is not None:
            return min(1.0, steps / self.steps)
        assert self.minutes is not None
        return min(1.0, seconds / (60 * self.minutes))

    def rate(self, done: float) -> float:
        """Return the learning rate when so much is done, from 0 to 1."""
        if done < self.warmup:
            return self.peak_rate * (done + 1e-3) / self.warmup
        return self.peak_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
