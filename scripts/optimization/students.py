"""Where a smaller model comes from: it is given, or distilled for some minutes."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts import distill
from scripts.distillation.errors import DistillationError, Interrupted
from scripts.optimization.errors import OptimizationError

RATIO = "0.5"  # of the teacher's layers

Write = Callable[[Path], None]


@dataclass(frozen=True)
class Students:
    """given: a Hugging Face folder of a student. teacher: one of the model itself. texts: a file or folder to learn
    from. Each of the two may be what writes it when it is needed. minutes: how long to learn."""

    given: Path | None
    teacher: Path | Write | None
    texts: Path | Write | None
    minutes: float

    def why_not(self) -> str:
        """Return why there can be no student, empty when there can."""
        if self.given:
            return ""
        if self.teacher is None:
            return "there is no Hugging Face folder of the model to learn from, and no --student"
        if self.texts is None:
            return "there are no texts to learn from: give --distillation-data, or --student"
        return "" if self.minutes > 0 else "--distillation-minutes is 0, and there is no --student"

    def folder(self, work: Path) -> Path:
        """Return the Hugging Face folder of the student, made in `work` unless given. Raises OptimizationError."""
        if self.given:
            return self.given
        assert self.teacher is not None and self.texts is not None
        work.mkdir(parents=True, exist_ok=True)
        teacher, texts = _written(self.teacher, work / "teacher"), _written(self.texts, work / "texts.jsonl")
        line = [str(teacher), "--data", str(texts), "--output", str(work / "student"), "--work", str(work)]
        line += ["--ratio", RATIO, "--minutes", str(self.minutes), "--rows", "64", "--length", "96", "--rate", "4e-4"]
        try:
            distill.distill(distill.parse(line))
        except Interrupted as error:
            raise KeyboardInterrupt from error
        except DistillationError as error:
            raise OptimizationError(f"distillation: {error}") from error
        return work / "student"


def _written(source: Path | Write, path: Path) -> Path:
    """Return a path that is given, or `path` once it is written whole; what an interrupted run has written stays."""
    if isinstance(source, Path):
        return source
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            source(Path(scratch, path.name))
            Path(scratch, path.name).rename(path)
    return path
