"""A chat, as a request carries it."""

from typing import NamedTuple

from speculative_decoding.validation import from_json, refuse

ROLES = ("system", "user", "assistant", "tool")
MAX_MESSAGES = 1024
RIGHT = f"a JSON list of 1 to {MAX_MESSAGES} objects with role (one of {', '.join(ROLES)}) and content (a string)"


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


def parse_messages(value: object) -> tuple[Message, ...]:
    """Read the parameter `messages`, a JSON string or a list. Raises InvalidOptionError."""
    listed = from_json(value)
    if not isinstance(listed, list) or not 0 < len(listed) <= MAX_MESSAGES:
        raise refuse("messages", value, RIGHT)
    return tuple(_message(item, value) for item in listed)


def _message(item: object, value: object) -> Message:
    if not isinstance(item, dict) or item.keys() != {"role", "content"}:
        raise refuse("messages", value, RIGHT)
    role, content = item["role"], item["content"]
    if role not in ROLES or not isinstance(content, str):
        raise refuse("messages", value, RIGHT)
    return Message(role, content)
