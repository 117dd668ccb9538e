"""The state of a run, stored whole or not at all."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from scripts.distillation.errors import DistillationError


@dataclass
class Progress:
    """What was reached. `curve` holds (step, loss learned from, figures on held-out data) at each evaluation."""

    steps: int = 0
    seconds: float = 0.0
    best: float = float("inf")
    best_step: int = 0
    without_better: int = 0
    learned: list[float] = field(default_factory=list)  # losses since the last evaluation
    curve: list[tuple[int, float, dict[str, float]]] = field(default_factory=list)


def save(path: Path, identity: dict[str, Any], progress: Progress, tensors: dict[str, Any]) -> None:
    """Store a checkpoint in place of the last one."""
    partial = path.with_suffix(".partial")
    torch.save({"identity": identity, "progress": asdict(progress), **tensors}, partial)
    partial.replace(path)


def load(path: Path, identity: dict[str, Any]) -> tuple[Progress, dict[str, Any]] | None:
    """Return what is stored at `path`, or None where nothing is.

    Raises DistillationError when it cannot be read or belongs to a run of another `identity`.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        raise DistillationError(f"the checkpoint {path} cannot be read: {error}; start over with --restart") from error
    other = sorted(name for name in identity if state.get("identity", {}).get(name) != identity[name])
    if other or "progress" not in state:
        raise DistillationError(
            f"{path} belongs to a run with other {', '.join(other) or 'contents'}: repeat that run's options, "
            "choose another --output, or start over with --restart"
        )
    return Progress(**state.pop("progress")), state
