"""What clients ask of the cache: a lookup of a prompt, or the storing of an answer."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from semantic_cache.key import Key, Parameter, make_key
from semantic_cache.policy import Policy

MODES = ("on", "off", "refresh")
MAX_TENANT_LENGTH = 128
MAX_SHOWN = 80  # characters of a bad value that an error message repeats


class InvalidRequest(ValueError):  # noqa: N818 - said of the request, not of the code
    """The request cannot be served; the message names the field, its value and what would be right."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """A prompt to find. `mode` is one of MODES; `received` is a time.perf_counter()."""

    prompt: str
    key: Key
    mode: str
    ttl_s: int
    received: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to store under the handle `entry` that a lookup gave out; `info` is a JSON object kept with it."""

    entry: str
    text: str
    info: str


def parse_lookup(prompt: bytes, parameters: Mapping[str, Parameter], policy: Policy) -> Lookup:
    """Check one lookup. Raises InvalidRequest."""
    others = dict(parameters)
    mode = others.pop("cache", "on")
    tenant = others.pop("tenant", "default")
    ttl_s = others.pop("cache_ttl_s", policy.cache_ttl_s)
    if mode not in MODES:
        raise _invalid("cache", mode, f"one of {', '.join(MODES)}")
    if not isinstance(tenant, str) or not 0 < len(tenant) <= MAX_TENANT_LENGTH:
        raise _invalid("tenant", tenant, f"a string of 1 to {MAX_TENANT_LENGTH} characters")
    if not isinstance(ttl_s, int) or isinstance(ttl_s, bool) or ttl_s <= 0:
        raise _invalid("cache_ttl_s", ttl_s, "a whole number of seconds above 0")
    if "messages" in others:
        prompt, others["messages"] = _chat(prompt, others["messages"])
    text = _prompt(prompt, policy.max_prompt_bytes)
    return Lookup(text, make_key(text, tenant, others, policy.fronted_model, policy.embedder), str(mode), ttl_s)


def parse_answer(entry: bytes, answer: bytes | None, info: bytes | None) -> Answer:
    """Check one answer to store. Raises InvalidRequest."""
    if answer is None:
        raise InvalidRequest("answer is missing; send it with cache_entry")
    info_text = _text("answer_info", info or b"{}")
    try:
        is_object = isinstance(json.loads(info_text), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise _invalid("answer_info", info_text, "a JSON object")
    return Answer(_text("cache_entry", entry), _text("answer", answer), info_text)


def _chat(prompt: bytes, messages: Parameter) -> tuple[bytes, str]:
    """Return what the last message of a chat says, which is looked up, and all else of it, which is a wall."""
    if prompt:
        raise InvalidRequest("text_input and messages are both given; with messages text_input must be empty")
    try:
        *others, last = json.loads(str(messages))
        return last["content"].encode(), json.dumps([others, last["role"]], sort_keys=True)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _invalid("messages", messages, "a JSON list of objects with role and content") from None


def _prompt(prompt: bytes, max_bytes: int) -> str:
    if len(prompt) > max_bytes:
        raise InvalidRequest(f"text_input is {len(prompt)} bytes long; it must be at most {max_bytes}")
    text = _text("text_input", prompt)
    if not text.strip():
        raise _invalid("text_input", text, f"a prompt of 1 to {max_bytes} bytes")
    return text


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        byte = value[error.start]
        raise InvalidRequest(f"{name} has the byte 0x{byte:02x} at {error.start}; it must be valid UTF-8") from None


def _invalid(name: str, value: object, right: str) -> InvalidRequest:
    shown = repr(value)
    return InvalidRequest(
        f"{name} is {shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + '...'}; it must be {right}"
    )
