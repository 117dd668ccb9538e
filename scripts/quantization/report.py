"""What quantization bought and cost: a table, JSON, and a plot of size against latency."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from scripts.quantization.study import FP32, Result

QUALITY = ("cosine_mean", "spearman", "recall_at_1", "accuracy", "agreement", "perplexity", "greedy_agreement")


def table(name: str, results: Mapping[str, Result], chosen: Result | None) -> Table:
    """Return the results side by side, latency in ms at batch sizes 1, 8 and 32."""
    base = results[FP32]
    shown = [figure for figure in QUALITY if any(figure in result.quality for result in results.values())]
    made = Table(title=name)
    made.add_column("precision")
    headers = ["MB", "of fp32", "p50 b1", "p50 b8", "p50 b32", "p95 b8", "times fp32 at b8", "peak MiB", *shown]
    for header in [*headers, "loss", "rows independent"]:
        made.add_column(header.replace("_", " "), justify="right")
    for result in results.values():
        size = [f"{result.size_bytes / 1e6:.1f}", f"{result.size_bytes / base.size_bytes:.3f}"]
        times = [f"{result.latency[batch].p50_ms:.2f}" for batch in (1, 8, 32)] + [f"{result.latency[8].p95_ms:.2f}"]
        faster = f"{base.latency[8].p50_ms / result.latency[8].p50_ms:.2f}"
        quality = [f"{result.quality.get(figure, 1.0):.4f}" for figure in shown]
        tail = [f"{result.loss:.4f}", "yes" if result.rows_independent else "no"]
        style = "bold green" if result is chosen else None
        cells = [result.precision, *size, *times, faster, f"{result.peak_memory_mib:.0f}", *quality, *tail]
        made.add_row(*cells, style=style)
    return made


def notes(results: Mapping[str, Result]) -> list[str]:
    """Return a line for each thing to know: what stayed in fp32, and what is slow where it is to run."""
    lines = []
    for result in results.values():
        if result.excluded:
            lines.append(f"{result.precision}: in fp32 for quality: {', '.join(result.excluded)}")
        if result.warning:
            lines.append(f"warning: {result.warning}")
    return lines


def write(folder: Path, name: str, results: Mapping[str, Result], chosen: Result | None, machine: Mapping) -> None:
    """Write report.json and report.png into `folder`."""
    content = {
        "model": name,
        "chosen": chosen.precision if chosen else None,
        "precisions": {precision: result.as_json() for precision, result in results.items()},
        "machine": dict(machine),
    }
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    points = {precision: point(result) for precision, result in results.items()}
    plot(folder / "report.png", {name: points})


def point(result: Result) -> dict[str, float]:
    """Return what the plot shows of a result."""
    return {"mb": result.size_bytes / 1e6, "ms": result.latency[8].p50_ms, "loss": result.loss}


def plot(path: Path, models: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Draw each model's precisions: size against latency at batch 8, coloured by quality loss."""
    import matplotlib.pyplot as plt  # not needed where models are only built

    figure, axes = plt.subplots(1, len(models), figsize=(6.4 * len(models), 4.8), squeeze=False, layout="constrained")
    for axis, (name, points) in zip(axes[0], models.items(), strict=True):
        losses = [min(max(values["loss"], 0), 0.05) * 100 for values in points.values()]
        x, y = ([values[key] for values in points.values()] for key in ("mb", "ms"))
        drawn: Any = axis.scatter(x, y, c=losses, cmap="RdYlGn_r", vmin=0, vmax=5, s=90, edgecolors="black")
        right, top = 1.25 * max(x), 1.12 * max(y)
        axis.set(title=name, xlabel="size, MB", ylabel="p50 latency at batch 8, ms", xlim=(0, right), ylim=(0, top))
        _label(axis, points, right, top)
        figure.colorbar(drawn, ax=axis, label="quality loss, % (5 and more: red)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _label(axis: Any, points: Mapping[str, Mapping[str, float]], right: float, top: float) -> None:
    """Write each point's name beside it, one above the other where points lie close together."""
    taken: list[tuple[float, float]] = []
    for precision, values in sorted(points.items(), key=lambda item: item[1]["ms"]):
        x, y = values["mb"], values["ms"]
        while any(abs(x - left) < 0.2 * right and abs(y - height) < 0.035 * top for left, height in taken):
            y += 0.035 * top
        taken.append((x, y))
        axis.text(x + 0.02 * right, y, precision, fontsize=8, va="center")
