"""What the Cosmos DB store sends over the wire, against the documented REST shapes.

https://learn.microsoft.com/rest/api/cosmos-db/: paths, verbs and headers. These tests have not met the service: the
store's contract tests run against it where COSMOS_ENDPOINT is set.
"""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np
import pytest
from semantic_cache.records import Checks, Entry, Key, Observation, Selector, Usage
from semantic_cache.store import StoreError
from semantic_cache.stores.cosmos import ATTEMPTS, DIMENSIONS, CosmosStore

KEY = Key(b"\x01" * 32, b"\x02" * 32)
PARTITION, ID = KEY.partition.hex(), KEY.exact.hex()
DOCUMENTS = "/dbs/semantic_cache/colls/entries/docs"
VECTOR = np.full(DIMENSIONS, DIMENSIONS**-0.5, np.float32)
ENTRY = Entry(KEY, b"\x03" * 16, "m:1", "prompt", "answer", "{}", VECTOR, ("red",), 7, 100.0, 160.5)
ITEM = {"id": ID, "partition": PARTITION, "prompt": "prompt", "answer": "answer", "info": "{}", "created": 100.0,
        "expires": 160.5, "vector": VECTOR.tolist(), "tokens": 7, "hits": 0, "bytes": 10,
        "observations": []}  # fmt: skip


