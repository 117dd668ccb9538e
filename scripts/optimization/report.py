"""What was tried, kept and rejected: as a table, and as a page that needs nothing beside it."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from scripts.optimization.measurement import Measurement
from scripts.optimization.optimizer import Search, Targets, Trial
from scripts.whole_file import write_whole

FIGURES = ("p50 ms", "p95 ms", "p99 ms", "requests/s", "CPU s / 1,000", "MiB", "quality")
COLUMNS = ("technique", "tried", *FIGURES, "verdict")
COLOURS = {"original": "tab:grey", "kept": "tab:green", "rejected": "tab:red"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; width: 100%; font-size: 13px }
th, td { text-align: left; padding: 4px 8px; border-bottom: 1px solid #ddd; vertical-align: top }
td.number, th.number { text-align: right; white-space: nowrap }
tr.kept { background: #e7f6e7 } tr.original { background: #f2f2f2 } tr.rejected td { color: #777 }
pre { background: #f6f6f6; padding: .8em; overflow-x: auto } svg { max-width: 100%; height: auto }
"""


def rows(trials: Sequence[Trial]) -> list[list[str]]:
    """Return the cells of a row for each trial, as COLUMNS names them."""
    return [
        [
            trial.technique or "as it came",
            trial.setup.describe() if trial.setup else "",
            *_figures(trial.measured),
            f"{trial.verdict}: {trial.reason}" if trial.reason else trial.verdict,
        ]
        for trial in trials
    ]


def table(name: str, search: Search) -> Table:
    """Return the table for a terminal."""
    drawn = Table(title=name)
    for column in COLUMNS:
        drawn.add_column(column, justify="right" if column in FIGURES else "left", no_wrap=column in COLUMNS[:2])
    for trial, cells in zip(search.trials, rows(search.trials), strict=True):
        style = {"kept": "green", "original": "bold"}.get(trial.verdict, "dim")
        drawn.add_row(*cells, style=style)
    return drawn


def summary(search: Search, targets: Targets) -> str:
    """Return in a sentence or two what was reached."""
    best, original = search.measured, search.original
    reached = (
        f"p95 {best.p95_ms:.1f} ms (target {targets.latency_ms:g}), quality {best.quality:.4f} "
        f"(target {targets.quality:g}): {search.best.describe()}"
    )
    changes = ", ".join(
        f"{label} {new / old - 1:+.0%}"
        for label, new, old in (
            ("mean latency", best.mean_ms, original.mean_ms),
            ("throughput", best.per_s, original.per_s),
            ("cost", best.cpu_s_per_1000, original.cpu_s_per_1000),
            ("memory", best.memory_mib, original.memory_mib),
        )
    )
    if targets.are_met(best):
        return f"Targets met. {reached}. Against the model as it came: {changes}."
    return f"Targets not met. The closest: {reached}. Against the model as it came: {changes}."


def page(
    name: str, search: Search, targets: Targets, facts: Mapping[str, object], commands: Sequence[str], path: Path
) -> None:
    """Write the page. facts: about workload and machine. commands: to reproduce it, and to serve the result."""
    head = "".join(
        f"<th{' class=number' if column in FIGURES else ''}>{html.escape(column)}</th>" for column in COLUMNS
    )
    body = "".join(_row(trial, cells) for trial, cells in zip(search.trials, rows(search.trials), strict=True))
    listed = "".join(f"<li>{html.escape(key)}: {html.escape(str(value))}</li>" for key, value in facts.items())
    shown = "\n".join(html.escape(command) for command in commands)
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}: optimized</title><style>{STYLE}</style></head>
<body><h1>{html.escape(name)}</h1><p>{html.escape(summary(search, targets))}</p>
{_plot(search, targets)}
<h2>What was tried</h2>
<p>Each group stands beside the best so far, measured in turns in one run; figures of different groups differ by the
machine's noise as well. Objective: {targets.objective}.</p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<h2>Workload and machine</h2><ul>{listed}</ul>
<h2>Reproduce and serve</h2><pre>{shown}</pre></body></html>
"""
    write_whole(path, text)


def _row(trial: Trial, cells: Sequence[str]) -> str:
    marked = "".join(
        f"<td{' class=number' if column in FIGURES else ''}>{html.escape(cell)}</td>"
        for column, cell in zip(COLUMNS, cells, strict=True)
    )
    return f'<tr class="{trial.verdict.replace(" ", "-")}">{marked}</tr>'


def _figures(measured: Measurement | None) -> list[str]:
    if measured is None:
        return [""] * 7
    return [
        f"{measured.p50_ms:.1f}",
        f"{measured.p95_ms:.1f}",
        f"{measured.p99_ms:.1f}",
        f"{measured.per_s:.1f}",
        f"{measured.cpu_s_per_1000:.2f}",
        f"{measured.memory_mib:.0f}",
        f"{measured.quality:.4f}",
    ]


def _plot(search: Search, targets: Targets) -> str:
    """Return the latency and the cost of all that was measured, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # not needed where nothing is drawn

    trials = [trial for trial in search.trials if trial.measured]
    measured = [trial.measured for trial in trials if trial.measured]
    labels = [trial.setup.describe() if trial.setup else "" for trial in trials]
    colours = [COLOURS[trial.verdict] for trial in trials]
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.2 + 0.32 * len(trials)), sharey=True, layout="constrained")
    places = list(range(len(trials)))
    for axis, label, values in (
        (axes[0], "latency, ms: bar to p95, mark at p50", [one.p95_ms for one in measured]),
        (axes[1], "CPU seconds of 1,000 requests", [one.cpu_s_per_1000 for one in measured]),
    ):
        drawn = axis.barh(places, values, color=colours, alpha=0.75)
        axis.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8)
        axis.set_xlabel(label)
        axis.margins(x=0.12)
    axes[0].plot([one.p50_ms for one in measured], places, "|", color="black", ms=12)
    axes[0].axvline(targets.latency_ms, color="black", linestyle="--", linewidth=0.8)
    axes[0].set_yticks(places, labels, fontsize=8)
    axes[0].invert_yaxis()
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    plt.close(figure)
    return drawing.getvalue()[drawing.getvalue().index("<svg") :]
