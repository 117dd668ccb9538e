"""What a request may ask for, checked once, where it enters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Parameters of other steps of the ensemble, and of Triton itself, that reach this model too.
NOT_OURS = frozenset({"cache", "tenant", "cache_ttl_s", "priority", "timeout"})
MAX_SPECULATION_LENGTH = 16


class InvalidOptionError(ValueError):
    """A request asks for something that cannot be; the message names the field, its value and what would be right."""


@dataclass(frozen=True)
class GenerationOptions:
    """How to answer one request.

    max_tokens: at most so many new tokens. stream: a response per step instead of one. speculation_length: tokens to
    draft per round, 0 for plain decoding, None for the model's default.
    """

    max_tokens: int = 128
    stream: bool = False
    speculation_length: int | None = None

    @classmethod
    def parse(cls, parameters: Mapping[str, Any]) -> "GenerationOptions":
        """Read request parameters. Raises InvalidOptionError."""
        fields = {
            name: value
            for name, value in parameters.items()
            if name not in NOT_OURS and not name.startswith("triton_") and value is not None
        }
        unknown = sorted(fields.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            known = ", ".join(sorted(cls.__dataclass_fields__.keys() | NOT_OURS))
            raise InvalidOptionError(f"unknown parameter {unknown[0]!r}; known are {known}")
        if not isinstance(fields.get("stream", False), bool):
            raise InvalidOptionError(f"stream is {fields['stream']!r}; it must be true or false")
        _require_integer(fields, "max_tokens", 1, None)
        _require_integer(fields, "speculation_length", 0, MAX_SPECULATION_LENGTH)
        return cls(**fields)


def _require_integer(fields: Mapping[str, Any], name: str, least: int, most: int | None) -> None:
    value = fields.get(name, least)
    wrong_type = not isinstance(value, int) or isinstance(value, bool)
    if wrong_type or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidOptionError(f"{name} is {value!r}; it must be an integer {bounds}")
