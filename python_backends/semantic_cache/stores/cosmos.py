"""Azure Cosmos DB for NoSQL with vector search, shared by many servers."""

import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from azure.core import MatchConditions
from azure.core.exceptions import AzureError
from azure.cosmos import ContainerProxy, CosmosClient, PartitionKey
from azure.cosmos.exceptions import (
    CosmosAccessConditionFailedError,
    CosmosResourceExistsError,
    CosmosResourceNotFoundError,
)

from semantic_cache.records import Candidate, Checks, Entry, Found, Key, Observation, Selector, Usage, Vector
from semantic_cache.store import StoreError
from semantic_cache.stores.translation import translating

KEY_VARIABLE = "COSMOS_KEY"
DIMENSIONS = 384  # fixed when the container is made
CONTAINER = "entries"
SETTINGS = "settings"  # the partition, and the id, of what is no entry
LONGEST_TTL_S = 2**31 - 1
BATCH = 100  # operations that the service takes in one transaction
PAGE = 1000
VECTOR_POLICY = {
    "vectorEmbeddings": [
        {"path": "/vector", "dataType": "float32", "distanceFunction": "cosine", "dimensions": DIMENSIONS}
    ]
}
INDEXING_POLICY = {
    "indexingMode": "consistent",
    "automatic": True,
    "includedPaths": [{"path": "/*"}],
    # Texts and vectors are read, never searched by value: indexing them would only cost request units.
    "excludedPaths": [{"path": f"/{name}/*"} for name in ("vector", "prompt", "answer", "info", "observations")],
    "compositeIndexes": [[{"path": "/hits", "order": "ascending"}, {"path": "/used", "order": "ascending"}]],
    "vectorIndexes": [{"path": "/vector", "type": "quantizedFlat"}],
}
NEAREST = """SELECT TOP @count c.id, c.prompt, c.vector, c.answer, c.info, c.created FROM c
    WHERE c.expires > @now AND IS_DEFINED(c.vector) ORDER BY VectorDistance(c.vector, @vector)"""
EXPORT = "SELECT * FROM c WHERE c.partition != 'settings' AND c.id > @after ORDER BY c.id OFFSET 0 LIMIT @limit"
CHECKS = "SELECT c.id, c.made, c.wrong FROM c WHERE c.made > 0"
ATTEMPTS = 10  # to count a check that other servers count at the same time
CONDITIONS = {
    "exact": "c.id = @exact",
    "tag": "ARRAY_CONTAINS(c.tags, @tag)",
    "tenant": "c.tenant = @tenant",
    "model": "c.model = @model",
}
LEAST = (
    "SELECT TOP @count c.id, c.partition, c.tokens, c.hits, c.bytes FROM c WHERE c.partition != 'settings' ORDER BY "
)
# The service sorts by stored fields only, so what saves little is sought among what was not used for longest.
ORDER_BY = {"lru": "c.used", "lfu": "c.hits, c.used", "cost": "c.used"}


