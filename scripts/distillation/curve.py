"""What a run went through, as a plot."""

import importlib.util
import json
import math
from pathlib import Path

from scripts.distillation.checkpoint import Progress


def write(progress: Progress, path: Path) -> None:
    """Store the curve as JSON: [step, loss learned from, figures on held-out data] at each evaluation."""
    path.write_text(json.dumps(progress.curve).replace("NaN", "null"), encoding="utf-8")


def plot(progress: Progress, path: Path, title: str) -> None:
    """Draw the loss learned from, the held-out loss and, where there is one, the acceptance rate by steps."""
    if importlib.util.find_spec("matplotlib") is None:  # a lent GPU machine often has torch and little else
        print(f"matplotlib is not installed: no {path.name}", flush=True)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    steps = [step for step, _, _ in progress.curve]
    learned = [(step, loss) for step, loss, _ in progress.curve if not math.isnan(loss)]
    if learned:
        axis.plot(*zip(*learned, strict=True), label="learned from")
    axis.plot(steps, [figures["loss"] for _, _, figures in progress.curve], label="held out")
    axis.axvline(progress.best_step, color="tab:grey", linewidth=0.8, label="kept")
    axis.set(title=title, xlabel="steps", ylabel="loss", yscale="log")
    axis.legend(loc="upper right")
    if "acceptance_rate" in progress.curve[0][2]:
        other = axis.twinx()
        rates = [figures["acceptance_rate"] for _, _, figures in progress.curve]
        other.plot(steps, rates, color="tab:green", linestyle="--")
        other.set_ylabel("acceptance rate (dashed)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
