"""What is optimized: a model, the forms that it can be served in, and requests to it."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scripts.optimization.errors import OptimizationError
from scripts.optimization.forms import Forms
from scripts.optimization.plan import Plan
from scripts.optimization.setup import FP32, STUDENT, Setup
from scripts.optimization.students import Students
from scripts.quantization.precision import Options, candidates
from scripts.quantization.study import Study
from scripts.quantization.subject import Subject as Source
from scripts.quantization.subject import open_subject

Request = Any  # what one kind of subject sends
Ask = AbstractContextManager[Callable[[Request], Any]]  # within it, one client's connection
Say = Callable[[str], None]
FEWEST = 8  # different requests in a pass


class Subject(ABC):
    """A model under optimization, and the data that it is measured with; `forms` keeps what is made of it."""

    kind: str

    def __init__(self, source: Source, data: Path | None, students: Students, forms: Forms, say: Say) -> None:
        """data: None for the project's own. say: told what is being done."""
        self.name = source.name
        self.forms = forms
        self._source = source
        self._data = data
        self._students = students
        self._say = say

    @abstractmethod
    def first(self) -> Setup:
        """Return the setup in which nothing is applied."""

    @abstractmethod
    def requests(self) -> Sequence[Request]:
        """Return different requests, in an order that is always the same."""

    @abstractmethod
    def write(self, setup: Setup, repository: Path) -> None:
        """Write a model repository that serves `setup` to the new folder `repository`."""

    @abstractmethod
    def ask(self, setup: Setup, scope: str) -> Callable[[str], Ask]:
        """Return what connects to a server of `setup`, given its gRPC address; answers are kept within `scope` only."""

    @abstractmethod
    def quality(self, setup: Setup, answers: Sequence[tuple[Request, Any]]) -> float:
        """Return how good `setup` is, 1 for best, from what it answered where answers tell."""

    @abstractmethod
    def why_not(self, technique: str) -> str:
        """Return why a technique does not apply, empty when it does."""

    @property
    def evaluation(self) -> Path | None:
        """What scripts.quantize judges precisions by."""
        return self._data

    @cached_property
    def study(self) -> Study:
        """The model in fp32, and the measure of what becomes of it."""
        work = self.forms.folder / "study"
        work.mkdir(exist_ok=True)
        study = Study(self._source, self._source.source(None, Options()), work, "cpu", self.evaluation, self._say)
        self.forms.keep(FP32, study.results["fp32"].folder)
        return study

    def weights(self, name: str) -> Path:
        """Return the folder of a form that has been made; fp32 is made when it is first asked for."""
        if name not in self.forms and name == FP32:
            _ = self.study
        return self.forms[name]

    def quantize(self, most_loss: float) -> list[str]:
        """Make the model in the precisions that are fast here; return those that lose at most so much, fastest first.

        Raises QuantizationError.
        """
        made = [name for name in self.forms.names() if name in candidates("cpu", True)]
        if not made:
            results = [self.study.add(precision, most_loss) for precision in candidates("cpu", False)]
            self.study.measure_speed()
            good = [result for result in results if result.loss <= most_loss]
            for result in sorted(good, key=lambda result: result.latency[1].p50_ms):
                self.forms.keep(result.precision, result.folder)
                made.append(result.precision)
        return made

    def distil(self, precision: str) -> str:
        """Make the student in `precision` and return the name of that form. Raises OptimizationError."""
        name = STUDENT if precision == FP32 else f"{STUDENT} {precision}"
        if name not in self.forms:
            work = self.forms.folder / name
            shutil.rmtree(work, ignore_errors=True)  # of a run that was interrupted here
            work.mkdir()
            self._make_student(self._students.folder(self.forms.folder / "distillation"), precision, work)
            self.forms.keep(name, work)
        return name

    def _make_student(self, student: Path, precision: str, folder: Path) -> None:
        """Export a Hugging Face folder to ONNX in a precision."""
        scratch = folder / "source"
        scratch.mkdir()
        opened = open_subject(student, scratch, None, upgrade_opset=False)
        study = Study(opened, opened.source(None, Options()), folder, "cpu", self.evaluation, self._say)
        made = study.results["fp32"] if precision == FP32 else study.add(precision, 1.0)  # type: ignore[arg-type]
        for file in made.folder.iterdir():
            file.rename(folder / file.name)

    def workload(self, number: int, plan: Plan) -> list[Request]:
        """Return the requests of one pass: every pass has other ones, and some come again within it.

        A pass ends early where it has no new ones left. Raises OptimizationError when there is too little data.
        """
        everything = self.requests()
        share = len(everything) // (plan.passes + 1)
        if share < FEWEST:
            raise OptimizationError(
                f"--data has {len(everything)} different requests; {FEWEST * (plan.passes + 1)} or more are needed"
            )
        fresh = everything[number * share : (number + 1) * share]
        rng = np.random.default_rng(number)
        made: list[Request] = []
        asked = 0
        for _ in range(plan.requests):
            if asked and rng.random() < plan.repeats:
                made.append(fresh[int(rng.integers(asked))])
            elif asked < len(fresh):
                made.append(fresh[asked])
                asked += 1
            else:
                break
        return made
