"""The whole story on a real server: a miss, an exact hit, a hit by meaning, a near miss, a stream, and what it buys.

Exits 0 only if everything was as it should be.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scripts.demo_models.phrasings import UNSEEN
from scripts.serving.client import Answer, GenerateClient
from scripts.serving.errors import ServeError
from scripts.serving.server import TritonServer

PROMPT = "What does itertools.chain do?"
REWORDED = "what is it that itertools.chain does?"
NEAR_MISS = "What does itertools.count do?"
STREAMED = "Explain what heapq.heappush does."
# Asked in phrasings that neither model was trained on.
NAMES = (
    "str.join", "os.path.join", "heapq.heapreplace", "re.sub", "math.sqrt", "dict.get", "json.loads", "len",
    "functools.lru_cache", "socket.socket.bind", "random.Random.shuffle", "itertools.zip_longest", "list.sort",
    "collections.OrderedDict.move_to_end", "threading.Condition.wait", "shutil.copytree", "bisect.insort_right",
    "statistics.median", "textwrap.dedent", "string.capwords", "queue.Queue.put", "zipfile.ZipFile.extractall",
    "logging.Logger.warning", "asyncio.sleep",
)  # fmt: skip
STORED_WITHIN_S = 5.0
HITS_MEASURED = 50
PASSES = 2


class Surprise(Exception):  # noqa: N818 - what the demo did not expect
    """Something was not as promised."""


@dataclass(frozen=True)
class Speed:
    """Speculative against plain decoding of the same prompts, in one run, with identical output."""

    plain_tokens_per_s: float
    speculative_tokens_per_s: float
    acceptance_rate: float

    @property
    def ratio(self) -> float:
        """How many times as fast speculation is."""
        return self.speculative_tokens_per_s / self.plain_tokens_per_s


def unseen_prompts() -> list[str]:
    """Return one question per name, in phrasings that the demo models were not trained on."""
    return [UNSEEN[index % len(UNSEEN)].format(n=name) for index, name in enumerate(NAMES)]


def measure_speculation(client: GenerateClient) -> Speed:
    """Answer the unseen prompts plainly and speculatively, in turn. Raises Surprise when an answer differs."""
    seconds = {"plain": 0.0, "speculative": 0.0}
    tokens = {"plain": 0, "speculative": 0}
    rates = []
    for turn in range(PASSES + 1):  # the first pass warms up
        for prompt in unseen_prompts():
            plain = client.ask(prompt, cache="off", speculation_length=0)
            speculative = client.ask(prompt, cache="off")
            if plain.text != speculative.text:
                raise Surprise(f"speculation changed the answer to {prompt!r}: {plain.text!r}, {speculative.text!r}")
            if turn == 0:
                continue
            for kind, answer in (("plain", plain), ("speculative", speculative)):
                seconds[kind] += answer.total_ms / 1e3
                tokens[kind] += answer.info["tokens"]
            rates.append(speculative.info["acceptance_rate"])
    return Speed(
        tokens["plain"] / seconds["plain"],
        tokens["speculative"] / seconds["speculative"],
        statistics.mean(rate for rate in rates if rate is not None),
    )


def measure_hits(client: GenerateClient) -> tuple[float, float]:
    """Return the median latency of a miss (as served, speculatively) and of an exact hit, in milliseconds."""
    misses = [client.ask(prompt, tenant="measure") for prompt in unseen_prompts()]
    _expect(all(miss.info["source"] == "decoded" for miss in misses), "a question was taken for another one")
    await_hit(client, unseen_prompts()[-1], "exact", tenant="measure")
    hits = [client.ask(unseen_prompts()[0], tenant="measure") for _ in range(HITS_MEASURED)]
    _expect(all(hit.info["source"] == "exact" for hit in hits), "a stored answer was not found again")
    return statistics.median(miss.total_ms for miss in misses), statistics.median(hit.total_ms for hit in hits)


def await_hit(client: GenerateClient, prompt: str, source: str, **parameters: str) -> Answer:
    """Ask until the answer comes from the cache: storing happens after the client has its answer. Raises Surprise."""
    deadline = time.monotonic() + STORED_WITHIN_S
    while time.monotonic() < deadline:
        answer = client.ask(prompt, **parameters)
        if answer.info["source"] == source:
            return answer
        time.sleep(0.05)
    raise Surprise(f"{prompt!r} was not found in the cache as {source}")


def tell(client: GenerateClient, console: Console) -> None:
    """Ask the five questions of the story, check each answer, and print the table."""
    table = Table("", "prompt", "answered by", "similarity", "accepted drafts", "first ms", "total ms", "answer")
    miss = client.ask(PROMPT)
    _expect(miss.info["source"] == "decoded", "the first question was not decoded")
    _expect(bool(miss.info["acceptance_rate"]), "no drafted token was accepted")
    _expect("chain" in miss.text, f"the answer to {PROMPT!r} was {miss.text!r}")
    _row(table, "miss", PROMPT, miss)
    hit = await_hit(client, PROMPT, "exact")
    _expect(hit.text == miss.text, "the exact hit has another answer")
    _row(table, "exact hit", PROMPT, hit)
    meant = client.ask(REWORDED)
    _expect(meant.info["source"] == "semantic" and meant.text == miss.text, "the reworded question was not a hit")
    _row(table, "hit by meaning", REWORDED, meant)
    near = client.ask(NEAR_MISS)
    _expect(near.info["source"] == "decoded" and near.text != miss.text, "the near miss got the cached answer")
    _row(table, "near miss", NEAR_MISS, near)
    stream = client.ask(STREAMED, stream=True)
    _expect(len(stream.pieces) > 1, "the stream came in one piece")
    _row(table, f"stream, {len(stream.pieces)} pieces", STREAMED, stream)
    console.print(table)


def _row(table: Table, name: str, prompt: str, answer: Answer) -> None:
    similarity, rate = answer.info.get("similarity"), answer.info.get("acceptance_rate")
    table.add_row(
        name,
        prompt,
        answer.info["source"],
        "" if similarity is None else f"{similarity:.3f}",
        "" if rate is None else f"{rate:.0%}",
        f"{answer.first_ms:.1f}",
        f"{answer.total_ms:.1f}",
        answer.text.splitlines()[0][:60],
    )


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Surprise(otherwise)


def with_server(act: Callable[[GenerateClient], None]) -> None:
    """Run `act` against a server of its own, started with an empty cache and stopped afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="inference-state-") as state,
        TritonServer(state_dir=Path(state)) as server,
        GenerateClient(server.grpc_url) as client,
    ):
        act(client)


def main() -> int:
    """Run the demo; return the exit status."""
    console = Console()

    def act(client: GenerateClient) -> None:
        console.print(f"Every model answers after {time.monotonic() - started:.1f} s.")
        tell(client, console)
        speed = measure_speculation(client)
        console.print(
            f"Speculative decoding: {speed.speculative_tokens_per_s:.0f} tokens/s against "
            f"{speed.plain_tokens_per_s:.0f} plain ({speed.ratio:.2f} times), {speed.acceptance_rate:.0%} of drafts "
            f"accepted, identical answers to {len(NAMES)} questions in phrasings the models were not trained on."
        )
        _expect(speed.ratio > 1, "speculation is slower than plain decoding")
        miss, hit = measure_hits(client)
        console.print(f"Cache: {hit:.1f} ms for an exact hit against {miss:.1f} ms for a miss (medians, over gRPC).")
        _expect(hit < miss, "a hit takes longer than a miss")

    started = time.monotonic()
    console.print("Starting Triton ...")
    try:
        with_server(act)
    except (Surprise, ServeError) as problem:
        console.print(f"error: {problem}", style="red", markup=False)
        return 1
    console.print("The server is stopped. `make serve` keeps one running.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
