"""What the cache may serve, and for how long: the settings of one cache model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Policy:
    """Settings from config.pbtxt `parameters`; each field is a parameter of that name.

    similarity_threshold: least cosine between two prompts for a hit by meaning, above 0 and at most 1.
    cache_ttl_s: seconds that an answer lives unless its request says otherwise.
    max_prompt_bytes: longest prompt taken, in bytes of UTF-8.
    fronted_model: names the model, and its version, whose answers are stored: another name never sees them.
    embedder: Triton model that turns tokens into unit vectors.
    store_path: SQLite file; empty: in the folder that INFERENCE_STATE_DIR names.
    """

    similarity_threshold: float = 0.95
    cache_ttl_s: int = 86400
    max_prompt_bytes: int = 65536
    fronted_model: str = "language_model:1"
    embedder: str = "embedder"
    store_path: str = ""

    def __post_init__(self) -> None:
        _require(0 < self.similarity_threshold <= 1, "similarity_threshold", self.similarity_threshold, "in (0, 1]")
        _require(self.cache_ttl_s > 0, "cache_ttl_s", self.cache_ttl_s, "a number of seconds above 0")
        _require(self.max_prompt_bytes > 0, "max_prompt_bytes", self.max_prompt_bytes, "a number of bytes above 0")
        _require(bool(self.fronted_model), "fronted_model", self.fronted_model, "a name such as language_model:1")
        _require(bool(self.embedder), "embedder", self.embedder, "the name of a model")

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> Self:
        """Read the parameters of config.pbtxt; keys in capitals are Triton's own. Raises ValueError naming the key."""
        types = {field.name: type(field.default) for field in fields(cls)}
        settings = {name: text for name, text in parameters.items() if not name.isupper()}
        if unknown := sorted(settings.keys() - types.keys()):
            raise ValueError(f"unknown parameter {unknown[0]!r}; the semantic cache has {', '.join(types)}")
        return cls(**{name: _convert(name, text, types[name]) for name, text in settings.items()})


def _convert(name: str, text: str, wanted: type) -> Any:
    try:
        return wanted(text)
    except ValueError:
        raise ValueError(f"parameter {name} is {text!r}; it must be of type {wanted.__name__}") from None


def _require(holds: bool, name: str, value: object, right: str) -> None:
    if not holds:
        raise ValueError(f"parameter {name} is {value!r}; it must be {right}")
