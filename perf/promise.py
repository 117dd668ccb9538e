"""What was promised of each technique, and what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.spending import Spent, saving

TITLES = {
    "quantization": "Quantization",
    "batching": "Batching",
    "caching": "Caching",
    "distillation": "Distillation",
    "speculative_decoding": "Speculative decoding",
    "kv_cache": "KV cache",
    "all": "All together",
}


@dataclass(frozen=True)
class Change:
    """Fractions: -0.4 is 40% lower. latency: of a request; cost: CPU seconds a request. None: nothing was promised."""

    latency: float | None
    cost: float | None
    quality: float | None

    def to_json(self) -> dict[str, float | None]:
        """Return the changes under the names of the results file."""
        return {"latency_change": self.latency, "cost_change": self.cost, "quality_change": self.quality}


PROMISED = {
    "quantization": Change(-0.40, -0.50, -0.03),
    "batching": Change(None, -0.70, 0.0),  # and a higher throughput
    "caching": Change(-0.90, -0.90, 0.0),
    "distillation": Change(-0.60, -0.80, -0.10),
    "speculative_decoding": Change(-0.50, -0.30, 0.0),
    "kv_cache": Change(-0.30, -0.20, 0.0),
    "all": Change(None, None, None),
}


@dataclass(frozen=True)
class Measured:
    """One comparison. what: of what with what. command: the one that tells more. throughput: answers/s, as a change."""

    what: str
    command: str
    change: Change
    throughput: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it for the results file."""
        more = {} if self.throughput is None else {"throughput_change": self.throughput}
        return {**self.change.to_json(), **more, "what": self.what, "command": self.command}


def compared(
    what: str, command: str, new: Spent, old: Spent, quality: float = 0.0, tells_throughput: bool = False
) -> Measured:
    """Return what `new` changes to `old`, and to their quality."""
    latency, cost = saving(new, old)
    return Measured(what, command, Change(latency, cost, quality), 1 / (1 + latency) - 1 if tells_throughput else None)


def shortfalls(name: str, change: Change) -> list[str]:
    """Return by how much a technique misses its promise, in percentage points; empty where it keeps it."""
    promised = PROMISED[name]
    missed = []
    for what, most, measured in (
        ("latency", promised.latency, change.latency),
        ("cost", promised.cost, change.cost),
        ("quality", change.quality, promised.quality),  # the only one that must not be lower
    ):
        if most is not None and measured is not None and measured > most:
            missed.append(f"{what} by {100 * (measured - most):.1f} points")
    return missed


def row(name: str, measured: Measured, also: list[Measured]) -> dict[str, Any]:
    """Return a technique's row of the results file: `measured` is held against the promise, `also` stands beside it."""
    return {
        **measured.to_json(),
        "promised": PROMISED[name].to_json(),
        "missed": shortfalls(name, measured.change),
        "also": [other.to_json() for other in also],
    }


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table that README shows."""
    lines = [
        "| technique | latency | cost | quality | promised | kept | compared | by `python -m` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in rows.items():
        promise = [_percent(value) for value in entry["promised"].values()]
        kept = "" if promise == [""] * 3 else "; ".join(entry["missed"]) or "yes"
        if kept not in ("", "yes"):
            kept = f"no: {kept}"
        lines.append(_line(f"**{TITLES[name]}**", entry, " / ".join(part or "–" for part in promise), kept))
        lines += [_line("", other, "", "") for other in entry["also"]]
    return "\n".join(lines) + "\n"


def _line(title: str, entry: Mapping[str, Any], promise: str, kept: str) -> str:
    figures = [_percent(entry[f"{name}_change"]) for name in ("latency", "cost", "quality")]
    what = entry["what"]
    if "throughput_change" in entry:
        what += f"; throughput {_percent(entry['throughput_change'])}"
    return f"| {' | '.join([title, *figures, promise.strip(' –/') and promise, kept, what, entry['command']])} |"


def _percent(change: float | None) -> str:
    if change is None:
        return ""
    return "0%" if abs(change) < 0.0005 else f"{100 * change:+.1f}%".replace("-", "−")


def plot(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw each technique's changes beside what was promised."""
    import matplotlib.pyplot as plt  # not needed where nothing is drawn

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True, layout="constrained")
    names = list(rows)
    for axis, figure_name in zip(axes, ("latency", "cost", "quality"), strict=True):
        key = f"{figure_name}_change"
        values = [100 * (rows[name][key] or 0.0) for name in names]
        promised = [rows[name]["promised"][key] for name in names]
        drawn = axis.barh([TITLES[name] for name in names], values, color="tab:blue", label="measured")
        axis.bar_label(drawn, fmt="%+.1f%%", padding=3, fontsize=8)
        marks = [(100 * value, place) for place, value in enumerate(promised) if value is not None]
        axis.plot(*zip(*marks, strict=True), "|", color="tab:red", ms=18, mew=2, label="promised")
        axis.axvline(0, color="black", linewidth=0.8)
        least = min([*values, *(value for value, _ in marks)])
        axis.set(title=f"{figure_name}, change", xlabel="%", xlim=(1.25 * least, -0.2 * least))
    axes[0].invert_yaxis()
    axes[2].legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
