"""What operators may do: look at the cache, invalidate, export and import."""

import base64
import hmac
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from semantic_cache.cache import SemanticCache
from semantic_cache.key import Keys, Parameter
from semantic_cache.policy import Policy
from semantic_cache.records import Entry, Key, Selector
from semantic_cache.request import OWN, InvalidRequest, decode, parse_lookup
from semantic_cache.store import Store

TOKEN_VARIABLE = "SEMANTIC_CACHE_ADMIN_TOKEN"
COMMANDS = ("stats", "get", "invalidate", "export", "import")
MAX_PAGE = 1000
SELECTING = ("key", "tag", "model")


class Admin:
    """Carries out commands of whoever has the token; without a token set, of nobody."""

    def __init__(
        self,
        policy: Policy,
        keys: Keys,
        store: Store,
        cache: SemanticCache,
        clock: Callable[[], float],
        token: str | None = None,
    ) -> None:
        self._policy = policy
        self._keys = keys
        self._store = store
        self._cache = cache
        self._clock = clock
        self._token = os.environ.get(TOKEN_VARIABLE, "") if token is None else token

    def run(self, command: str, text: bytes, parameters: Mapping[str, Parameter]) -> str:
        """Return the result of a command, JSON or lines of JSON. Raises InvalidRequest, StoreError.

        stats: entries, bytes, upper bounds of false hits. get: what is stored for a prompt, with the parameters it was
        asked with. invalidate: by prompt, `key`, `tag`, `tenant` or `model`, all given at once. export: up to `limit`
        entries after the key `after`. import: lines of an export.
        """
        given = dict(parameters)
        if not self._token:
            raise InvalidRequest(f"admin is switched off; set the environment variable {TOKEN_VARIABLE} to use it")
        if not hmac.compare_digest(str(given.pop("admin_token", "")).encode(), self._token.encode()):
            raise InvalidRequest("admin_token is not the token of this cache")
        if command not in COMMANDS:
            raise InvalidRequest(f"admin is {command[:80]!r}; it must be one of {', '.join(COMMANDS)}")
        run: Callable[[bytes, dict[str, Parameter]], str] = getattr(self, f"_{command}")
        return run(text, given)

    def _stats(self, text: bytes, parameters: dict[str, Parameter]) -> str:
        entries, size = self._store.usage()
        bounds = {partition.hex()[:12]: round(bound, 4) for partition, bound in self._cache.false_hits.bounds().items()}
        return json.dumps({"entries": entries, "bytes": size, "false_hit_bounds": bounds})

    def _get(self, text: bytes, parameters: dict[str, Parameter]) -> str:
        key = self._key(text, parameters)
        found = self._store.get(key, self._clock())
        stored = found and {"answer": found.answer, "info": json.loads(found.info), "created": found.created}
        return json.dumps({"key": key.exact.hex(), "found": stored})

    def _invalidate(self, text: bytes, parameters: dict[str, Parameter]) -> str:
        selecting = {name: str(parameters.pop(name)) for name in SELECTING if name in parameters}
        tenant = str(parameters["tenant"]) if "tenant" in parameters else None
        exact = self._key(text, parameters).exact if text.strip() else None
        if "key" in selecting:
            exact = _bytes("key", selecting["key"])
        selector = Selector(
            exact,
            selecting.get("tag"),
            self._keys.tenant(tenant) if tenant is not None else None,
            selecting.get("model"),
        )
        try:
            return json.dumps({"invalidated": self._store.invalidate(selector)})
        except ValueError as error:
            raise InvalidRequest(str(error)) from error

    def _export(self, text: bytes, parameters: dict[str, Parameter]) -> str:
        limit = parameters.get("limit", MAX_PAGE)
        if not isinstance(limit, int) or isinstance(limit, bool) or not 0 < limit <= MAX_PAGE:
            raise InvalidRequest(f"limit is {limit!r}; it must be a number from 1 to {MAX_PAGE}")
        entries = self._store.export(_bytes("after", str(parameters.get("after", ""))), limit)
        return "\n".join(json.dumps(_line(entry)) for entry in entries)

    def _import(self, text: bytes, parameters: dict[str, Parameter]) -> str:
        lines = [line for line in decode("text_input", text).splitlines() if line.strip()]
        self._cache.store([_parse_line(number, line) for number, line in enumerate(lines, 1)])
        return json.dumps({"imported": len(lines)})

    def _key(self, text: bytes, parameters: Mapping[str, Parameter]) -> Key:
        asked = {name: value for name, value in parameters.items() if name == "tenant" or name not in OWN}
        return parse_lookup(text, asked, self._policy, self._keys).key


def _line(entry: Entry) -> dict[str, Any]:
    vector = None if entry.vector is None else base64.b64encode(entry.vector.astype("<f4").tobytes()).decode()
    return {
        **entry._asdict(),
        "key": {"partition": entry.key.partition.hex(), "exact": entry.key.exact.hex()},
        "tenant": entry.tenant.hex(),
        "vector": vector,
    }


def _parse_line(number: int, line: str) -> Entry:
    try:
        content = json.loads(line)
        key = Key(*(bytes.fromhex(content["key"][part]) for part in ("partition", "exact")))
        vector = content["vector"] and np.frombuffer(base64.b64decode(content["vector"], validate=True), "<f4")
        entry = Entry(
            key=key,
            tenant=bytes.fromhex(content["tenant"]),
            model=str(content["model"]),
            prompt=str(content["prompt"]),
            answer=str(content["answer"]),
            info=json.dumps(dict(json.loads(content["info"]))),
            vector=None if vector is None else vector.astype(np.float32),
            tags=tuple(map(str, content["tags"])),
            tokens=int(content["tokens"]),
            created=float(content["created"]),
            expires=float(content["expires"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRequest(f"line {number} of text_input is no exported entry: {error!r}") from error
    if len(key.partition) != 32 or len(key.exact) != 32:
        raise InvalidRequest(f"line {number} of text_input has a key of the wrong length; it must have 2 x 32 bytes")
    return entry


def _bytes(name: str, text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InvalidRequest(f"{name} is {text[:80]!r}; it must be hexadecimal digits") from None