class Sent(NamedTuple):
    """A request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


class Recorder(ThreadingHTTPServer):
    """Records requests, and answers with what was prepared, else with something empty of the right shape."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.sent: list[Sent] = []
        self.exists = True
        self.items: list[dict[str, Any]] = []
        self.results: list[list[Any]] = []
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def answer(self, sent: Sent) -> tuple[int, Any]:
        if sent.path == "":
            place = [{"name": "here", "databaseAccountEndpoint": self.url}]
            policy = {"userConsistencyPolicy": {"defaultConsistencyLevel": "Session"}}
            return 200, {"id": "account", "_rid": "a", "writableLocations": place, "readableLocations": place, **policy}
        if sent.path.endswith("/pkranges"):
            return 200, {"_rid": "r", "PartitionKeyRanges": [{"id": "0", "minInclusive": "", "maxExclusive": "FF"}]}
        if "/docs" not in sent.path:
            name = sent.body["id"] if sent.body else sent.path.rpartition("/")[2]
            described = {"id": name, "_rid": "abc=", "_self": "self"}
            kind = {"partitionKey": {"paths": ["/partition"], "kind": "Hash", "version": 2}}
            return (200 if self.exists or sent.method == "POST" else 404), {**described, **kind}
        if "x-ms-documentdb-isquery" in sent.headers:
            return self.status, {"_rid": "q", "Documents": self.results.pop(0) if self.results else [], "_count": 0}
        if "x-ms-cosmos-is-batch-request" in sent.headers:
            return self.status, [{"statusCode": 201, "resourceBody": {}} for _ in sent.body]
        item = self.items.pop(0) if self.items else None
        if sent.method == "GET":
            return (200, item) if item else (404, {"code": "NotFound", "message": "not found"})
        return self.status, item or {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Recorder

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        sent = Sent(self.command, self.path.rstrip("/"), headers, json.loads(body) if body else None)
        self.server.sent.append(sent)
        status, content = self.server.answer(sent)
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (("content-type", "application/json"), ("content-length", str(len(data))), ("etag", '"1"')):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_request  # noqa: N815 - the names that http.server calls


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setenv("COSMOS_KEY", base64.b64encode(b"k" * 32).decode())
    recorder = Recorder()
    thread = threading.Thread(target=recorder.serve_forever, daemon=True)
    thread.start()
    yield recorder
    recorder.shutdown()
    recorder.server_close()


@pytest.fixture
def store(service: Recorder) -> Iterator[CosmosStore]:
    store = CosmosStore(service.url)
    service.sent.clear()
    yield store
    store.close()


def documents(service: Recorder) -> list[Sent]:
    """What was sent to the documents, less what the SDK asks for itself."""
    return [sent for sent in service.sent if "/docs" in sent.path]


def test_the_container_is_made_with_vector_policy_index_and_time_to_live(service: Recorder) -> None:
    service.exists = False
    CosmosStore(service.url).close()
    made = {sent.path: sent.body for sent in service.sent if sent.method == "POST"}
    assert made["/dbs"] == {"id": "semantic_cache"}
    container = made["/dbs/semantic_cache/colls"]
    assert container["id"] == "entries" and container["defaultTtl"] == -1
    assert container["partitionKey"]["paths"] == ["/partition"] and container["partitionKey"]["kind"] == "Hash"
    assert container["vectorEmbeddingPolicy"]["vectorEmbeddings"] == [
        {"path": "/vector", "dataType": "float32", "distanceFunction": "cosine", "dimensions": 384}
    ]
    assert container["indexingPolicy"]["vectorIndexes"] == [{"path": "/vector", "type": "quantizedFlat"}]
    assert {"path": "/vector/*"} in container["indexingPolicy"]["excludedPaths"]


def test_requests_are_signed_with_the_accounts_key(service: Recorder, store: CosmosStore) -> None:
    store.get(KEY, 0.0)
    [sent] = documents(service)
    assert sent.headers["authorization"].startswith("type%3Dmaster%26ver%3D1.0%26sig%3D")
    assert sent.headers["x-ms-date"] and sent.headers["x-ms-version"]


def test_a_read_is_a_point_read_in_its_partition(service: Recorder, store: CosmosStore) -> None:
    service.items = [ITEM, ITEM]
    found = store.get(KEY, 160.4)
    assert found and (found.answer, found.created) == ("answer", 100.0)
    assert store.get(KEY, 160.5) is None  # the service may delete late
    assert store.get(KEY, 0.0) is None  # 404
    for sent in documents(service):
        assert (sent.method, sent.path) == ("GET", f"{DOCUMENTS}/{ID}")
        assert json.loads(sent.headers["x-ms-documentdb-partitionkey"]) == [PARTITION]


def test_a_search_is_a_vector_query_within_one_partition(service: Recorder, store: CosmosStore) -> None:
    service.results = [[ITEM]]
    [candidate] = store.nearest(KEY.partition, VECTOR, 5, 50.0)
    assert candidate.key == KEY and candidate.prompt == "prompt"
    np.testing.assert_array_equal(candidate.vector, VECTOR)
    [sent] = documents(service)
    assert (sent.method, sent.path) == ("POST", DOCUMENTS)
    assert sent.headers["content-type"] == "application/query+json"
    assert sent.headers["x-ms-documentdb-isquery"].lower() == "true"
    assert json.loads(sent.headers["x-ms-documentdb-partitionkey"]) == [PARTITION]
    assert "ORDER BY VectorDistance(c.vector, @vector)" in sent.body["query"] and "TOP @count" in sent.body["query"]
    values = {parameter["name"]: parameter["value"] for parameter in sent.body["parameters"]}
    assert values == {"@count": 5, "@now": 50.0, "@vector": VECTOR.tolist()}


def test_a_put_is_one_transaction_per_partition_and_says_when_it_expires(service: Recorder, store: CosmosStore) -> None:
    other = ENTRY._replace(key=Key(b"\x09" * 32, b"\x08" * 32), vector=None)
    store.put([ENTRY, other, ENTRY._replace(answer="newer")])
    first, second = documents(service)
    assert {first.method, second.method} == {"POST"} and {first.path, second.path} == {DOCUMENTS}
    assert first.headers["x-ms-cosmos-is-batch-request"] == first.headers["x-ms-cosmos-batch-atomic"] == "True"
    assert json.loads(first.headers["x-ms-documentdb-partitionkey"]) == [PARTITION]
    [operation] = first.body
    assert operation["operationType"] == "Upsert"
    item = operation["resourceBody"]
    assert (item["id"], item["partition"], item["answer"], item["ttl"]) == (ID, PARTITION, "newer", 61)
    assert item["tags"] == ["red"] and item["vector"] == VECTOR.tolist()
    assert "vector" not in second.body[0]["resourceBody"]


def test_hits_and_observations_are_patches(service: Recorder, store: CosmosStore) -> None:
    store.touch({KEY: 3}, 120.0)
    store.observe([Observation(KEY, 0.9, True, 130.0)])
    touched, observed = documents(service)
    assert (touched.method, touched.path) == ("PATCH", f"{DOCUMENTS}/{ID}")
    assert touched.headers["content-type"] == "application/json-patch+json"
    assert touched.body["operations"] == [
        {"op": "incr", "path": "/hits", "value": 3},
        {"op": "set", "path": "/used", "value": 120.0},
    ]
    assert observed.body["operations"] == [{"op": "add", "path": "/observations/-", "value": [0.9, True, 130.0]}]


def test_a_check_is_counted_unless_another_server_counts_at_the_same_time(
    service: Recorder, store: CosmosStore
) -> None:
    store.check(KEY.partition, False)  # the first
    read, created = documents(service)
    counted = {"id": PARTITION, "partition": "settings", "made": 1.0, "wrong": 1.0}
    assert (read.method, read.path) == ("GET", f"{DOCUMENTS}/{PARTITION}")
    assert (created.method, created.path, created.body) == ("POST", DOCUMENTS, counted)
    service.sent.clear()
    service.items = [{**counted, "_etag": '"7"'}]
    store.check(KEY.partition, True)
    _, replaced = documents(service)
    assert (replaced.method, replaced.path) == ("PUT", f"{DOCUMENTS}/{PARTITION}")
    assert replaced.headers["if-match"] == '"7"' and (replaced.body["made"], replaced.body["wrong"]) == (2.0, 1.0)
    service.sent.clear()
    service.status, service.items = 412, [item for _ in range(ATTEMPTS) for item in ({**counted, "_etag": "x"}, {})]
    with pytest.raises(StoreError, match="others count as well"):
        store.check(KEY.partition, True)
    assert [sent.method for sent in documents(service)] == ["GET", "PUT"] * ATTEMPTS


def test_checks_are_read_from_their_partition(service: Recorder, store: CosmosStore) -> None:
    service.results = [[{"id": PARTITION, "made": 3.0, "wrong": 1.0}]]
    assert store.checks() == {KEY.partition: Checks(3.0, 1.0)}
    [query] = documents(service)
    assert json.loads(query.headers["x-ms-documentdb-partitionkey"]) == ["settings"]


@pytest.mark.parametrize(
    ("selector", "condition", "name", "value"),
    [
        (Selector(exact=KEY.exact), "c.id = @exact", "@exact", ID),
        (Selector(tag="x' OR 1=1"), "ARRAY_CONTAINS(c.tags, @tag)", "@tag", "x' OR 1=1"),
        (Selector(tenant=b"\x03"), "c.tenant = @tenant", "@tenant", "03"),
        (Selector(model="m:1"), "c.model = @model", "@model", "m:1"),
    ],
)
def test_invalidation_finds_and_deletes(
    service: Recorder, store: CosmosStore, selector: Selector, condition: str, name: str, value: str
) -> None:
    service.results = [[{"id": ID, "partition": PARTITION}]]
    assert store.invalidate(selector) == 1
    query, delete = documents(service)
    assert condition in query.body["query"] and query.body["parameters"] == [{"name": name, "value": value}]
    assert query.headers["x-ms-documentdb-query-enablecrosspartition"].lower() == "true"
    assert (delete.method, delete.path) == ("DELETE", f"{DOCUMENTS}/{ID}")
    assert json.loads(delete.headers["x-ms-documentdb-partitionkey"]) == [PARTITION]


def test_eviction_deletes_the_least_first_until_the_store_is_small_enough(
    service: Recorder, store: CosmosStore
) -> None:
    items = [{"id": str(number), "partition": "p", "tokens": 9 - number, "hits": 0, "bytes": 10} for number in range(3)]
    service.results = [[3], [30], items]
    assert store.evict("cost", Usage(1, 100)) == 2
    deleted = [sent.path.rpartition("/")[2] for sent in documents(service) if sent.method == "DELETE"]
    assert deleted == ["2", "1"]  # they save the fewest tokens


def test_the_secret_is_created_once(service: Recorder, store: CosmosStore) -> None:
    service.items = [{"id": "settings", "partition": "settings", "secret": "ab" * 32}]
    assert store.secret() == b"\xab" * 32
    [sent] = documents(service)
    assert (sent.method, sent.path) == ("GET", f"{DOCUMENTS}/settings")


def test_a_service_that_refuses_is_a_store_error(service: Recorder, store: CosmosStore) -> None:
    service.status = 403
    with pytest.raises(StoreError):
        store.nearest(KEY.partition, VECTOR, 5, 0.0)


def test_without_a_key_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COSMOS_KEY", raising=False)
    with pytest.raises(ValueError, match="COSMOS_KEY is not set"):
        CosmosStore("http://127.0.0.1:1/")
