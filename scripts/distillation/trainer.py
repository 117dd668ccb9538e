"""The loop that every distillation goes through: learn, look at held-out data, keep the best, stop early."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scripts.distillation import checkpoint
from scripts.distillation.checkpoint import Progress
from scripts.distillation.errors import DistillationError
from scripts.distillation.settings import Settings

CHECKPOINT_SECONDS = 60.0
SHOWN_SECONDS = 10.0
Report = Callable[[str], None]


class Task(Protocol):
    """What is learned. Both methods depend on their arguments only, so that a run can be taken up anywhere."""

    def loss(self, student: nn.Module, step: int) -> Tensor:
        """Return the loss of a step, to be differentiated."""

    def held_out(self, student: nn.Module) -> dict[str, float]:
        """Return figures on data that is not learned from; early stopping watches `loss`."""


class Trainer:
    """Trains one student in place and leaves it with the weights that were best on held-out data."""

    def __init__(
        self, student: nn.Module, task: Task, settings: Settings, path: Path, identity: dict[str, Any], report: Report
    ) -> None:
        """Go on from the checkpoint at `path` where there is one. Raises DistillationError when it is another run's."""
        self.settings = settings
        self.progress = Progress()
        self._student, self._task = student, task
        self._path, self._identity, self._report = path, identity, report
        self._device = next(student.parameters()).device
        decayed = [weight for weight in student.parameters() if weight.dim() > 1]
        others = [weight for weight in student.parameters() if weight.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            groups, lr=settings.peak_rate, betas=(0.9, 0.98), fused=self._device.type == "cuda"
        )
        self._best = _copied(student)
        self._stopping = False
        self._resume()

    def _resume(self) -> None:
        found = checkpoint.load(self._path, self._identity)
        if found is None:
            return
        self.progress, state = found
        self._student.load_state_dict(state["student"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._best = {name: value.to(self._device) for name, value in state["best"].items()}
        self._report(f"going on after {self._place()}")

    def run(self, stop_after: int | None = None) -> Progress:
        """Learn to the end, or for `stop_after` steps at most, and return what was reached.

        Only a run that reached its end leaves the best weights in the student.
        """
        progress = self.progress
        until = math.inf if stop_after is None else progress.steps + stop_after
        self._student.train()
        if not progress.curve:
            self._evaluate(float("nan"))
        saved = shown = time.monotonic()
        while progress.steps < until and not self.ended and not self._stopping:
            started, before = time.monotonic(), self._evaluations()
            progress.learned.append(self._step(progress.steps))
            progress.steps += 1
            progress.seconds += time.monotonic() - started
            if self._evaluations() > before:
                self._evaluate(statistics.fmean(progress.learned))
                progress.learned.clear()
                shown = time.monotonic()
            elif time.monotonic() - shown > SHOWN_SECONDS:
                self._report(f"{self._place()}, loss {statistics.fmean(progress.learned[-50:]):.4f}{self._left()}")
                shown = time.monotonic()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()
        if self.ended:
            self._student.load_state_dict(self._best)
            self._student.eval()
        return progress

    def stop(self) -> None:
        """Let `run` return after the step at hand; it can be called from a signal handler."""
        self._stopping = True

    @property
    def _done(self) -> float:
        return self.settings.done(self.progress.steps, self.progress.seconds)

    def _evaluations(self) -> int:
        return int(self._done * self.settings.evaluations + 1e-9)

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to learn: the run is over, or stopped early."""
        return self._done >= 1 or self.progress.without_better >= self.settings.patience

    def _step(self, step: int) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.rate(self._done)
        loss = self._task.loss(self._student, step)
        value = loss.item()
        if not math.isfinite(value):
            raise DistillationError(f"the loss became {value} at step {step + 1}: choose a lower --rate")
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._student.parameters(), 1.0)
        self._optimizer.step()
        return value

    def _evaluate(self, learned: float) -> None:
        progress = self.progress
        self._student.eval()
        with torch.no_grad():
            figures = self._task.held_out(self._student)
        self._student.train()
        progress.curve.append((progress.steps, learned, figures))
        if figures["loss"] < progress.best:
            progress.best, progress.best_step, progress.without_better = figures["loss"], progress.steps, 0
            self._best = _copied(self._student)
        else:
            progress.without_better += 1
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
        self._report(f"{self._place()}, loss {learned:.4f}; held out: {shown}{self._left()}")
        if progress.without_better >= self.settings.patience and self._done < 1:
            self._report(f"no better for {progress.without_better} evaluations: stopping early")

    def _place(self) -> str:
        if self.settings.steps is not None:
            return f"step {self.progress.steps}/{self.settings.steps}"
        return f"step {self.progress.steps}, {self._done:.0%}"

    def _left(self) -> str:
        if not 0 < self._done < 1:
            return ""
        return f" ({self.progress.seconds * (1 / self._done - 1):.0f} s left)"

    def save(self) -> None:
        """Store a checkpoint."""
        tensors = {"student": self._student.state_dict(), "optimizer": self._optimizer.state_dict(), "best": self._best}
        checkpoint.save(self._path, self._identity, self.progress, tensors)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy({name: value.detach() for name, value in model.state_dict().items()})
