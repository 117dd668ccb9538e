"""The cache in a real Triton, between stand-ins for the embedder and the language model that start in a second."""

import json
import queue
import shutil
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from scripts.serving.errors import ServeError
from scripts.serving.server import MODEL_REPOSITORY, TritonServer
from tests.cache_models import add_cache_models
from tests.reply import Reply

STAND_INS = Path(__file__).parent / "repositories" / "cache"
PROMPT = "does the chain tool link all iterables"
SAME_MEANING = "does the chain tool link iterables all"  # to the stand-in for the embedder
OTHER_MEANING = "when was the library of alexandria built"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own cache and ensemble beside the stand-ins."""
    repository = tmp_path_factory.mktemp("cache") / "repository"
    shutil.copytree(STAND_INS, repository, ignore=shutil.ignore_patterns("__pycache__"))
    for model in ("semantic_cache", "generate"):
        (repository / model / "1").mkdir(parents=True)
        shutil.copy2(MODEL_REPOSITORY / model / "config.pbtxt", repository / model)
    add_cache_models(repository)
    return repository


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with TritonServer(repository, state_dir=tmp_path_factory.mktemp("state")) as server:
        yield server


@pytest.fixture
def tenant(request: pytest.FixtureRequest) -> str:
    """A tenant that no other test uses."""
    return str(request.node.name)


def post(server: TritonServer, path: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: bytes = response.read()
        return answer.decode()


def ask(server: TritonServer, prompt: str, **parameters: str | int | float | bool) -> Reply:
    answer = json.loads(post(server, "generate/generate", {"text_input": prompt, **parameters}))
    return Reply(answer["text_output"], json.loads(answer["info"]))


def refusal(server: TritonServer, prompt: str, **parameters: str | int | float | bool) -> str:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server, prompt, **parameters)
    assert caught.value.code == 400
    message: str = json.load(caught.value)["error"]
    return message


def tensor(name: str, *values: bytes) -> tritonclient.grpc.InferInput:
    data = np.array([values], np.object_).reshape(-1, 1)
    described = tritonclient.grpc.InferInput(name, list(data.shape), "BYTES")
    described.set_data_from_numpy(data)
    return described


def call_cache(server: TritonServer, parameters: dict[str, Any] | None = None, **inputs: bytes) -> dict[str, str]:
    """Call the cache itself over gRPC."""
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        tensors = [tensor(name, value) for name, value in {"text_input": b"", **inputs}.items()]
        result = client.infer("semantic_cache", tensors, parameters=parameters)
        return {name: result.as_numpy(name).item().decode() for name in ("cached_output", "cache_entry", "cache_info")}


def stream(server: TritonServer, prompt: str, **parameters: str | int | bool) -> list[Reply]:
    """Call the ensemble over gRPC streaming."""
    results: queue.Queue[Any] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: results.put(error or result))
        client.async_stream_infer("generate", [tensor("text_input", prompt.encode())], parameters=parameters)
        replies = []
        while not (replies and "source" in replies[-1].info):
            result = results.get(timeout=30)
            assert not isinstance(result, Exception), result
            text, info = (result.as_numpy(name).item().decode() for name in ("text_output", "info"))
            replies.append(Reply(text, json.loads(info)))
        return replies


def metric(server: TritonServer, name: str) -> float:
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def kill(server: TritonServer) -> None:
    """Kill the server and its backend processes with SIGKILL."""
    port = f"--http-port={server.http_url.rpartition(':')[2]}"
    [root] = [process for process in psutil.process_iter(["cmdline"]) if is_tritonserver(process, port)]
    for process in (*root.children(recursive=True), root):
        process.kill()


def is_tritonserver(process: psutil.Process, argument: str) -> bool:
    words = process.info["cmdline"] or [""]
    return words[0].endswith("/tritonserver") and argument in words


def test_a_repeated_prompt_is_answered_from_the_cache_and_one_of_the_same_meaning_too(
    server: TritonServer, tenant: str
) -> None:
    miss = ask(server, PROMPT, tenant=tenant)
    exact = ask(server, PROMPT, tenant=tenant)
    semantic = ask(server, SAME_MEANING, tenant=tenant)
    assert [miss.source, exact.source, semantic.source] == ["miss", "exact", "semantic"]
    assert miss.text == exact.text == semantic.text
    assert exact.info["tokens"] == semantic.info["tokens"] == 4
    assert semantic.info["similarity"] == pytest.approx(1.0, abs=1e-3)
    assert exact.info["milliseconds"]["embed"] == 0 < semantic.info["milliseconds"]["embed"]
    assert ask(server, OTHER_MEANING, tenant=tenant).source == "miss"


def test_a_hit_is_one_response_of_a_stream_and_a_miss_is_many(server: TritonServer, tenant: str) -> None:
    streamed = stream(server, PROMPT, tenant=tenant, stream=True)
    assert len(streamed) > 2
    [hit] = stream(server, PROMPT, tenant=tenant, stream=True)
    assert hit.source == "exact"
    assert hit.text == "".join(reply.text for reply in streamed)
    assert ask(server, PROMPT, tenant=tenant).text == hit.text  # `stream` is no part of the key
    events = post(server, "generate/generate_stream", {"text_input": PROMPT, "tenant": tenant, "stream": True})
    assert events.count("data: ") == 1 and json.loads(events.removeprefix("data: "))["text_output"] == hit.text


def test_tenants_and_parameters_are_walls(server: TritonServer, tenant: str) -> None:
    asked: list[dict[str, str | int | float | bool]] = [
        {"tenant": f"{tenant} a"},
        {"tenant": f"{tenant} b"},
        {"tenant": f"{tenant} a", "max_tokens": 7},
        {"tenant": f"{tenant} a", "temperature": 0.5, "seed": 1},
    ]
    answers = [ask(server, PROMPT, **parameters) for parameters in asked]
    assert {answer.source for answer in answers} == {"miss"}
    assert {ask(server, SAME_MEANING, **parameters).text for parameters in asked} == {answer.text for answer in answers}


def test_refresh_replaces_the_answer_and_off_neither_reads_nor_writes(server: TritonServer, tenant: str) -> None:
    first = ask(server, PROMPT, tenant=tenant)
    refreshed = ask(server, PROMPT, tenant=tenant, cache="refresh")
    assert refreshed.source == "miss" and refreshed.text != first.text
    off = ask(server, PROMPT, tenant=tenant, cache="off")
    assert off.source == "off" and off.text not in (first.text, refreshed.text)
    assert ask(server, PROMPT, tenant=tenant).text == refreshed.text
    assert ask(server, SAME_MEANING, tenant=tenant).text == refreshed.text


def test_an_answer_is_gone_after_its_time_to_live(server: TritonServer, tenant: str) -> None:
    first = ask(server, PROMPT, tenant=tenant, cache_ttl_s=2)
    assert ask(server, SAME_MEANING, tenant=tenant, cache_ttl_s=9).text == first.text
    time.sleep(2.1)
    assert ask(server, SAME_MEANING, tenant=tenant).source == "miss"
    assert ask(server, PROMPT, tenant=tenant).text != first.text


@pytest.mark.parametrize(
    ("prompt", "parameters", "message"),
    [
        ("", {}, "text_input is ''; it must be a prompt of 1 to 65536 bytes"),
        (" \n", {}, "text_input is"),
        ("x" * 1_000_000, {}, "text_input is 1000000 bytes long; it must be at most 65536"),
        (PROMPT, {"cache": "maybe"}, "cache is 'maybe'; it must be one of on, off, refresh, only"),
        (PROMPT, {"cache": True}, "cache is True"),
        (PROMPT, {"tenant": ""}, "tenant is ''; it must be a string of 1 to 128 characters"),
        (PROMPT, {"tenant": "x" * 129}, "tenant is 'xxx"),
        (PROMPT, {"tenant": 5}, "tenant is 5"),
        (PROMPT, {"cache_ttl_s": 0}, "cache_ttl_s is 0; it must be a whole number of seconds from 1 to"),
        (PROMPT, {"cache_ttl_s": "ten"}, "cache_ttl_s is 'ten'"),
        (PROMPT, {"cache_ttl_s": 1.5}, "cache_ttl_s is 1.5"),
    ],
)
def test_a_bad_request_is_refused_with_its_field_value_and_remedy(
    server: TritonServer, prompt: str, parameters: dict[str, Any], message: str
) -> None:
    assert message in refusal(server, prompt, **parameters)


def test_what_json_cannot_carry_is_refused_too(server: TritonServer) -> None:
    with pytest.raises(InferenceServerException, match=r"text_input has the byte 0xff at 3; it must be valid UTF-8"):
        call_cache(server, text_input=b"abc\xff")
    with (
        tritonclient.grpc.InferenceServerClient(server.grpc_url) as client,
        pytest.raises(InferenceServerException, match="text_input has 2 elements; it must have one"),
    ):
        client.infer("semantic_cache", [tensor("text_input", b"one", b"two")])
    with pytest.raises(InferenceServerException, match="answer is missing"):
        call_cache(server, cache_entry=b"x")
    with pytest.raises(InferenceServerException, match="answer_info is 'null'; it must be a JSON object"):
        call_cache(server, cache_entry=b"x", answer=b"y", answer_info=b"null")


def test_a_bad_request_does_not_disturb_its_batch(server: TritonServer, tenant: str) -> None:
    def one(number: int) -> str:
        try:
            return ask(server, f"{PROMPT} {number % 2 and number}", tenant="" if number % 2 else tenant).source
        except urllib.error.HTTPError as error:
            return str(error.code)

    with ThreadPoolExecutor(16) as pool:
        sources = list(pool.map(one, range(64)))
    assert set(sources[1::2]) == {"400"}
    assert set(sources[::2]) <= {"miss", "exact", "semantic"}


def test_nobody_can_store_without_a_handle_and_a_handle_is_good_once(server: TritonServer, tenant: str) -> None:
    def put(handle: str, answer: bytes = b"forged") -> str:
        reply = call_cache(server, cache_entry=handle.encode(), answer=answer)
        return str(json.loads(reply["cache_info"])["source"])

    looked_up = call_cache(server, {"tenant": tenant}, text_input=PROMPT.encode())
    assert looked_up["cached_output"] == "" and len(looked_up["cache_entry"]) >= 22
    assert put("guess") == "unknown_entry"
    assert put(looked_up["cache_entry"], b"first") == "stored"
    assert put(looked_up["cache_entry"]) == "unknown_entry"
    hit = call_cache(server, {"tenant": tenant}, text_input=PROMPT.encode())
    assert hit["cached_output"] == "first" and hit["cache_entry"] == ""


def test_without_the_embedder_a_lookup_is_a_miss_and_exact_hits_go_on(server: TritonServer, tenant: str) -> None:
    errors = metric(server, 'semantic_cache_errors_total{stage="embed"}')
    prompt = "what is a collapse"
    first = ask(server, prompt, tenant=tenant)
    assert first.source == "miss" and first.info["similarity"] is None
    second = ask(server, prompt, tenant=tenant)
    assert (second.source, second.text) == ("exact", first.text)
    assert metric(server, 'semantic_cache_errors_total{stage="embed"}') == errors + 1


def test_concurrent_clients_get_the_answers_to_their_own_prompts(server: TritonServer, tenant: str) -> None:
    prompts = [f"{number} {number} {number}" for number in range(48)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda prompt: ask(server, prompt, tenant=tenant), prompts))
        hits = list(pool.map(lambda prompt: ask(server, prompt, tenant=tenant), prompts))
    assert {hit.source for hit in hits} == {"exact"}
    assert [hit.text for hit in hits] == [answer.text for answer in answers]
    assert all(answer.text.startswith(prompt) for answer, prompt in zip(answers, prompts, strict=True))


def test_metrics_count_what_happened(server: TritonServer, tenant: str) -> None:
    names = [
        *(f'semantic_cache_lookups_total{{source="{source}"}}' for source in ("miss", "exact", "semantic")),
        'semantic_cache_stores_total{result="stored"}',
        "semantic_cache_lookup_seconds_count",
    ]
    before = [metric(server, name) for name in names]
    for prompt in (PROMPT, PROMPT, SAME_MEANING):
        ask(server, prompt, tenant=tenant)
    time.sleep(0.2)  # they are counted after the response
    assert [metric(server, name) - old for name, old in zip(names, before, strict=True)] == [1, 1, 1, 1, 3]
    assert metric(server, "semantic_cache_entries") >= 0


def test_hits_of_both_kinds_at_one_time_are_all_counted(server: TritonServer, tenant: str) -> None:
    ask(server, PROMPT, tenant=tenant)
    counted = 'semantic_cache_lookups_total{source="'
    before = metric(server, f"{counted}exact"), metric(server, f"{counted}semantic")

    def look_up(prompt: str) -> None:
        text = [tensor("text_input", prompt.encode())]
        with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
            for _ in range(1000):
                found = client.infer("semantic_cache", text, parameters={"tenant": tenant})
                assert found.as_numpy("cached_output").item()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(look_up, (PROMPT, SAME_MEANING)))
    time.sleep(0.2)
    after = metric(server, f"{counted}exact"), metric(server, f"{counted}semantic")
    assert [new - old for new, old in zip(after, before, strict=True)] == [1000, 1000]


def test_acknowledged_answers_survive_a_kill_of_the_server(repository: Path, tmp_path: Path) -> None:
    with TritonServer(repository, state_dir=tmp_path) as server:
        first = ask(server, PROMPT)
        kill(server)
        deadline = time.monotonic() + 10
        while server.restarts == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.wait_ready(30)
        exact, semantic = ask(server, PROMPT), ask(server, SAME_MEANING)
        assert [exact.source, semantic.source] == ["exact", "semantic"]
        assert exact.text == semantic.text == first.text


def test_two_servers_share_one_store(server: TritonServer, repository: Path, tenant: str) -> None:
    with TritonServer(repository, state_dir=server.state_dir) as other:
        ask(server, OTHER_MEANING, tenant=tenant)
        assert ask(other, OTHER_MEANING, tenant=tenant).source == "exact"
        first = ask(other, PROMPT, tenant=tenant)
        semantic = ask(server, SAME_MEANING, tenant=tenant)
        assert (semantic.source, semantic.text) == ("semantic", first.text)
    with sqlite3.connect(server.state_dir / "semantic_cache.sqlite") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("store", "/proc/nowhere/store", "cannot open its store /proc/nowhere/store"),
        ("similarity_threshold", "1.5", r"parameter similarity_threshold is 1.5; it must be in \(0, 1\]"),
        ("cache_ttl_s", "a day", "parameter cache_ttl_s is 'a day'; it must be of type int"),
        ("max_prompt", "1", "unknown parameter 'max_prompt'"),
        ("pair_model", "pair_model", "parameter pair_model is 'pair_model'; it must be a name and version"),
    ],
)
def test_a_wrong_setting_is_a_load_error_that_names_it(
    repository: Path, tmp_path: Path, name: str, value: str, message: str
) -> None:
    broken = tmp_path / "repository"
    shutil.copytree(repository / "semantic_cache", broken / "semantic_cache")
    config = broken / "semantic_cache" / "config.pbtxt"
    kept = [line for line in config.read_text().splitlines() if f'key: "{name}"' not in line]
    config.write_text("\n".join([*kept, f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}']))
    with pytest.raises(ServeError, match=message):
        TritonServer(broken, state_dir=tmp_path / "state").start()
