"""One way to serve a model."""

from dataclasses import dataclass

from scripts.optimization.batching import Settings

FP32 = "fp32"
STUDENT = "student"


@dataclass(frozen=True)
class Setup:
    """What is applied. At first nothing is: fp32, one request at a time, nothing kept.

    weights: "fp32", a precision, "student" or "student <precision>". batching: of a language model, max_batch_size is
    how many sequences are decoded together, and the rest means nothing. speculation: tokens drafted at most.
    """

    weights: str
    batching: Settings
    cached: bool = False
    speculation: int = 0
    keeps_prefixes: bool = False

    @property
    def precision(self) -> str:
        """Of the weights, whoever's they are."""
        return self.weights.removeprefix(STUDENT).strip() or FP32

    def describe(self) -> str:
        """Return it in a few words."""
        parts = [self.weights, self._describe_batching()]
        parts += ["cache"] if self.cached else []
        parts += [f"speculation {self.speculation}"] if self.speculation else []
        parts += ["prefixes kept"] if self.keeps_prefixes else []
        return ", ".join(parts)

    def _describe_batching(self) -> str:
        if self.batching.max_queue_delay_us is not None:
            return self.batching.describe()
        together = self.batching.max_batch_size
        at_once = f"{together} at once" if together > 1 else "one at a time"
        return f"{at_once}, {self.batching.instances} x {self.batching.threads} threads"
