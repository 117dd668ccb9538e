"""What caching, dynamic batching and everything together change, through the real server."""

import shutil
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from perf import perf_analyzer
from perf.batching_bench import serving
from perf.embedder_load import Padding, real_sentences, write_requests
from perf.embedder_settings import shipped
from perf.promise import Measured, compared
from perf.spending import take_turns
from perf.zipf import zipf
from scripts.demo import await_hit
from scripts.demo_models.corpus import Fact
from scripts.demo_models.phrasings import TRAINED, UNSEEN
from scripts.serving.client import GenerateClient
from scripts.serving.installation import MODEL_REPOSITORY
from scripts.serving.server import TritonServer

COMMAND = "perf.techniques"
PHRASINGS = (*TRAINED, *UNSEEN)
REWORDED_OBJECTS = 8
CLIENTS = 4  # of the workload
EMBEDDER_CLIENTS, WINDOW_MS = 32, 1500
BUCKETS = (16, 32, 64, 128)
PASSES = 3
# What is served before anything is applied: one sequence at a time, no drafts, nothing kept.
PLAIN = {"max_sequences": "1", "speculation_length": "0", "kv_cache_bytes": "0"}


class Asked(NamedTuple):
    """A question, and how a right answer begins."""

    prompt: str
    summary: str


def zipf_workload(facts: Sequence[Fact], requests: int, seed: int = 0) -> list[Asked]:
    """Return questions about few objects often and many rarely, in few phrasings often and many rarely."""
    random = np.random.default_rng(seed)

    def draw(count: int) -> list[int]:
        drawn: list[int] = random.choice(count, requests, p=zipf(count)).tolist()
        return drawn

    return [
        Asked(PHRASINGS[phrasing].format(n=facts[fact].name), facts[fact].summary)
        for fact, phrasing in zip(draw(len(facts)), draw(len(PHRASINGS)), strict=True)
    ]


def caching(facts: Sequence[Fact], workload: Sequence[Asked]) -> list[Measured]:
    """Return what hits cost against decoding the same questions, and the cache on a mixed workload against none."""
    asked, *reworded = [[Asked(phrasing.format(n=fact.name), fact.summary) for fact in facts] for phrasing in PHRASINGS]
    reworded = [one for some in reworded for one in some[:REWORDED_OBJECTS]]
    with _server(MODEL_REPOSITORY) as server, GenerateClient(server.grpc_url) as client:
        for question in asked:
            client.ask(question.prompt, tenant="hits")
        await_hit(client, asked[-1].prompt, "exact", tenant="hits")
        meant = [one for one in reworded if _is_cached(client, one.prompt)]
        return [
            _hits("exact hits against decoding (speculatively)", server, client, asked, "exact"),
            _hits(
                f"hits by meaning ({len(meant)} of {len(reworded)} rewordings) against decoding",
                server,
                client,
                meant,
                "semantic",
            ),
            _mixed(server, workload),
        ]


def _hits(what: str, server: TritonServer, client: GenerateClient, asked: Sequence[Asked], source: str) -> Measured:
    """Compare hits with decoding the same, one at a time. Raises AssertionError when one is answered otherwise."""
    right: dict[str, int] = {}

    def act(source: str, **parameters: str) -> int:
        answers = [client.ask(one.prompt, **parameters) for one in asked]
        assert {answer.info["source"] for answer in answers} == {source}
        right[source] = sum(answer.text.startswith(one.summary) for answer, one in zip(answers, asked, strict=True))
        return len(asked)

    contenders = {
        "hit": partial(act, source, cache="only", tenant="hits"),
        "decoded": partial(act, "decoded", cache="off"),
    }
    spent = take_turns(contenders, PASSES, partial(_cpu_s, server))
    return compared(what, COMMAND, spent["hit"], spent["decoded"], right[source] / right["decoded"] - 1)


def _cpu_s(*servers: TritonServer) -> float:
    return sum(server.usage().cpu_s for server in servers)


