"""One answer on its way through the engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from speculative_decoding.acceptance_rate import AcceptanceRate
from speculative_decoding.logprobs import TokenLogprob
from speculative_decoding.options import GenerationOptions
from speculative_decoding.prompt_lookup import PromptLookup
from speculative_decoding.sampling import Sampler

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
# Called on the engine's thread with new tokens, and with the reason when there will be no more.
Listener = Callable[["Sequence", list[int], FinishReason | None], None]


@dataclass(eq=False)
class Sequence:
    """A prompt, what has been decoded of one answer to it, and what that took.

    model_ends: the model's end tokens. index: which of a request's answers it is. reused: tokens of the prompt whose
    keys and values were in the cache. rates: how often drafts stood, by speculation.Source. logprobs: of each token of
    the answer, when asked for.
    """

    prompt: list[int]
    options: GenerationOptions
    listener: Listener
    model_ends: frozenset[int]
    index: int = 0
    arrived: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(init=False)  # prompt and answer: what is committed
    ends: frozenset[int] = field(init=False)
    sampler: Sampler = field(init=False)
    lookup: PromptLookup = field(init=False)
    rates: dict[int, AcceptanceRate] = field(default_factory=dict)
    logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)
    submitted: bool = False
    cancelled: bool = False
    reused: int = 0
    drafted: int = 0
    accepted: int = 0
    admitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    finished: float = 0.0

    def __post_init__(self) -> None:
        options = self.options
        self.tokens = list(self.prompt)
        self.ends = frozenset(options.stop_token_ids) | (frozenset() if options.ignore_eos else self.model_ends)
        self.sampler = Sampler(options, self.prompt, self.ends)
        self.lookup = PromptLookup(self.tokens)

    @property
    def answered(self) -> int:
        """Tokens decoded so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def by_rejection(self) -> bool:
        """Whether drafts are judged by rejection sampling; without a temperature that is the same as exactly."""
        return self.options.acceptance == "rejection" and self.options.temperature > 0

    @property
    def needs_host(self) -> bool:
        """Whether more than filters and noise, which a device has, decides what comes next or is told of it."""
        return self.by_rejection or self.sampler.looks_back or self.options.logprobs is not None

    @property
    def deadline(self) -> float:
        """When its client stops waiting, on time.monotonic()'s clock."""
        return self.options.deadline(self.arrived)

    @property
    def acceptance_rate(self) -> float | None:
        """Share of drafted tokens that the target accepted, None when none was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    def until_end(self, tokens: list[int], context: int) -> tuple[list[int], FinishReason | None]:
        """Return those of the next tokens that the answer still takes, and why it ends with them, if it does.

        context: tokens that prompt and answer can have.
        """
        room = min(self.options.max_tokens - self.answered, context - len(self.tokens))
        for place, token in enumerate(tokens[:room]):
            if token in self.ends:
                return tokens[:place], "stop"
        return tokens[:room], "length" if len(tokens) >= room else None

    def commit(self, tokens: list[int]) -> None:
        """Take in what has become part of the answer."""
        self.tokens += tokens
        self.sampler.commit(tokens)

    def milliseconds(self) -> dict[str, float]:
        """Return the time spent waiting, in prefill and in decoding."""
        marks = (self.arrived, self.admitted, self.first_token, self.finished)
        names = ("queue", "prefill", "decode")
        spans = zip(names, marks, marks[1:], strict=False)
        return {name: round(max(0.0, end - begin) * 1e3, 3) for name, begin, end in spans}
