"""What clients ask of the cache: a lookup of a prompt, or the storing of an answer."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from semantic_cache.key import Keys, Parameter
from semantic_cache.policy import Policy
from semantic_cache.records import Key

MODES = ("on", "off", "refresh", "only")
OWN = ("cache", "tenant", "cache_ttl_s", "cache_max_age_s", "cache_tags", "cache_sampled")
MAX_TENANT_LENGTH = 128
MAX_TAGS, MAX_TAG_LENGTH = 16, 64
MAX_TTL_S = 10 * 366 * 86400
SESSION = "session_"  # what the language model's parameters of sessions begin with
MAX_SHOWN = 80  # characters of a bad value that an error message repeats


class InvalidRequest(ValueError):  # noqa: N818 - said of the request, not of the code
    """The request cannot be served; the message names the field, its value and what would be right."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """A prompt to find.

    mode: one of MODES. max_age_s: oldest answer wanted, None for any. stores: whether an answer may be kept.
    flight: requests of the same flight may share one answer; empty: none may. parameters: those that are not the
    cache's own. received: when, in seconds of the monotonic clock.
    """

    prompt: str
    key: Key
    tenant: bytes
    mode: str
    ttl_s: int
    max_age_s: int | None
    tags: tuple[str, ...]
    stores: bool
    flight: str
    parameters: Mapping[str, Parameter]
    received: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to store under the handle `entry` that a lookup gave out; `info` is a JSON object kept with it."""

    entry: str
    text: str
    info: str


def parse_lookup(prompt: bytes, parameters: Mapping[str, Parameter], policy: Policy, keys: Keys) -> Lookup:
    """Check one lookup. Raises InvalidRequest."""
    own = {name: parameters[name] for name in OWN if name in parameters}
    others = {name: value for name, value in parameters.items() if name not in own}
    if unknown := sorted(name for name in others if name.startswith("cache_")):
        raise InvalidRequest(f"unknown parameter {unknown[0]!r}; the cache has {', '.join(OWN)}")
    mode, tenant = own.get("cache", "on"), own.get("tenant", "default")
    if mode not in MODES:
        raise _invalid("cache", mode, f"one of {', '.join(MODES)}")
    if not isinstance(tenant, str) or not 0 < len(tenant) <= MAX_TENANT_LENGTH:
        raise _invalid("tenant", tenant, f"a string of 1 to {MAX_TENANT_LENGTH} characters")
    if any(name.startswith(SESSION) for name in others):
        return _bypass(str(mode), tenant, others, policy, keys)
    if policy.upstream_model and others.get("n", 1) not in (1, "1"):
        raise _invalid("n", others["n"], "1: an upstream model is asked for one answer")
    asked, walls = _question(prompt, others, policy.max_prompt_bytes)
    key = keys.make(asked, tenant, walls)
    repeatable = _is_repeatable(others, policy.default_temperature)
    return Lookup(
        prompt=asked,
        key=key,
        tenant=keys.tenant(tenant),
        mode=str(mode),
        ttl_s=_seconds(own, "cache_ttl_s", 1) or policy.cache_ttl_s,
        max_age_s=_seconds(own, "cache_max_age_s", 0),
        tags=_tags(own.get("cache_tags", "")),
        stores=_flag(own, "cache_sampled") or repeatable,
        flight=keys.flight(key) if repeatable and mode == "on" else "",
        parameters=others,
    )


def parse_answer(entry: bytes, answer: bytes | None, info: bytes | None) -> Answer:
    """Check one answer to store. Raises InvalidRequest."""
    if answer is None:
        raise InvalidRequest("answer is missing; send it with cache_entry")
    info_text = decode("answer_info", info or b"{}")
    if not isinstance(_json(info_text), dict):
        raise _invalid("answer_info", info_text, "a JSON object")
    return Answer(decode("cache_entry", entry), decode("answer", answer), info_text)


def decode(name: str, value: bytes) -> str:
    """Decode a field. Raises InvalidRequest for what is not UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        byte = value[error.start]
        raise InvalidRequest(f"{name} has the byte 0x{byte:02x} at {error.start}; it must be valid UTF-8") from None


def _bypass(mode: str, tenant: str, parameters: Mapping[str, Parameter], policy: Policy, keys: Keys) -> Lookup:
    """Return a lookup that finds nothing: what was said before in a session is part of the question, so it is decoded.

    Raises InvalidRequest.
    """
    if policy.upstream_model:
        name = min(name for name in parameters if name.startswith(SESSION))
        raise InvalidRequest(f"{name} is given; {policy.upstream_model!r} is asked one question at a time")
    if mode == "only":
        raise _invalid("cache", mode, "on, off or refresh in a session, whose answers are not kept here")
    key = keys.make("", tenant, {})
    return Lookup("", key, keys.tenant(tenant), "off", policy.cache_ttl_s, None, (), False, "", parameters)


def _question(
    prompt: bytes, parameters: Mapping[str, Parameter], max_bytes: int
) -> tuple[str, Mapping[str, Parameter]]:
    """Return what is looked up, and the parameters that are walls: of a chat, all but what its last message says."""
    if "messages" not in parameters:
        return _prompt("text_input", prompt, max_bytes), parameters
    if prompt:
        raise InvalidRequest("text_input and messages are both given; with messages text_input must be empty")
    last, rest = _chat(parameters["messages"])
    return _prompt("the last content in messages", last, max_bytes), {**parameters, "messages": rest}


def _chat(messages: Parameter) -> tuple[bytes, str]:
    """Return what the last message of a chat says, and all else of the chat."""
    try:
        *others, last = json.loads(str(messages))
        return last.pop("content").encode(), json.dumps([others, last], sort_keys=True)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _invalid("messages", messages, "a JSON list of objects with role and content") from None


def _prompt(name: str, prompt: bytes, max_bytes: int) -> str:
    if len(prompt) > max_bytes:
        raise InvalidRequest(f"{name} is {len(prompt)} bytes long; it must be at most {max_bytes}")
    text = decode(name, prompt)
    if not text.strip():
        raise _invalid(name, text, f"a prompt of 1 to {max_bytes} bytes")
    return text


def _is_repeatable(parameters: Mapping[str, Parameter], default_temperature: float) -> bool:
    """Whether asking again would give the same answer: nothing is sampled, or with a seed."""
    temperature = parameters.get("temperature", default_temperature)
    return temperature in (0, "0", "0.0") or parameters.get("seed") is not None


def _seconds(own: Mapping[str, Parameter], name: str, least: int) -> int | None:
    value = own.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_TTL_S:
        raise _invalid(name, value, f"a whole number of seconds from {least} to {MAX_TTL_S}")
    return value


def _flag(own: Mapping[str, Parameter], name: str) -> bool:
    value = own.get(name, False)
    if not isinstance(value, bool):
        raise _invalid(name, value, "true or false")
    return value


def _tags(value: Parameter) -> tuple[str, ...]:
    tags = tuple(tag.strip() for tag in value.split(",") if tag.strip()) if isinstance(value, str) else None
    if tags is None or len(tags) > MAX_TAGS or any(len(tag) > MAX_TAG_LENGTH for tag in tags):
        raise _invalid("cache_tags", value, f"up to {MAX_TAGS} tags of up to {MAX_TAG_LENGTH} characters, by commas")
    return tags


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _invalid(name: str, value: object, right: str) -> InvalidRequest:
    shown = repr(value)
    return InvalidRequest(
        f"{name} is {shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + '...'}; it must be {right}"
    )
