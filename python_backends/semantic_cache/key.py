"""What an answer belongs to: a partition, which is a wall, and an exact key within it."""

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass

from semantic_cache.records import Key

Parameter = str | int | float | bool

# Request parameters that change how an answer is made or sent, never the answer. Any other is part of the key.
IRRELEVANT = frozenset({"stream", "speculation_length", "drafter", "session_id", "priority", "timeout"})


@dataclass(frozen=True, slots=True)
class Keys:
    """Derives keys with HMAC-SHA256 and the store's secret: an id says nothing to who has not got it.

    `judges` are the embedder and the verifier with their versions: another one never sees what these have let in.
    """

    secret: bytes
    fronted_model: str
    judges: tuple[str, ...]

    def make(self, prompt: str, tenant: str, parameters: Mapping[str, Parameter]) -> Key:
        """Return the key of one prompt.

        `parameters` are the request parameters that the cache does not own: any of them may change the answer, so all
        but the IRRELEVANT ones are part of the partition, whatever their order.
        """
        relevant = {name: value for name, value in parameters.items() if name not in IRRELEVANT}
        walls = [tenant, self.fronted_model, self.judges, relevant]
        partition = self._derive("partition", json.dumps(walls, sort_keys=True, separators=(",", ":")).encode())
        return Key(partition, hashlib.sha256(partition + prompt.encode()).digest())

    def tenant(self, name: str) -> bytes:
        """Return the id that a tenant's entries bear."""
        return self._derive("tenant", name.encode())[:16]

    def flight(self, key: Key) -> str:
        """Return the name under which requests with this key, made at one time, share one answer."""
        return self._derive("flight", key.exact).hex()

    def _derive(self, purpose: str, content: bytes) -> bytes:
        return hmac.digest(self.secret, purpose.encode() + b"\0" + content, "sha256")
