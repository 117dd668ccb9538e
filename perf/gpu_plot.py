"""The figures of perf.gpu as a picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

WAYS = ("plain", "speculative", "sampled plain", "sampled speculative")


def plot(path: Path, results: dict[str, Any]) -> None:
    """Draw tokens a second by sequences at once, and what a step takes beside the bare call and the weights."""
    figure, (speeds, steps) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    peers = {name: found for name, found in results["peers"].items() if "error" not in found}
    for name, found in {**{way: results["tokens_per_s"][way] for way in WAYS}, **peers}.items():
        style = "o--" if name in peers else "o-"
        speeds.plot([int(rows) for rows in found], list(found.values()), style, label=name, markersize=4)
    speeds.set(
        xscale="log", yscale="log", xlabel="sequences at once", ylabel="tokens/s", title="trained pair, 0.28B + 10M"
    )
    speeds.set_xticks((1, 8, 32, 64), labels=("1", "8", "32", "64"))
    speeds.legend(fontsize=7)
    for place, (shape, times) in enumerate(results["step_ms"].items()):
        labels = list(times)
        color = f"C{place}"
        steps.plot(labels, list(times.values()), "o-", color=color, label=f"{shape}, all included", markersize=4)
        steps.plot(labels, list(results["bare_ms"][shape].values()), "x:", color=color, label="bare call", markersize=4)
        steps.axhline(
            results["bound_ms"][shape], color=color, linestyle="--", linewidth=0.8, label="reading the weights"
        )
    steps.set(
        yscale="log", xlabel="sequences x tokens of each", ylabel="ms", title=f"a step ({results['machine']['gpu']})"
    )
    steps.tick_params(axis="x", rotation=45)
    steps.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
