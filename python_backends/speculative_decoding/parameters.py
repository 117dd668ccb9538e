"""Checks of config.pbtxt parameters: each takes one out of those given, or names it, its value and what is right."""

from collections.abc import Collection

AUTO = "auto"


def take_integer(given: dict[str, str], name: str, least: int, most: int, default: int) -> int:
    """Return an integer from `least` to `most`. Raises ValueError."""
    text = given.pop(name, str(default))
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"parameter {name} is {text!r}; it must be an integer from {least} to {most}")
    return int(text)


def take_bytes(given: dict[str, str], name: str) -> int | None:
    """Return a number of bytes, None for "auto", which is the default. Raises ValueError."""
    text = given.pop(name, AUTO)
    if text != AUTO and not text.isdecimal():
        raise ValueError(f'parameter {name} is {text!r}; it must be "{AUTO}" or a number of bytes, 0 for none')
    return None if text == AUTO else int(text)


def take_choice(given: dict[str, str], name: str, choices: Collection[str], default: str) -> str:
    """Return one of `choices`. Raises ValueError."""
    text = given.pop(name, default)
    if text not in choices:
        quoted = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"parameter {name} is {text!r}; it must be {quoted}")
    return text


def take_flag(given: dict[str, str], name: str, default: bool) -> bool:
    """Return whether a parameter is "true". Raises ValueError."""
    return take_choice(given, name, ("true", "false"), "true" if default else "false") == "true"