class CosmosStore:
    """Entries in a container partitioned by the cache's partitions; the contract is semantic_cache.store.Store.

    The service searches vectors within one partition (VectorDistance) and deletes what has expired by itself (TTL). A
    batch is stored whole or not at all within each partition.
    """

    @translating(AzureError)
    def __init__(self, endpoint: str, database: str = "semantic_cache") -> None:
        """Create database and container if need be. The account's key is in the environment variable COSMOS_KEY."""
        if KEY_VARIABLE not in os.environ:
            raise ValueError(f"the environment variable {KEY_VARIABLE} is not set; it must be a key of the account")
        self._client = CosmosClient(
            endpoint, os.environ[KEY_VARIABLE], connection_timeout=2, read_timeout=10, retry_total=2
        )
        self._container: ContainerProxy = self._client.create_database_if_not_exists(
            database
        ).create_container_if_not_exists(
            CONTAINER,
            PartitionKey("/partition"),
            indexing_policy=INDEXING_POLICY,
            vector_embedding_policy=VECTOR_POLICY,
            default_ttl=-1,  # entries say for themselves
        )

    @translating(AzureError)
    def secret(self) -> bytes:
        fresh = {"id": SETTINGS, "partition": SETTINGS, "secret": secrets.token_hex(32)}
        try:
            found = self._container.read_item(SETTINGS, SETTINGS)
        except CosmosResourceNotFoundError:
            try:
                found = self._container.create_item(fresh)
            except CosmosResourceExistsError:  # another server was faster
                found = self._container.read_item(SETTINGS, SETTINGS)
        return bytes.fromhex(found["secret"])

    @translating(AzureError)
    def get(self, key: Key, now: float) -> Found | None:
        try:
            item = self._container.read_item(key.exact.hex(), key.partition.hex())
        except CosmosResourceNotFoundError:
            return None
        return _found(item) if item["expires"] > now else None

    @translating(AzureError)
    def nearest(self, partition: bytes, vector: Vector, count: int, now: float) -> list[Candidate]:
        items = self._container.query_items(
            NEAREST,
            _parameters(count=count, now=now, vector=vector.tolist()),
            partition_key=partition.hex(),
        )
        return [
            Candidate(
                Key(partition, bytes.fromhex(item["id"])),
                item["prompt"],
                np.array(item["vector"], np.float32),
                _found(item),
            )
            for item in items
        ]

    @translating(AzureError)
    def put(self, entries: Sequence[Entry]) -> None:
        partitions: dict[str, dict[str, dict[str, Any]]] = {}
        for entry in entries:
            item = _item(entry)
            partitions.setdefault(item["partition"], {})[item["id"]] = item
        for partition, items in partitions.items():
            operations = [("upsert", (item,)) for item in items.values()]
            for at in range(0, len(operations), BATCH):
                self._container.execute_item_batch(operations[at : at + BATCH], partition)

    @translating(AzureError)
    def touch(self, uses: Mapping[Key, int], now: float) -> None:
        for key, count in uses.items():
            self._patch(
                key,
                {"op": "incr", "path": "/hits", "value": count},
                {"op": "set", "path": "/used", "value": now},
            )

    @translating(AzureError)
    def invalidate(self, selector: Selector) -> int:
        given = {name: value for name, value in selector._asdict().items() if value is not None}
        if not given:
            raise ValueError("nothing says which entries to invalidate: give a key, a tag, a tenant or a model")
        where = " AND ".join(CONDITIONS[name] for name in given)
        values = {name: value.hex() if isinstance(value, bytes) else value for name, value in given.items()}
        return self._delete(f"c.partition != 'settings' AND {where}", **values)

    @translating(AzureError)
    def purge(self, now: float) -> int:
        return self._delete("c.expires <= @now", now=now)

    @translating(AzureError)
    def usage(self) -> Usage:
        counted = [
            next(iter(self._query(f"SELECT VALUE {what} FROM c WHERE c.partition != 'settings'")), 0)
            for what in ("COUNT(1)", "SUM(c.bytes)")
        ]
        return Usage(*(int(number or 0) for number in counted))

    @translating(AzureError)
    def evict(self, order: str, limit: Usage) -> int:
        entries, size = self.usage()
        evicted = 0
        while entries > limit.entries or size > limit.bytes:
            items = list(self._query(LEAST + ORDER_BY[order], count=PAGE))
            if order == "cost":
                items.sort(key=lambda item: item["tokens"] * (item["hits"] + 1) / item["bytes"])
            for item in items:
                if entries <= limit.entries and size <= limit.bytes:
                    break
                evicted += self._forget(item)
                entries, size = entries - 1, size - item["bytes"]
            if not items:
                break
        return evicted

    @translating(AzureError)
    def observe(self, observations: Iterable[Observation]) -> None:
        for made in observations:
            value = [made.similarity, made.correct, made.made]
            self._patch(made.key, {"op": "add", "path": "/observations/-", "value": value})

    @translating(AzureError)
    def observations(self, key: Key) -> list[Observation]:
        try:
            item = self._container.read_item(key.exact.hex(), key.partition.hex())
        except CosmosResourceNotFoundError:
            return []
        return [Observation(key, *values) for values in item["observations"]]

    @translating(AzureError)
    def check(self, partition: bytes, correct: bool) -> None:
        for _ in range(ATTEMPTS):
            try:
                self._count(partition.hex(), correct)
            except (CosmosResourceExistsError, CosmosAccessConditionFailedError):
                continue  # another server was faster
            return
        raise StoreError(f"a check could not be counted in {ATTEMPTS} attempts: others count as well")

    @translating(AzureError)
    def checks(self) -> dict[bytes, Checks]:
        items = self._container.query_items(CHECKS, partition_key=SETTINGS)
        return {bytes.fromhex(item["id"]): Checks(item["made"], item["wrong"]) for item in items}

    @translating(AzureError)
    def export(self, after: bytes, limit: int) -> list[Entry]:
        return [_entry(item) for item in self._query(EXPORT, after=after.hex(), limit=limit)]

    def warm(self) -> None:
        """Nothing is kept in this server's memory."""

    def keep(self) -> None:
        """Nothing is kept on this server's disk."""

    def close(self) -> None:
        self._client.__exit__()  # type: ignore[no-untyped-call]

    def _count(self, name: str, correct: bool) -> None:
        """Count a check, unless another server does at this moment: then raise what the service says."""
        try:
            item = self._container.read_item(name, SETTINGS)
        except CosmosResourceNotFoundError:
            made = Checks(0.0, 0.0).plus(correct)
            self._container.create_item({"id": name, "partition": SETTINGS, **made._asdict()})
        else:
            counted = Checks(item["made"], item["wrong"]).plus(correct)
            unchanged = {"etag": item["_etag"], "match_condition": MatchConditions.IfNotModified}
            self._container.replace_item(name, {**item, **counted._asdict()}, **unchanged)

    def _query(self, query: str, **values: object) -> Iterable[Any]:
        found: Iterable[Any] = self._container.query_items(
            query, _parameters(**values), enable_cross_partition_query=True
        )
        return found

    def _patch(self, key: Key, *operations: dict[str, object]) -> None:
        try:
            self._container.patch_item(key.exact.hex(), key.partition.hex(), list(operations))
        except CosmosResourceNotFoundError:
            return  # it has gone meanwhile

    def _delete(self, where: str, **values: object) -> int:
        items = list(self._query(f"SELECT c.id, c.partition FROM c WHERE {where}", **values))
        return sum(self._forget(item) for item in items)

    def _forget(self, item: Mapping[str, Any]) -> int:
        try:
            self._container.delete_item(item["id"], item["partition"])
        except CosmosResourceNotFoundError:
            return 0
        return 1


