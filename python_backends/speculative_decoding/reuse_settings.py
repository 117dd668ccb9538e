"""What config.pbtxt sets for the key/value cache and for sessions."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from speculative_decoding.kv_memory import FREE_SHARE, KVCacheSettings, default_kv_cache_bytes
from speculative_decoding.parameters import take_bytes, take_choice, take_flag, take_integer
from speculative_decoding.sessions import MAX_TTL_S

STATE_VARIABLE = "INFERENCE_STATE_DIR"
Conflict = Literal["wait", "refuse"]


@dataclass(frozen=True)
class ReuseSettings:
    """kv_cache_bytes: memory for keys and values of prefixes already seen, target's and draft's; 0 for none, None
    ("auto") for a quarter of what is free when the model is loaded. kv_cache_int8: keep cold ones in int8.
    kv_tier_bytes: what takes those pushed out, a file in kv_tier_folder or, of a GPU, memory of the host; 0 for none.
    kv_integrity_check_s: seconds between two checks of the cache, made while nothing is decoded, 0 for none.
    session_ttl_s: how long a session lives after its last request, unless that says otherwise. session_conflict:
    whether a request for a session that another has waits for it. session_store_path: SQLite file of the sessions.
    Paths that are empty are in the folder that INFERENCE_STATE_DIR names.
    """

    kv_cache_bytes: int | None = None
    kv_cache_int8: bool = False
    kv_tier_bytes: int = 0
    kv_tier_folder: str = ""
    kv_integrity_check_s: int = 0
    session_ttl_s: int = 3600
    session_conflict: Conflict = "wait"
    session_store_path: str = ""

    @classmethod
    def take(cls, given: dict[str, str]) -> "ReuseSettings":
        """Take these parameters out of those of a config.pbtxt. Raises ValueError naming the one that is wrong."""
        conflict = take_choice(given, "session_conflict", ("wait", "refuse"), cls.session_conflict)
        return cls(
            kv_cache_bytes=take_bytes(given, "kv_cache_bytes"),
            kv_cache_int8=take_flag(given, "kv_cache_int8", cls.kv_cache_int8),
            kv_tier_bytes=take_integer(given, "kv_tier_bytes", 0, 1 << 60, cls.kv_tier_bytes),
            kv_tier_folder=given.pop("kv_tier_folder", cls.kv_tier_folder),
            kv_integrity_check_s=take_integer(given, "kv_integrity_check_s", 0, 1 << 30, cls.kv_integrity_check_s),
            session_ttl_s=take_integer(given, "session_ttl_s", 1, int(MAX_TTL_S), cls.session_ttl_s),
            session_conflict=cast(Conflict, conflict),
            session_store_path=given.pop("session_store_path", cls.session_store_path),
        )

    def kv_cache(self, model: str) -> KVCacheSettings | None:
        """Return the cache's settings, None for no cache. Raises ValueError where the tier has no folder."""
        budget = default_kv_cache_bytes() if self.kv_cache_bytes is None else self.kv_cache_bytes
        if self.kv_cache_bytes == 0:
            return None
        tier = state_path(self.kv_tier_folder, f"{model}.kv_tier", "kv_tier_folder") if self.kv_tier_bytes else None
        return KVCacheSettings(budget, self.kv_cache_int8, self.kv_tier_bytes, tier)

    def device_bytes(self, free: int) -> tuple[int, int]:
        """Return the bytes for kept prefixes of a GPU, which has `free`, and of the host. Raises ValueError."""
        for name, given in (("kv_cache_int8", self.kv_cache_int8), ("kv_tier_folder", self.kv_tier_folder)):
            if given:
                raise ValueError(f"parameter {name} is {str(given).lower()}; on a GPU it must be left out")
        return int(free * FREE_SHARE) if self.kv_cache_bytes is None else self.kv_cache_bytes, self.kv_tier_bytes

    def session_store(self, model: str) -> Path:
        """Return where a model's sessions are. Raises ValueError when nothing says so."""
        return state_path(self.session_store_path, f"{model}.sessions.sqlite", "session_store_path")


def state_path(given: str, name: str, parameter: str) -> Path:
    """Return the path `given` or, when that is empty, `name` in the folder of the state. Raises ValueError."""
    folder = os.environ.get(STATE_VARIABLE)
    if not given and not folder:
        raise ValueError(
            f"parameter {parameter} is empty: set it to a path, or the environment variable {STATE_VARIABLE} to a "
            "folder"
        )
    return Path(given) if given else Path(str(folder), name)
