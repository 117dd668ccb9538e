"""What speculation and the cache buy on this machine, through the real server: `python -m perf.generate`.

Plain and speculative decoding take turns over the same prompts, in phrasings that neither model was trained on, and
must give the same answers. The last line of output is the JSON that goes to perf/results/generate.json.
"""

import json
from pathlib import Path
from typing import Any

from scripts.demo import measure_hits, measure_speculation, with_server
from scripts.machine import describe_machine
from scripts.serving.client import GenerateClient

RESULT = Path(__file__).parent / "results" / "generate.json"


def measure(client: GenerateClient) -> dict[str, Any]:
    """Return tokens/s of both kinds of decoding and the latencies of misses and exact hits, at one client."""
    speed = measure_speculation(client)
    miss, hit = measure_hits(client)
    return {
        "plain_tokens_per_s": round(speed.plain_tokens_per_s, 1),
        "speculative_tokens_per_s": round(speed.speculative_tokens_per_s, 1),
        "ratio": round(speed.ratio, 3),
        "acceptance_rate": round(speed.acceptance_rate, 3),
        "miss_ms_p50": round(miss, 2),
        "exact_hit_ms_p50": round(hit, 2),
        "machine": describe_machine(),
    }


def main() -> None:
    """Measure against a server of our own, write the result and print it."""

    def act(client: GenerateClient) -> None:
        result = json.dumps(measure(client))
        RESULT.write_text(result + "\n", encoding="utf-8")
        print(result)

    with_server(act)


if __name__ == "__main__":
    main()