def _parameters(**values: object) -> list[dict[str, object]]:
    return [{"name": f"@{name}", "value": value} for name, value in values.items()]


def _found(item: Mapping[str, Any]) -> Found:
    return Found(item["answer"], item["info"], item["created"])


def _item(entry: Entry) -> dict[str, Any]:
    item = {
        "id": entry.key.exact.hex(),
        "partition": entry.key.partition.hex(),
        "tenant": entry.tenant.hex(),
        "model": entry.model,
        "prompt": entry.prompt,
        "answer": entry.answer,
        "info": entry.info,
        "tags": list(entry.tags),
        "tokens": entry.tokens,
        "created": entry.created,
        "expires": entry.expires,
        "bytes": entry.bytes,
        "hits": 0,
        "used": entry.created,
        "observations": [],
        "ttl": max(1, min(LONGEST_TTL_S, math.ceil(entry.expires - entry.created))),
    }
    return item if entry.vector is None else {**item, "vector": entry.vector.tolist()}


def _entry(item: Mapping[str, Any]) -> Entry:
    return Entry(
        Key(bytes.fromhex(item["partition"]), bytes.fromhex(item["id"])),
        bytes.fromhex(item["tenant"]),
        item["model"],
        item["prompt"],
        item["answer"],
        item["info"],
        np.array(item["vector"], np.float32) if "vector" in item else None,
        tuple(item["tags"]),
        item["tokens"],
        item["created"],
        item["expires"],
    )
