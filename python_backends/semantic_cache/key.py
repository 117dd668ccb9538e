"""What an answer belongs to: a partition, which is a wall, and an exact key within it."""

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

Parameter = str | int | float | bool

# Request parameters that change how an answer is made or sent, never the answer.
IRRELEVANT = frozenset({"stream", "speculation_length", "drafter", "priority", "timeout"})


class Key(NamedTuple):
    """`partition`: whose answers may be seen (32 bytes). `exact`: this prompt in that partition (32 bytes)."""

    partition: bytes
    exact: bytes


def make_key(prompt: str, tenant: str, parameters: Mapping[str, Parameter], fronted_model: str, embedder: str) -> Key:
    """Derive the key of one prompt with SHA-256.

    `parameters` are the request parameters that the cache does not own: any of them may change the answer, so all but
    the IRRELEVANT ones are part of the partition, whatever their order.
    """
    relevant = {name: value for name, value in parameters.items() if name not in IRRELEVANT}
    canonical = json.dumps([tenant, fronted_model, embedder, relevant], sort_keys=True, separators=(",", ":"))
    partition = hashlib.sha256(canonical.encode()).digest()
    return Key(partition, hashlib.sha256(partition + prompt.encode()).digest())
