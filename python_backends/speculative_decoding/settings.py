"""What config.pbtxt sets for a language model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from speculative_decoding.options import MAX_SPECULATION_LENGTH
from speculative_decoding.tokenizer import PromptFormat


@dataclass(frozen=True)
class Settings:
    """The `parameters` of a language model's config.pbtxt.

    max_sequences: sequences decoded at once. max_waiting: requests that may wait for a slot, beyond which the answer is
    UNAVAILABLE. speculation_length: tokens drafted per round unless a request says otherwise. threads
    (intra_op_thread_count): the target's, 0 for one per core. prompt_format: "chat" renders text_input as one user
    message, "raw" takes it as it is. cache_model: the model that answers are sent to, to be stored.
    """

    max_sequences: int = 8
    max_waiting: int = 256
    speculation_length: int = 4
    threads: int = 0
    prompt_format: PromptFormat = "raw"
    cache_model: str = "semantic_cache"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Read Triton's JSON form of a config.pbtxt. Raises ValueError naming the parameter that is wrong."""
        given = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        settings = cls(
            max_sequences=_integer(given, "max_sequences", 1, 1024, cls.max_sequences),
            max_waiting=_integer(given, "max_waiting", 0, 1_000_000, cls.max_waiting),
            speculation_length=_integer(given, "speculation_length", 0, MAX_SPECULATION_LENGTH, cls.speculation_length),
            threads=_integer(given, "intra_op_thread_count", 0, 1024, cls.threads),
            prompt_format=_prompt_format(given.pop("prompt_format", cls.prompt_format)),
            cache_model=given.pop("cache_model", cls.cache_model),
        )
        if given:
            raise ValueError(f"unknown parameter {sorted(given)[0]!r} in config.pbtxt")
        return settings


def _integer(given: dict[str, str], name: str, least: int, most: int, default: int) -> int:
    text = given.pop(name, str(default))
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"parameter {name} is {text!r}; it must be an integer from {least} to {most}")
    return int(text)


def _prompt_format(text: str) -> PromptFormat:
    if text not in ("chat", "raw"):
        raise ValueError(f'parameter prompt_format is {text!r}; it must be "chat" or "raw"')
    return cast(PromptFormat, text)
