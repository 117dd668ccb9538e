"""The cache in front of another Triton text model, and its operators' commands, on a real server."""

import json
import queue
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from scripts.serving.server import TritonServer
from tests.cache_models import add_cache_models

REPOSITORIES = Path(__file__).parent / "repositories"
TOKEN = "operator"
MAX_ENTRIES = 40  # as the repository's config.pbtxt says


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("upstream") / "repository"
    shutil.copytree(REPOSITORIES / "upstream", repository, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORIES / "cache" / "embedder", repository / "embedder")
    add_cache_models(repository, "cached_text")
    environment = {"SEMANTIC_CACHE_ADMIN_TOKEN": TOKEN}
    with TritonServer(repository, state_dir=tmp_path_factory.mktemp("state"), environment=environment) as server:
        yield server


def post(server: TritonServer, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://{server.http_url}/v2/models/cached_text/generate", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def ask(server: TritonServer, prompt: str, **parameters: Any) -> tuple[str, dict[str, Any]]:
    answer = post(server, {"text_input": prompt, **parameters})
    return answer["text_output"], json.loads(answer["info"])


def stored(server: TritonServer, prompt: str, **parameters: Any) -> str:
    """Wait until the answer is cached, without asking for another, and return it."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return ask(server, prompt, cache="only", **parameters)[0]
        except urllib.error.HTTPError:
            assert time.monotonic() < deadline, "the answer was not stored"
            time.sleep(0.02)


def stream(server: TritonServer, prompt: str, **parameters: Any) -> tuple[list[str], dict[str, Any]]:
    """Return the pieces of an answer, and its info. Raises InferenceServerException with the pieces before it."""
    results: queue.Queue[Any] = queue.Queue()
    tensor = tritonclient.grpc.InferInput("text_input", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[prompt.encode()]], np.object_))
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: results.put(error or result))
        client.async_stream_infer("cached_text", [tensor], parameters={"stream": True, **parameters})
        texts: list[str] = []
        while True:
            result = results.get(timeout=30)
            if isinstance(result, InferenceServerException):
                raise BrokenError(texts) from result
            texts.append(result.as_numpy("text_output").item().decode())
            if info := result.as_numpy("info").item():
                return [text for text in texts if text], json.loads(info)


class BrokenError(Exception):
    """A stream that ended in an error; its argument are the pieces before it."""


def start(server: TritonServer, prompt: str) -> tritonclient.grpc.InferenceServerClient:
    """Begin a stream, and return its client once the first piece is there."""
    begun = threading.Event()
    tensor = tritonclient.grpc.InferInput("text_input", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[prompt.encode()]], np.object_))
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
    client.start_stream(lambda result, error: begun.set())
    client.async_stream_infer("cached_text", [tensor], parameters={"stream": True})
    assert begun.wait(10)
    return client


def metric(server: TritonServer, name: str) -> float:
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)


def test_a_miss_is_asked_upstream_with_its_parameters_and_then_cached(server: TritonServer) -> None:
    first, info = ask(server, "what is a kernel", max_tokens=7)
    assert info["source"] == "upstream" and first.endswith("to what is a kernel at most 7 . ")
    assert stored(server, "what is a kernel", max_tokens=7) == first
    assert ask(server, "what is a kernel", max_tokens=8)[0] != first


def test_misses_stream_through_and_hits_replay_as_a_stream(server: TritonServer) -> None:
    miss, info = stream(server, "what is a thread")
    assert info["source"] == "upstream" and len(miss) > 5
    stored(server, "what is a thread")
    hit, info = stream(server, "what is a thread")
    assert info["source"] == "exact" and len(hit) > 5
    assert "".join(hit) == "".join(miss)


def test_identical_requests_in_flight_are_asked_once(server: TritonServer) -> None:
    coalesced = metric(server, "semantic_cache_coalesced_total")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(server, "what is a process"), range(8)))
    assert len({text for text, _ in answers}) == 1
    sources = sorted(info["source"] for _, info in answers)
    assert sources.count("upstream") == 1 and set(sources) <= {"upstream", "coalesced", "exact"}
    time.sleep(0.2)
    assert metric(server, "semantic_cache_coalesced_total") - coalesced == sources.count("coalesced") > 0


def test_an_answer_that_fails_is_an_error_and_is_not_stored(server: TritonServer) -> None:
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(server, "fail")
        assert "the answer could not be made" in json.load(caught.value)["error"]


def test_an_answer_that_breaks_off_is_an_error_in_the_stream_and_is_never_stored(server: TritonServer) -> None:
    for _ in range(2):
        with pytest.raises(BrokenError) as broken:
            stream(server, "fail later")
        assert len(broken.value.args[0]) == 4
        with pytest.raises(urllib.error.HTTPError):
            ask(server, "fail later")
    time.sleep(0.2)
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server, "fail later", cache="only")
    assert "no answer is cached" in json.load(caught.value)["error"]


def test_an_answer_that_nobody_waits_for_is_cancelled_upstream_and_not_stored(server: TritonServer) -> None:
    before = int(ask(server, "how many were cancelled", cache="off")[0])
    start(server, "talk for long").stop_stream(cancel_requests=True)
    deadline = time.monotonic() + 10
    while int(ask(server, "how many were cancelled", cache="off")[0]) == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server, "talk for long", cache="only")
    assert "no answer is cached" in json.load(caught.value)["error"]


def test_only_what_is_cached(server: TritonServer) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server, "what was never asked", cache="only")
    assert "no answer is cached" in json.load(caught.value)["error"]
    ask(server, "what was asked")
    stored(server, "what was asked")
    assert ask(server, "what was asked", cache="only")[1]["source"] == "exact"


def test_hits_by_meaning_are_checked_off_the_clients_path(server: TritonServer) -> None:
    ask(server, "how do i remove a directory", tenant="shadow")
    stored(server, "how do i remove a directory", tenant="shadow")
    _, info = ask(server, "how do i remove directory a", tenant="shadow")
    assert info["source"] == "semantic"
    deadline = time.monotonic() + 10
    while metric(server, 'semantic_cache_shadow_checks_total{result="wrong"}') < 1:  # no two answers are the same
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_the_cache_does_is_on_the_metrics_port(server: TritonServer) -> None:
    """Every family that README promises, by name; the tests above have made each of them count."""
    names = [
        *(f'semantic_cache_lookups_total{{source="{source}"}}' for source in ("miss", "exact", "semantic")),
        'semantic_cache_misses_total{reason="nothing_near"}',
        "semantic_cache_verifier_refusals_total{reason=",
        'semantic_cache_stores_total{result="stored"}',
        'semantic_cache_shadow_checks_total{result="wrong"}',
        'semantic_cache_coalesced_total{kind="in_flight"}',
        'semantic_cache_evictions_total{order="lru"}',
        "semantic_cache_lookup_seconds_count",
        "semantic_cache_verify_seconds_count",
        "semantic_cache_entries",
        "semantic_cache_bytes",
        "semantic_cache_false_hit_bound{partition=",
    ]
    ask(server, "how do i copy a file", tenant="metrics")
    stored(server, "how do i copy a file", tenant="metrics")
    assert ask(server, "how do i file a copy not", tenant="metrics")[1]["source"] == "upstream"
    for number in range(MAX_ENTRIES):
        ask(server, f"what is number {number}", tenant="metrics")
    deadline = time.monotonic() + 25  # gauges are set every ten seconds
    while missing := [name for name in names if not metric(server, name)]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.2)
    assert metric(server, "semantic_cache_entries") <= MAX_ENTRIES


def test_operators_need_the_token(server: TritonServer) -> None:
    for token in ("", "guess"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(server, {"text_input": "", "admin": "stats", "admin_token": token})
        assert "admin_token is not the token" in json.load(caught.value)["error"]


def test_operators_see_and_invalidate(server: TritonServer) -> None:
    def command(name: str, text: str = "", **parameters: Any) -> Any:
        answer = post(server, {"text_input": text, "admin": name, "admin_token": TOKEN, **parameters})
        return json.loads(answer["text_output"])

    ask(server, "what is a page", cache_tags="memory", tenant="ops")
    text = stored(server, "what is a page", tenant="ops")
    assert command("stats")["entries"] > 0
    assert command("get", "what is a page", tenant="ops")["found"]["answer"] == text
    assert command("export", limit=1)["key"]["exact"]
    assert command("invalidate", tag="memory") == {"invalidated": 1}
    assert ask(server, "what is a page", tenant="ops")[1]["source"] == "upstream"
