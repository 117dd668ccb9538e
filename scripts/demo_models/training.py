"""Training by wall-clock budget, resumable."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from scripts.demo_models.samples import IGNORED, ROW, Rows

CHECKPOINT_SECONDS = 60


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn: AdamW, linear warm-up, cosine decay over `seconds` of wall-clock time."""

    seconds: float
    peak_rate: float
    warmup: float = 0.03
    weight_decay: float = 0.01

    def rate(self, elapsed: float) -> float:
        """Return the learning rate after `elapsed` seconds."""
        progress = min(elapsed / self.seconds, 1.0)
        if progress < self.warmup:
            return self.peak_rate * (progress + 1e-3) / self.warmup
        return self.peak_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class Progress:
    """What a checkpoint needs beside the weights: time spent, steps made, and the loss curve."""

    elapsed: float = 0.0
    steps: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)  # (seconds, mean loss)


class Batches:
    """Random batches of rows of about equal length, kept on the training device."""

    def __init__(self, cycle: Sequence[Rows], rows: int, device: torch.device) -> None:
        """Draw the batches of successive steps from the members of `cycle`, in turn and over again.

        A batch has as many tokens as `rows` rows of one turn.
        """
        self._rows = rows
        sorted_once = {id(pool): self._sorted(pool, device) for pool in cycle}
        self._cycle = [sorted_once[id(pool)] for pool in cycle]

    @staticmethod
    def _sorted(pool: Rows, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        tokens, labels = (torch.from_numpy(part) for part in pool)
        last = (labels != IGNORED).int().mul(torch.arange(labels.shape[1], dtype=torch.int32)).amax(1)
        order = last.argsort()
        return tokens[order].to(device), labels[order].to(device), last[order]

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Return (tokens, labels), int64 [rows, width]."""
        tokens, labels, last = self._cycle[step % len(self._cycle)]
        rows = max(1, self._rows * ROW // tokens.shape[1])
        begin = int(torch.randint(max(1, len(tokens) - rows), ()))
        chosen = slice(begin, begin + rows)
        width = int(last[chosen].max()) + 1
        return tokens[chosen, :width].long(), labels[chosen, :width].long()


def answer_logits(model: LlamaForCausalLM, tokens: Tensor, chosen: Tensor) -> Tensor:
    """Return the logits [answers, vocabulary] that predict the tokens at `chosen` (bool [rows, width])."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    logits: Tensor = model.lm_head(hidden[:, :-1][chosen[:, 1:]])
    return logits.float()


def train(
    model: LlamaForCausalLM,
    batches: Batches,
    schedule: Schedule,
    checkpoint: Path,
) -> Progress:
    """Train `model` in place on the answers in `batches` and return its loss curve.

    Resumes from `checkpoint` where that exists.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.peak_rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay, fused=on_gpu
    )
    progress = Progress()
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
    model.train()
    window: list[Tensor] = []
    saved = shown = time.monotonic()
    while progress.elapsed < schedule.seconds:
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(progress.elapsed)
        tokens, labels = batches.draw(progress.steps)
        chosen = labels != IGNORED
        chosen[:, 0] = False
        with torch.autocast(device.type, torch.bfloat16):
            logits = answer_logits(model, tokens, chosen)
            loss = nn.functional.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        window.append(loss.detach())
        progress.steps += 1
        if on_gpu:
            torch.cuda.synchronize()
        progress.elapsed += time.monotonic() - started
        now = time.monotonic()
        if now - shown > 10:
            mean = torch.stack(window).mean().item()
            window.clear()
            progress.curve.append((progress.elapsed, mean))
            print(
                f"  {progress.elapsed:6.0f}/{schedule.seconds:.0f} s, step {progress.steps}, loss {mean:.4f}",
                flush=True,
            )
            shown = time.monotonic()
        if now - saved > CHECKPOINT_SECONDS:
            _save(checkpoint, model, optimizer, progress)
            saved = time.monotonic()
    _save(checkpoint, model, optimizer, progress)
    model.eval()
    return progress


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    partial = path.with_suffix(".partial")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": vars(progress)}
    torch.save(state, partial)
    partial.replace(path)


def plot_curve(progress: Progress, path: Path) -> None:
    """Draw the loss curve of a finished model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 3.5))
    axis.plot(*zip(*progress.curve, strict=True))
    axis.set(xlabel="seconds", ylabel="loss (nats a token)", yscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
