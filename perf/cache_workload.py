"""A workload as clients make it: few prompts often, many rarely, in ever other words, through `generate`."""

import time
from collections import defaultdict
from typing import Any

import numpy as np

from perf.zipf import zipf
from scripts.demo import NAMES, with_server
from scripts.demo_models.phrasings import UNSEEN
from scripts.serving.client import GenerateClient

REQUESTS = 600
PAUSE_S = 0.005  # an answer is stored after its client has it


def run_workload() -> dict[str, Any]:
    """Return hit rate, wrong hits, and the shares of latency and tokens saved.

    A hit is wrong when its answer was decoded for a question about another name, and never for one about this name.
    """
    random = np.random.default_rng(0)
    weights = zipf(len(NAMES))
    decoded_for: dict[str, set[str]] = defaultdict(set)
    milliseconds: dict[str, list[float]] = defaultdict(list)
    tokens: dict[str, int] = defaultdict(int)
    counts: dict[str, int] = defaultdict(int)

    def act(client: GenerateClient) -> None:
        for _ in range(REQUESTS):
            name = str(random.choice(NAMES, p=weights))
            question = UNSEEN[int(random.integers(len(UNSEEN)))].format(n=name)
            answer = client.ask(question, tenant="workload")
            source = answer.info["source"]
            kind = "miss" if source in ("decoded", "coalesced") else "hit"
            if kind == "miss":
                decoded_for[answer.text].add(name)
                time.sleep(PAUSE_S)
            counts[source] += 1
            counts["wrong"] += kind == "hit" and name not in decoded_for[answer.text]
            milliseconds[kind].append(answer.total_ms)
            tokens[kind] += answer.info["tokens"]

    with_server(act)
    spent = sum(milliseconds["hit"]) + sum(milliseconds["miss"])
    without = REQUESTS * float(np.mean(milliseconds["miss"]))
    return {
        "requests": REQUESTS,
        "hit_rate": round(len(milliseconds["hit"]) / REQUESTS, 4),
        "exact_hits": counts["exact"],
        "semantic_hits": counts["semantic"],
        "wrong_hits": counts["wrong"],
        "latency_saved": round(1 - spent / without, 4),
        "tokens_saved": round(tokens["hit"] / (tokens["hit"] + tokens["miss"]), 4),
    }
