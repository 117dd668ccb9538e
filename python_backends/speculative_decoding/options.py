"""What a request may ask for, checked once, where it enters."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

from speculative_decoding import session_request, validation
from speculative_decoding.messages import Message, parse_messages
from speculative_decoding.validation import InvalidOptionError, refuse

# Parameters of other steps of the ensemble, of sessions, and of Triton itself, that reach this model too.
NOT_OURS = frozenset({"cache"}) | session_request.NAMES
CACHE_PREFIX = "cache_"
MAX_SPECULATION_LENGTH = 16
MAX_LOGPROBS = 5
MAX_ANSWERS = 16
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 1024
MAX_SEED = 2**63 - 1
MAX_TENANT_LENGTH = 128  # characters, as in the semantic cache

Acceptance = Literal["exact", "rejection"]
DrafterName = Literal["auto", "model", "prompt_lookup", "none"]
ACCEPTANCES = ("exact", "rejection")
DRAFTERS = ("auto", "model", "prompt_lookup", "none")


@dataclass(frozen=True)
class GenerationOptions:
    """How to answer one request. Names and meanings are vLLM's where it has them.

    max_tokens, min_tokens: at most, at least so many new tokens. temperature: 0 takes the likeliest token.
    top_p, top_k (0 for all), min_p: which tokens may be sampled. repetition_penalty: over prompt and answer;
    presence_penalty, frequency_penalty: over the answer. logit_bias: (token id, bias). seed: None draws one; answer i
    of several uses seed + i. stop: strings that end the answer, before them. stop_token_ids: tokens that end it.
    ignore_eos: the model's own end tokens do not. logprobs: None, or how many of the likeliest tokens to report with
    each chosen one. n: answers. stream: a response per step instead of one. messages: a chat in place of a prompt.
    speculation_length: at most so many tokens drafted per round, 0 for plain decoding, None for the model's default.
    acceptance: "exact" gives the tokens of plain decoding, "rejection" tokens of the same distribution. priority: a
    lower level is served first, 0 for the default level. timeout: microseconds from arrival to the answer, 0 for any.
    tenant: whose cached keys and values may be used.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    stream: bool = False
    messages: tuple[Message, ...] = ()
    speculation_length: int | None = None
    acceptance: Acceptance = "exact"
    drafter: DrafterName = "auto"
    priority: int = 0
    timeout: int = 0
    tenant: str = "default"

    @classmethod
    def parse(cls, parameters: Mapping[str, Any], vocabulary: int) -> "GenerationOptions":
        """Read request parameters for a model of `vocabulary` tokens. Raises InvalidOptionError."""
        given = {
            name: value
            for name, value in parameters.items()
            if name not in NOT_OURS and not name.startswith((CACHE_PREFIX, "triton_")) and value is not None
        }
        checks = _checks(vocabulary)
        if unknown := sorted(given.keys() - checks.keys()):
            known = ", ".join(sorted(checks.keys() | NOT_OURS))
            raise InvalidOptionError(f"unknown parameter {unknown[0]!r}; known are {known}")
        options = cls(**{name: checks[name](name, value) for name, value in given.items()})
        options.check_together()
        return options

    def check_together(self) -> None:
        """Raise InvalidOptionError for fields that exclude each other."""
        if self.min_tokens > self.max_tokens:
            raise refuse("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")
        if self.stream and self.n > 1:
            raise refuse("n", self.n, "1 with stream")

    def for_answer(self, index: int) -> "GenerationOptions":
        """Return the options of answer `index` out of n: the same with a seed of its own."""
        if index == 0 or self.seed is None:
            return self
        return replace(self, seed=(self.seed + index) % (MAX_SEED + 1))

    def deadline(self, arrived: float) -> float:
        """Return when the client of a request that arrived then stops waiting."""
        return arrived + self.timeout / 1e6 if self.timeout else math.inf

    @cached_property
    def is_bare(self) -> bool:
        """Whether the answer is just the likeliest token, each time."""
        return not (self.temperature or self.min_tokens or self.logit_bias or self.has_penalties)

    @property
    def wants_draft_model(self) -> bool:
        """Whether the draft model may propose tokens."""
        return self.drafter in ("auto", "model") and self.speculation_length != 0

    @property
    def has_penalties(self) -> bool:
        """Whether a token's logit depends on which tokens came before."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)


def _checks(vocabulary: int) -> dict[str, Callable[[str, Any], Any]]:
    """Return by name what checks and converts each field."""
    integer, number, flag = validation.integer, validation.number, validation.flag
    return {
        "max_tokens": partial(integer, least=1),
        "min_tokens": partial(integer, least=0),
        "temperature": partial(number, least=0, most=100),
        "top_p": partial(number, least=0, most=1, above=True),
        "top_k": lambda name, value: max(0, integer(name, value, -1)),
        "min_p": partial(number, least=0, most=1),
        "repetition_penalty": partial(number, least=0, most=100, above=True),
        "presence_penalty": partial(number, least=-2, most=2),
        "frequency_penalty": partial(number, least=-2, most=2),
        "logit_bias": partial(validation.biases, vocabulary=vocabulary, most=MAX_BIASES),
        "seed": partial(integer, least=0, most=MAX_SEED),
        "stop": partial(validation.strings, most=MAX_STOPS, longest=MAX_STOP_CHARACTERS),
        "stop_token_ids": partial(validation.token_ids, vocabulary=vocabulary, most=MAX_STOPS),
        "ignore_eos": flag,
        "logprobs": partial(integer, least=0, most=MAX_LOGPROBS),
        "n": partial(integer, least=1, most=MAX_ANSWERS),
        "stream": flag,
        "messages": lambda name, value: parse_messages(value),
        "speculation_length": partial(integer, least=0, most=MAX_SPECULATION_LENGTH),
        "acceptance": partial(validation.choice, choices=ACCEPTANCES),
        "drafter": partial(validation.choice, choices=DRAFTERS),
        "priority": partial(integer, least=0),
        "timeout": partial(integer, least=0),
        "tenant": partial(validation.name, longest=MAX_TENANT_LENGTH),
    }
