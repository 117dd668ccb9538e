"""The figures of perf.batching as tables, as lines to put into config.pbtxt, and as curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

Result = Mapping[str, Any]
LABELS = {"off": "batching off", "defaults": "Triton's defaults", "chosen": "chosen"}


def tables(result: Result) -> list[Table]:
    """Return the curves and the ways to pad."""
    return [_curves(result), _paddings(result["mixed"])]


def notes(result: Result) -> list[str]:
    """Return what was chosen, whether config.pbtxt says so, and whether the targets are met."""
    chosen = result["chosen"]
    differing = {name: value for name, value in chosen.items() if value != result["shipped"][name]}
    lines = [f"chosen: {_listed(chosen)}; {len(result['sweep']['measured'])} of {result['sweep']['grid']} measured"]
    lines.append(f"change in model_repository/embedder/config.pbtxt: {_listed(differing) or 'nothing'}")
    lines.append(
        f"best throughput within {result['budget_ms']:.0f} ms: {result['share_of_limit']:.2f} of the limit; "
        f"a lone client loses {result['lone_loss']:.1%}"
    )
    missed = [name for name, target in result["targets"].items() if not target["met"]]
    return [*lines, f"targets missed: {', '.join(missed) or 'none'}"]


def plot(path: Path, result: Result) -> None:
    """Draw latency against throughput for each variant, and throughput for each way to pad."""
    import matplotlib.pyplot as plt  # not needed where nothing is drawn

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    for name, points in result["curves"].items():
        rates, p99 = [point["per_s"] for point in points], [point["p99_ms"] for point in points]
        drawn = left.plot(rates, [point["p50_ms"] for point in points], marker="o", label=f"{LABELS[name]}, p50")
        left.plot(rates, p99, marker=".", linestyle=":", color=drawn[0].get_color(), label=f"{LABELS[name]}, p99")
    left.axvline(result["limit"]["sentences_per_s"], color="black", linestyle="--", label="ONNX Runtime directly")
    left.axhline(result["budget_ms"], color="tab:red", linewidth=0.8, label="budget for p99")
    clients = [point["clients"] for point in result["curves"]["chosen"]]
    title = f"{result['tokens']} tokens, {clients[0]} to {clients[-1]} clients"
    left.set(title=title, xlabel="sentences/s", ylabel="latency, ms", yscale="log", xlim=(0, None))
    left.legend(fontsize=8)
    _bars(right, result["mixed"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis: Any, mixed: Mapping[str, Any]) -> None:
    rates = {f"padded {name}": figures["sentences_per_s"] for name, figures in mixed["paddings"].items()}
    drawn = axis.barh(list(rates), list(rates.values()))
    axis.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8)
    axis.axvline(mixed["limit_per_s"], color="black", linestyle="--", label="directly, sorted by length")
    axis.invert_yaxis()
    axis.margins(x=0.12)
    title = f"real texts, {mixed['tokens_mean']:.0f} tokens on average, {mixed['clients']} clients"
    axis.set(title=title, xlabel="sentences/s")
    axis.legend(fontsize=8)


def _curves(result: Result) -> Table:
    table = Table(
        title=f"embedder, {result['tokens']} tokens; limit {result['limit']['sentences_per_s']:.0f} sentences/s"
    )
    table.add_column("clients", justify="right")
    for name in result["curves"]:
        for column in ("1/s", "p50 ms", "p99 ms", "batch"):
            table.add_column(f"{name}: {column}", justify="right")
    for points in zip(*result["curves"].values(), strict=True):
        cells = [
            text
            for point in points
            for text in (
                f"{point['per_s']:.0f}",
                f"{point['p50_ms']:.1f}",
                f"{point['p99_ms']:.1f}",
                f"{point['batch']:.1f}",
            )
        ]
        table.add_row(str(points[0]["clients"]), *cells)
    return table


def _paddings(mixed: Mapping[str, Any]) -> Table:
    title = f"real texts, {mixed['clients']} clients; limit {mixed['limit_per_s']:.0f} sentences/s"
    table = Table("padded", title=title)
    for column in ("sentences/s", "of the limit", "p99 ms", "batch", "padding"):
        table.add_column(column, justify="right")
    for name, figures in mixed["paddings"].items():
        table.add_row(
            name,
            f"{figures['sentences_per_s']:.0f}",
            f"{figures['sentences_per_s'] / mixed['limit_per_s']:.2f}",
            f"{figures['p99_ms']:.0f}",
            f"{figures['batch']:.1f}",
            f"{figures['padding']:.0%}",
        )
    return table


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
