"""A request as it comes from Triton: prompt, options, what to return, and what the semantic cache found."""

import json
import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

from speculative_decoding.options import GenerationOptions
from speculative_decoding.session_request import SessionRequest
from speculative_decoding.settings import Settings
from speculative_decoding.tokenizer import Tokenizer
from speculative_decoding.triton_tensors import flag_input, object_input, text_input
from speculative_decoding.validation import InvalidOptionError, refuse

# Inputs that ask for an output of the same name, as vLLM's backend has them.
RETURNABLE = ("finish_reason", "num_input_tokens", "num_output_tokens", "logprobs", "cumulative_logprob")


@dataclass(frozen=True)
class Cached:
    """What the semantic cache says: `answer` (empty: a miss), `info` with it, and the handle to store under.

    asked: when it was asked, in seconds of the monotonic clock.
    """

    answer: str
    info: dict[str, Any]
    entry: str
    asked: float = math.inf


@dataclass(frozen=True)
class GenerationRequest:
    """text: the prompt as it was sent. prepended: whether the answer begins with it. returned: names in RETURNABLE.

    session: what is asked of a session, None for a request without.
    """

    text: str
    options: GenerationOptions
    prepended: bool
    returned: frozenset[str]
    cached: Cached
    session: SessionRequest | None
    arrived: float = field(default_factory=time.monotonic)

    @classmethod
    def read(cls, request: Any, settings: Settings, vocabulary: int) -> "GenerationRequest":
        """Read and check Triton's request for a model of `vocabulary` tokens. Raises InvalidOptionError."""
        parameters = json.loads(request.parameters() or "{}")
        if (stream := flag_input(request, "stream")) is not None:
            parameters["stream"] = stream
        if not parameters.get("timeout") and request.timeout():
            parameters["timeout"] = request.timeout()
        parameters |= object_input(request, "sampling_parameters")
        returned = frozenset(name for name in RETURNABLE if flag_input(request, f"return_{name}"))
        if returned & {"logprobs", "cumulative_logprob"}:
            parameters.setdefault("logprobs", 0)
        options = GenerationOptions.parse(parameters, vocabulary)
        prepended = flag_input(request, "exclude_input_in_output") is False
        if prepended and (options.stream or options.messages):
            raise refuse("exclude_input_in_output", False, "true with stream or messages")
        return cls(
            text=text_input(request, "text_input"),
            options=replace(options, priority=_level(options.priority, settings)),
            prepended=prepended,
            returned=returned,
            cached=_cached(request),
            session=SessionRequest.parse(parameters, settings.reuse.session_ttl_s),
        )

    @property
    def flight(self) -> tuple[str, str, GenerationOptions] | None:
        """What requests have in common that may share their answers, None when this one may not.

        It must be one that decoding again would repeat, token for token. Who is served sooner does not wait for others.
        """
        name = self.cached.info.get("flight")
        if not name or self.options.acceptance != "exact":
            return None
        own = replace(self.options, stream=False, speculation_length=None, drafter="auto", timeout=0)
        return str(name), self.text, own

    def encode(self, tokenizer: Tokenizer, limit: int) -> list[int]:
        """Return the prompt's tokens, fewer than `limit`. Raises InvalidOptionError."""
        self.check_input(tokenizer, limit)
        messages = self.options.messages
        field = "messages" if messages else "text_input"
        tokens = tokenizer.encode_messages(messages) if messages else tokenizer.encode_prompt(self.text)
        if not tokens:
            raise InvalidOptionError(f"{field} is {self.text!r}, which has no tokens; it must be a prompt")
        if len(tokens) >= limit:
            raise InvalidOptionError(f"{field} has {len(tokens)} tokens; it may have at most {limit - 1}")
        return tokens

    def check_input(self, tokenizer: Tokenizer, limit: int) -> None:
        """Raise InvalidOptionError unless there is one prompt, or one chat, that can have fewer than `limit` tokens."""
        messages = self.options.messages
        if messages and self.text:
            raise InvalidOptionError("text_input and messages are both given; with messages text_input must be empty")
        field = "messages" if messages else "text_input"
        if not (messages or self.text):
            raise InvalidOptionError("text_input is empty; it must be a prompt")
        size = sum(len(message.content.encode()) for message in messages) + len(self.text.encode())
        if size > limit * tokenizer.longest_token:
            raise InvalidOptionError(f"{field} has {size} bytes; the context holds {limit} tokens")


def _level(priority: int, settings: Settings) -> int:
    if priority > settings.priority_levels:
        raise refuse("priority", priority, f"an integer from 0 to {settings.priority_levels}")
    return priority or settings.default_priority_level


def _cached(request: Any) -> Cached:
    info = object_input(request, "cache_info")
    if not isinstance(info.get("milliseconds", {}), dict):
        raise InvalidOptionError(f"cache_info has milliseconds {info['milliseconds']!r}; it must be a JSON object")
    asked = info.get("asked", math.inf)
    if not isinstance(asked, int | float):
        raise InvalidOptionError(f"cache_info has asked {asked!r}; it must be a number of seconds")
    return Cached(text_input(request, "cached_output"), info, text_input(request, "cache_entry"), asked)
