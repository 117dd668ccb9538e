"""Checks of single request fields: each returns the value, or names the field, the value and what would be right."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

MAX_SHOWN = 80  # characters of a bad value that an error message repeats


class InvalidOptionError(ValueError):
    """A request asks for something that cannot be; the message names the field, its value and what would be right."""


def refuse(name: str, value: object, right: str) -> InvalidOptionError:
    """Return the error for a field whose value is not as it must be."""
    shown = repr(value)
    shown = shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "..."
    return InvalidOptionError(f"{name} is {shown}; it must be {right}")


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return an integer from `least` to `most`. Raises InvalidOptionError."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        raise refuse(name, value, f"an integer {bounds}")
    return value


def number(name: str, value: object, least: float, most: float, above: bool = False) -> float:
    """Return a number from `least` (not itself, with `above`) to `most`. Raises InvalidOptionError."""
    bounds = f"above {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
    right = f"a number {bounds}"
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise refuse(name, value, right)
    if value < least or value > most or (above and value == least):
        raise refuse(name, value, right)
    return float(value)


def flag(name: str, value: object) -> bool:
    """Return a boolean. Raises InvalidOptionError."""
    if not isinstance(value, bool):
        raise refuse(name, value, "true or false")
    return value


def choice(name: str, value: object, choices: Collection[str]) -> str:
    """Return one of `choices`. Raises InvalidOptionError."""
    if not isinstance(value, str) or value not in choices:
        raise refuse(name, value, f"one of {', '.join(choices)}")
    return value


def name(field: str, value: object, longest: int) -> str:
    """Return a string of 1 to `longest` characters. Raises InvalidOptionError."""
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        raise refuse(field, value, f"a string of 1 to {longest} characters")
    return value


def strings(name: str, value: object, most: int, longest: int) -> tuple[str, ...]:
    """Return the strings of a list, of a JSON list, or one string alone. Raises InvalidOptionError."""
    right = f"a string, or a JSON list of at most {most} strings, each of 1 to {longest} characters"
    listed = from_json(value)
    if isinstance(listed, str):
        listed = [listed]
    if not isinstance(listed, list) or len(listed) > most:
        raise refuse(name, value, right)
    if not all(isinstance(text, str) and 0 < len(text) <= longest for text in listed):
        raise refuse(name, value, right)
    return tuple(listed)


def token_ids(name: str, value: object, vocabulary: int, most: int) -> tuple[int, ...]:
    """Return the token ids of a list or of a JSON list. Raises InvalidOptionError."""
    right = f"a JSON list of at most {most} token ids from 0 to {vocabulary - 1}"
    listed = from_json(value)
    if not isinstance(listed, list) or len(listed) > most:
        raise refuse(name, value, right)
    if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < vocabulary for item in listed):
        raise refuse(name, value, right)
    return tuple(listed)


def biases(name: str, value: object, vocabulary: int, most: int) -> tuple[tuple[int, float], ...]:
    """Return (token id, bias) pairs of an object or of a JSON object, in order of id. Raises InvalidOptionError."""
    right = f"a JSON object of at most {most} token ids from 0 to {vocabulary - 1}, each with a bias from -100 to 100"
    given = from_json(value)
    if not isinstance(given, Mapping) or len(given) > most:
        raise refuse(name, value, right)
    pairs: dict[int, float] = {}
    for key, bias in given.items():
        if not str(key).isdecimal() or int(key) >= vocabulary or not _is_bias(bias):
            raise refuse(name, value, right)
        pairs[int(key)] = float(bias)
    return tuple(sorted(pairs.items()))


def from_json(value: object) -> Any:
    """Return what a string holds as JSON when that is a list or an object, any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, list | dict) else value


def _is_bias(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 100