def _is_cached(client: GenerateClient, prompt: str) -> bool:
    try:
        client.ask(prompt, cache="only", tenant="hits")
    except InferenceServerException:
        return False
    return True


def _mixed(server: TritonServer, workload: Sequence[Asked]) -> Measured:
    tenants, right = iter(range(1000)), dict[str, float]()

    def act(cache: str) -> int:
        right[cache] = _right(server, "generate", workload, cache=cache, tenant=f"mixed {next(tenants)}")
        return len(workload)

    spent = take_turns({cache: partial(act, cache) for cache in ("on", "off")}, 1, partial(_cpu_s, server))
    what = f"Zipf workload (objects, phrasings), {CLIENTS} clients, against no cache"
    return compared(what, COMMAND, spent["on"], spent["off"], right["on"] / right["off"] - 1)


def embedder_batching() -> Measured:
    """Return what dynamic batching changes for the embedder, by perf_analyzer, with real texts of mixed lengths."""
    batched = shipped()
    variants = {"off": replace(batched, max_queue_delay_us=None), "on": batched}
    with tempfile.TemporaryDirectory(prefix="techniques-") as folder, serving(variants) as server:
        data = write_requests(Path(folder, "texts.json"), real_sentences(256, BUCKETS[-1]), Padding(BUCKETS))

        def act(model: str) -> int:
            before = _answered(server, model)
            perf_analyzer.measure(server, model, data, EMBEDDER_CLIENTS, WINDOW_MS)
            return _answered(server, model) - before

        spent = take_turns({model: partial(act, model) for model in variants}, PASSES, partial(_cpu_s, server))
    what = f"embedder, real texts, {EMBEDDER_CLIENTS} clients, dynamic batching against none"
    return compared(what, "perf.batching", spent["on"], spent["off"], tells_throughput=True)


def everything(fp32: Path, workload: Sequence[Asked]) -> list[Measured]:
    """Compare the shipped repository with the target in `fp32` served plainly, on the mixed workload."""
    tenants = iter(range(1000))
    right: dict[str, float] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="techniques-")))
        _write_plain(folder, fp32)
        servers = {
            "language_model": stack.enter_context(_server(folder)),
            "generate": stack.enter_context(_server(MODEL_REPOSITORY)),
        }

        def act(model: str) -> int:
            right[model] = _right(servers[model], model, workload, tenant=f"all {next(tenants)}")
            return len(workload)

        spent = take_turns({model: partial(act, model) for model in servers}, 1, partial(_cpu_s, *servers.values()))
    what = f"Zipf workload, {CLIENTS} clients, as shipped against fp32 with nothing applied"
    quality = right["generate"] / right["language_model"] - 1
    return [compared(what, COMMAND, spent["generate"], spent["language_model"], quality, tells_throughput=True)]


@contextmanager
def _server(repository: Path) -> Iterator[TritonServer]:
    with (
        tempfile.TemporaryDirectory(prefix="techniques-") as state,
        TritonServer(repository, state_dir=Path(state)) as server,
    ):
        yield server


def _right(server: TritonServer, model: str, workload: Sequence[Asked], **parameters: str) -> float:
    """Have several clients ask everything, each its next question when it has an answer; return the share right."""

    def ask(share: Sequence[Asked]) -> int:
        with GenerateClient(server.grpc_url, model) as client:
            return sum(client.ask(one.prompt, **parameters).text.startswith(one.summary) for one in share)

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(ask, [workload[at::CLIENTS] for at in range(CLIENTS)])) / len(workload)


def _answered(server: TritonServer, model: str) -> int:
    """Return how many requests a model has answered, from the metrics port."""
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    name = f'nv_inference_request_success{{model="{model}"'
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(name))


def _write_plain(repository: Path, fp32: Path) -> None:
    source = MODEL_REPOSITORY / "language_model" / "config.pbtxt"
    config = text_format.Parse(source.read_text(encoding="utf-8"), ModelConfig())
    for name, value in PLAIN.items():
        config.parameters[name].string_value = value
    folder = repository / "language_model"
    shutil.copytree(fp32, folder / "1" / "target")
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
