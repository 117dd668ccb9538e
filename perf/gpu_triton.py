"""A pair through Triton: `python -m perf.gpu_triton PAIR [--kind KIND_CPU]`, JSON out.

PAIR is a folder made by perf.gpu_pair, or model_repository/language_model, whose unseen questions are asked then.
Clients stream one answer after the other over gRPC, from several processes: one cannot read as fast as a GPU decodes.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import chain, cycle, islice, product
from pathlib import Path
from typing import NamedTuple

from google.protobuf import text_format
from rich.console import Console
from tritonclient.grpc import model_config_pb2

from scripts.demo import unseen_prompts
from scripts.serving.client import GenerateClient
from scripts.serving.installation import MODEL_REPOSITORY, PYTHON_BACKENDS
from scripts.serving.server import TritonServer

sys.path.append(str(PYTHON_BACKENDS))

from speculative_decoding.tokenizer import Tokenizer

MODEL = "language_model"
CLIENTS = (1, 8, 32)
ANSWER_TOKENS, TURNS = 96, 5
WAYS: dict[str, dict[str, int]] = {"plain": {"speculation_length": 0}, "speculative": {}}
KINDS = ("KIND_GPU", "KIND_CPU")
console = Console(stderr=True)


class Heard(NamedTuple):
    """What one client got: its answers, their tokens, and when it began and ended, by a clock of all processes."""

    answers: list[str]
    tokens: int
    began: float
    ended: float


def prompts_of(pair: Path) -> list[str]:
    """Return prompts that neither model has seen."""
    made = pair / "prompts.json"
    if not made.is_file():
        return unseen_prompts()
    tokenizer = Tokenizer(pair / "1" / "target", "raw")
    return [tokenizer.decode(tokens) for tokens in json.loads(made.read_text())["prompts"]]


def write_repository(repository: Path, pair: Path, kind: str) -> None:
    """Put the pair into `repository`, as config.pbtxt has it, but for what another pair and many clients ask for."""
    shipped = (MODEL_REPOSITORY / MODEL / "config.pbtxt").read_text(encoding="utf-8")
    config = text_format.Parse(shipped, model_config_pb2.ModelConfig())
    config.instance_group[0].kind = model_config_pb2.ModelInstanceGroup.Kind.Value(kind)
    has_template = (pair / "1" / "target" / "chat_template.jinja").is_file()
    config.parameters["prompt_format"].string_value = "chat" if has_template else "raw"
    config.parameters["max_sequences"].string_value = str(max(CLIENTS))
    folder = repository / MODEL
    folder.mkdir(parents=True)
    (folder / "1").symlink_to((pair / "1").resolve())
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")


def ask(url: str, prompts: Sequence[str], parameters: Mapping[str, int]) -> Heard:
    """Be one client, which asks one prompt after the other."""
    with GenerateClient(url, MODEL) as client:
        began = time.perf_counter()
        answers = [
            client.ask(prompt, stream=True, max_tokens=ANSWER_TOKENS, ignore_eos=True, **parameters)
            for prompt in prompts
        ]
        ended = time.perf_counter()
    return Heard([answer.text for answer in answers], sum(answer.info["tokens"] for answer in answers), began, ended)


def ask_at_once(url: str, shares: Sequence[Sequence[str]], parameters: Mapping[str, int]) -> list[Heard]:
    """Be so many clients, one for each share of the prompts."""
    with ThreadPoolExecutor(len(shares)) as threads:
        return list(threads.map(lambda prompts: ask(url, prompts, parameters), shares))


def measure(url: str, prompts: Sequence[str], clients: int) -> dict[str, float]:
    """Return plain and speculative tokens/s of so many clients together, and how many answers differ.

    Tokens/s are the median of TURNS turns, in each of which both ways have their own. prompts: one for each client, at
    least.
    """
    shares = [prompts[number::clients] for number in range(clients)]
    processes = min(clients, os.cpu_count() or 1)
    turns: dict[str, list[float]] = {way: [] for way in WAYS}
    answers: dict[str, list[str]] = {}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for _, (way, parameters) in product(range(1 + TURNS), WAYS.items()):  # the first turn warms up
            asking = [
                pool.submit(ask_at_once, url, shares[number::processes], parameters) for number in range(processes)
            ]
            heard = list(chain.from_iterable(future.result() for future in asking))
            seconds = max(one.ended for one in heard) - min(one.began for one in heard)
            turns[way].append(sum(one.tokens for one in heard) / seconds)
            answers[way] = [answer for one in heard for answer in one.answers]
    tps = {way: statistics.median(each[1:]) for way, each in turns.items()}
    pairs = zip(answers["plain"], answers["speculative"], strict=True)
    return {
        "plain_tps": round(tps["plain"], 1),
        "speculative_tps": round(tps["speculative"], 1),
        "ratio": round(tps["speculative"] / tps["plain"], 3),
        "answers": len(prompts),
        "differences": sum(plain != speculative for plain, speculative in pairs),
    }


def through_triton(pair: Path, kind: str, at_once: Sequence[int] = CLIENTS) -> dict[str, dict[str, float]]:
    """Serve the pair and return, by number of clients, what measure() does. Raises ServeError."""
    prompts, found = prompts_of(pair), {}
    with tempfile.TemporaryDirectory() as scratch:
        write_repository(Path(scratch) / "repository", pair, kind)
        with TritonServer(Path(scratch) / "repository", state_dir=Path(scratch) / "state") as server:
            for clients in at_once:
                some = list(islice(cycle(prompts), max(16, 3 * clients)))
                found[str(clients)] = measure(server.grpc_url, some, clients)
                console.print(clients, "clients:", found[str(clients)])
    return found


def main() -> None:
    """Measure, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="of the instance group (default: %(default)s)")
    arguments = parser.parse_args()
    if not (arguments.pair / "1" / "target").is_dir():
        parser.error(f"PAIR {arguments.pair} has no 1/target: make one with perf.gpu_pair")
    print(json.dumps(through_triton(arguments.pair, arguments.kind)))


if __name__ == "__main__":
    main()
