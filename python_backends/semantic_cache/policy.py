"""What the cache may serve, and for how long: the settings of one cache model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from semantic_cache.store import ORDERS

VERIFIED_THRESHOLD, PLAIN_THRESHOLD = 0.6, 0.95


@dataclass(frozen=True, slots=True)
class Policy:
    """Settings from config.pbtxt `parameters`; each field is a parameter of that name.

    verify: whether a prompt found by its vector is served only if its words, too, say that it is the same question.
    similarity_threshold: least cosine between two prompts to look at, in (0, 1]; 0 means 0.6, or 0.95 without verify.
    cache_ttl_s: seconds that an answer lives unless its request says otherwise. ttl_jitter: by what share of it at
    most it dies sooner, so that what came together does not go together.
    max_prompt_bytes: longest prompt taken, in bytes of UTF-8.
    max_entries, max_bytes, eviction: what the store may hold, and what goes first (lru, lfu or cost).
    fronted_model: names the model, and its version, whose answers are stored: another name never sees them.
    embedder: Triton model that turns tokens into unit vectors, and its version.
    pair_model: Triton model that says of two prompts' tokens whether they are the same request, and its version; empty:
    with verify, words alone decide.
    store: SQLite file, postgresql:// URL or https:// endpoint of Azure Cosmos DB; empty: a file in the folder that
    INFERENCE_STATE_DIR names.
    upstream_model: Triton text model to ask on a miss; empty: the next step of the ensemble answers.
    upstream_url: the server that has it, and shadow_model; the environment variable INFERENCE_HTTP_URL has precedence.
    default_temperature: what the fronted model takes where a request does not say: 0 for ours, 1 for vLLM.
    error_target: adaptive bound, the share of wrong answers allowed (vCache's delta); 0: off.
    shadow_share: share of hits by meaning that shadow_model decodes anyway, to compare.
    false_hit_budget: share of wrong ones among these beyond which a partition serves no hits by meaning.
    """

    verify: bool = True
    similarity_threshold: float = 0.0
    cache_ttl_s: int = 86400
    ttl_jitter: float = 0.1
    max_prompt_bytes: int = 65536
    max_entries: int = 1_000_000
    max_bytes: int = 8 * 2**30
    eviction: str = "lru"
    fronted_model: str = "language_model:1"
    embedder: str = "embedder:1"
    pair_model: str = "pair_model:1"
    store: str = ""
    upstream_model: str = ""
    upstream_url: str = "http://127.0.0.1:8000"
    default_temperature: float = 0.0
    error_target: float = 0.0
    shadow_share: float = 0.0
    shadow_model: str = "language_model"
    false_hit_budget: float = 0.02

    def __post_init__(self) -> None:
        _require(0 <= self.similarity_threshold <= 1, "similarity_threshold", self.similarity_threshold, "in (0, 1]")
        _require(self.cache_ttl_s > 0, "cache_ttl_s", self.cache_ttl_s, "a number of seconds above 0")
        _require(0 <= self.ttl_jitter < 1, "ttl_jitter", self.ttl_jitter, "in [0, 1)")
        for name in ("max_prompt_bytes", "max_entries", "max_bytes"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        _require(self.eviction in ORDERS, "eviction", self.eviction, f"one of {', '.join(ORDERS)}")
        _require(bool(self.fronted_model), "fronted_model", self.fronted_model, "a name such as language_model:1")
        _require(_is_version(self.embedder), "embedder", self.embedder, "a name and version: embedder:1")
        right = not self.pair_model or _is_version(self.pair_model)
        _require(right, "pair_model", self.pair_model, "a name and version, as pair_model:1, or empty")
        for share in ("error_target", "shadow_share", "false_hit_budget"):
            _require(0 <= getattr(self, share) <= 1, share, getattr(self, share), "in [0, 1]")
        if not self.similarity_threshold:
            object.__setattr__(self, "similarity_threshold", VERIFIED_THRESHOLD if self.verify else PLAIN_THRESHOLD)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> Self:
        """Read the parameters of config.pbtxt; keys in capitals are Triton's own. Raises ValueError naming the key."""
        types = {field.name: type(field.default) for field in fields(cls)}
        settings = {name: text for name, text in parameters.items() if not name.isupper()}
        if unknown := sorted(settings.keys() - types.keys()):
            raise ValueError(f"unknown parameter {unknown[0]!r}; the semantic cache has {', '.join(types)}")
        return cls(**{name: _convert(name, text, types[name]) for name, text in settings.items()})


def _is_version(model: str) -> bool:
    name, _, version = model.partition(":")
    return bool(name) and version.isdecimal()


def _convert(name: str, text: str, wanted: type) -> Any:
    if wanted is bool:
        _require(text in ("true", "false"), name, text, "true or false")
        return text == "true"
    try:
        return wanted(text)
    except ValueError:
        raise ValueError(f"parameter {name} is {text!r}; it must be of type {wanted.__name__}") from None


def _require(holds: bool, name: str, value: object, right: str) -> None:
    if not holds:
        raise ValueError(f"parameter {name} is {value!r}; it must be {right}")
