"""One request on its way through the engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from speculative_decoding.options import GenerationOptions

FinishReason = Literal["stop", "length", "cancelled", "error"]
# Called on the engine's thread with new tokens, and with the reason when there will be no more.
Listener = Callable[["Sequence", list[int], FinishReason | None], None]


@dataclass(eq=False)
class Sequence:
    """A prompt, what has been decoded of its answer, and what that took."""

    prompt: list[int]
    options: GenerationOptions
    listener: Listener
    tokens: list[int] = field(init=False)  # prompt and answer: what is committed
    cancelled: bool = False  # set by any thread, seen by the engine before its next step
    drafted: int = 0
    accepted: int = 0
    arrived: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def answered(self) -> int:
        """Tokens decoded so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def acceptance_rate(self) -> float | None:
        """Share of drafted tokens that the target accepted, None when none was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    def milliseconds(self) -> dict[str, float]:
        """Return the time spent waiting, in prefill and in decoding."""
        marks = (self.arrived, self.admitted, self.first_token, self.finished)
        names = ("queue", "prefill", "decode")
        spans = zip(names, marks, marks[1:], strict=False)
        return {name: round(max(0.0, end - begin) * 1e3, 3) for name, begin, end in spans}
