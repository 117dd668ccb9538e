"""What config.pbtxt sets for a language model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from speculative_decoding.options import MAX_SPECULATION_LENGTH
from speculative_decoding.parameters import take_choice, take_integer
from speculative_decoding.reuse_settings import ReuseSettings
from speculative_decoding.tokenizer import PromptFormat


@dataclass(frozen=True)
class Settings:
    """The `parameters` of a language model's config.pbtxt.

    max_sequences: sequences decoded at once. max_waiting: requests that may wait for a slot, beyond which the answer is
    UNAVAILABLE. kv_bytes: keys and values of the target that sequences in slots may come to need together, 0 for as
    much as the slots hold. priority_levels, default_priority_level: as Triton's, level 1 is served first.
    speculation_length: tokens drafted per round at most, unless a request says otherwise. threads
    (intra_op_thread_count): the target's, 0 for one per core. prompt_format: "chat" renders text_input as one user
    message, "raw" takes it as it is. cache_model: the model that answers are sent to, to be stored. reuse: the
    key/value cache and sessions.
    """

    max_sequences: int = 8
    max_waiting: int = 256
    kv_bytes: int = 0
    priority_levels: int = 3
    default_priority_level: int = 2
    speculation_length: int = 4
    threads: int = 0
    prompt_format: PromptFormat = "raw"
    cache_model: str = "semantic_cache"
    reuse: ReuseSettings = field(default_factory=ReuseSettings)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Read Triton's JSON form of a config.pbtxt. Raises ValueError naming the parameter that is wrong."""
        given = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        longest = take_integer(given, "speculation_length", 0, MAX_SPECULATION_LENGTH, cls.speculation_length)
        prompt_format = take_choice(given, "prompt_format", ("chat", "raw"), cls.prompt_format)
        settings = cls(
            max_sequences=take_integer(given, "max_sequences", 1, 1024, cls.max_sequences),
            max_waiting=take_integer(given, "max_waiting", 0, 1_000_000, cls.max_waiting),
            kv_bytes=take_integer(given, "kv_bytes", 0, 1 << 60, cls.kv_bytes),
            priority_levels=take_integer(given, "priority_levels", 1, 1000, cls.priority_levels),
            default_priority_level=take_integer(given, "default_priority_level", 1, 1000, cls.default_priority_level),
            speculation_length=longest,
            threads=take_integer(given, "intra_op_thread_count", 0, 1024, cls.threads),
            prompt_format=cast(PromptFormat, prompt_format),
            cache_model=given.pop("cache_model", cls.cache_model),
            reuse=ReuseSettings.take(given),
        )
        if given:
            raise ValueError(f"unknown parameter {sorted(given)[0]!r} in config.pbtxt")
        if settings.default_priority_level > settings.priority_levels:
            level, levels = settings.default_priority_level, settings.priority_levels
            raise ValueError(
                f"parameter default_priority_level is {level}; it must be at most priority_levels, {levels}"
            )
        return settings
