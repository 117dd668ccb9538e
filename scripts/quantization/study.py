"""Make a model in several precisions, measure each beside fp32, and choose."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.progress import Progress

from scripts.quantization import sensitivity, speed, tasks, texts
from scripts.quantization.errors import RUNTIME_ERRORS, QuantizationError
from scripts.quantization.graph import WEIGHTED, Feeds, random_feeds
from scripts.quantization.model_file import record, save_model, size_on_disk
from scripts.quantization.precision import Precision, Provider, Source, slower_there
from scripts.quantization.runner import Decoder, Encoder
from scripts.quantization.samples import Samples
from scripts.quantization.subject import CalibrationData, Subject, copy_side_files
from scripts.quantization.tasks import Figures, Task

SLOTS = max(speed.BATCHES)
LENGTH = 32  # tokens a row when a text model is timed
FP32 = "fp32"


@dataclass
class Result:
    """A model in one precision. loss: of quality, a fraction; excluded: groups of nodes left in fp32 for its sake."""

    precision: str
    folder: Path
    size_bytes: int
    quality: Figures
    rows_independent: bool
    excluded: list[str] = field(default_factory=list)
    sensitivity: dict[str, float] = field(default_factory=dict)  # loss of quantizing a group alone
    warning: str | None = None
    latency: dict[int, speed.Latency] = field(default_factory=dict)
    peak_memory_mib: float = 0.0

    @property
    def loss(self) -> float:
        """What the quality floor is about; infinite where outputs are not finite."""
        return self.quality["loss"]

    def as_json(self) -> dict[str, Any]:
        """Return everything measured, as JSON takes it."""
        return {
            "size_bytes": self.size_bytes,
            "quality": self.quality,
            "rows_independent": self.rows_independent,
            "excluded": self.excluded,
            "sensitivity": self.sensitivity,
            "warning": self.warning,
            "latency": speed.as_json(self.latency),
            "peak_memory_mib": self.peak_memory_mib,
        }


class Study:
    """One model, its fp32 reference, and what becomes of it; `say` is told what is being done."""

    def __init__(
        self,
        subject: Subject,
        source: Source,
        work: Path,
        provider: Provider,
        evaluation: Path | None,
        say: Callable[[str], None],
    ) -> None:
        self.subject = subject
        self._source = source
        self._work = work
        self._provider = provider
        self._say = say
        save_model(subject.model, self._folder(FP32))
        copy_side_files(subject, self._folder(FP32))
        reference = self._open(self._folder(FP32))
        self._check_calibration(reference)
        say("measuring the quality of fp32")
        self._task = self._choose_task(reference, evaluation)
        self.results = {FP32: self._result(FP32, self._folder(FP32), reference)}

    def add(self, precision: Precision, most_loss: float) -> Result:
        """Make the model in `precision`; nodes stay in fp32 where its quality loss exceeds `most_loss` otherwise."""
        folder = self._folder(precision)
        self._say(f"{precision}: quantizing")
        self._make(precision, (), folder)
        result = self._result(precision, folder, self._open(folder))
        if result.loss > most_loss:
            self._say(f"{precision}: loses {result.loss:.4f}; looking for what costs most")
            result = self._leave_out(precision, most_loss, result)
        result.warning = slower_there(precision, self._provider)
        self.results[precision] = result
        return result

    def include(self, name: str, make: Callable[[Path, Path], None]) -> Result:
        """Measure what `make`, given the fp32 file and the file to write, makes of it."""
        folder = self._folder(name)
        self._say(f"{name}: quantizing")
        make(self._folder(FP32) / "model.onnx", folder / "model.onnx")
        copy_side_files(self.subject, folder)
        self.results[name] = self._result(name, folder, self._open(folder))
        return self.results[name]

    def judge(self, folder: Path) -> Figures:
        """Return the quality of the model in `folder`, measured as that of all results."""
        return self._quality(self._open(folder))

    def measure_speed(self) -> None:
        """Time all results in turns, and measure their memory."""
        self._say(f"timing {', '.join(self.results)}")
        runners = {name: self._open(result.folder) for name, result in self.results.items()}
        for name, latencies in speed.measure_latency(runners).items():
            self.results[name].latency = latencies
        del runners
        for result in self.results.values():
            feeds = None if self.subject.decoder else self._example(8)
            result.peak_memory_mib = speed.peak_memory_mib(result.folder, self._provider, feeds)

    def best(self, most_loss: float, batch: int = 8) -> Result:
        """Return the fastest result at `batch` rows whose loss is at most `most_loss`; fp32 where none is faster."""
        kept = [result for result in self.results.values() if result.loss <= most_loss]
        return min(kept, key=lambda result: result.latency[batch].p50_ms)

    def _check_calibration(self, reference: Encoder | Decoder) -> None:
        """Read the calibration data once, and run it where it can be run, before anything is made."""
        data = self._source.calibration
        if not isinstance(data, CalibrationData):
            return
        samples = data.count()
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("checking the calibration data", total=samples)
            for feeds in data:
                rows = len(next(iter(feeds.values())))
                try:
                    if isinstance(reference, Encoder):
                        reference.run(feeds)
                except RUNTIME_ERRORS as error:
                    message = str(error).splitlines()[0]
                    raise QuantizationError(f"{data.path}: the model cannot run on it: {message}") from error
                progress.advance(task, rows)
        if not samples:
            raise QuantizationError(f"{data.path} has no samples")

    def _leave_out(self, precision: Precision, most_loss: float, whole: Result) -> Result:
        folder = self._folder(f"{precision}-partly")

        def measure(exclude: Collection[str]) -> Figures:
            self._make(precision, exclude, folder)
            return self._quality(self._open(folder))

        def loss(exclude: Collection[str]) -> float:
            return measure(exclude)["loss"]

        operators = ("MatMul",) if precision in ("int4", "row-int8") else WEIGHTED
        ranked = sensitivity.rank(sensitivity.groups(self._source.prepared, operators), loss)
        costs = {group.name: round(group.loss, 6) for group in ranked}
        left_out, reached = sensitivity.exclude_until(ranked, loss, most_loss)
        names = [group.name for group in left_out]
        self._say(f"{precision}: loses {reached:.4f} with {', '.join(names) or 'nothing'} in fp32")
        if reached >= whole.loss:
            whole.sensitivity = costs
            return whole
        result = self._result(precision, folder, self._open(folder))
        result.excluded, result.sensitivity = names, costs
        return result

    def _make(self, precision: Precision, exclude: Collection[str], folder: Path) -> None:
        model = self._source.make(precision, exclude)
        how = {"precision": precision, "source_sha256": self.subject.digest, "excluded": sorted(exclude)}
        record(model, how | {"options": vars(self._source.options), "smoothed": self._source.smooths(precision)})
        save_model(model, folder)
        copy_side_files(self.subject, folder)

    def _result(self, name: str, folder: Path, model: Encoder | Decoder) -> Result:
        independent = tasks.rows_independent(model, None if isinstance(model, Decoder) else self._example(16))
        return Result(name, folder, size_on_disk(folder), self._quality(model), independent)

    def _quality(self, model: Encoder | Decoder) -> Figures:
        with np.errstate(all="ignore"):
            figures = {name: float(value) for name, value in self._task.evaluate(model).items()}
        return figures if all(map(math.isfinite, figures.values())) else figures | {"loss": math.inf}

    def _choose_task(self, reference: Encoder | Decoder, evaluation: Path | None) -> Task:
        subject = self.subject
        if isinstance(reference, Decoder):
            held_out = texts.read(evaluation, subject.folder) if evaluation else texts.shipped(subject.folder)
            return tasks.Text(reference, list(held_out))
        batches = list(Samples(evaluation, subject.inputs, subject.tokenizer)) if evaluation else []
        if batches and batches[0].labels is not None:
            return tasks.Classification(reference, batches)
        if subject.tokenizer is not None and _gives_sentence_vectors(subject.model):
            return tasks.Embedding(reference, subject.tokenizer, subject.inputs)
        return tasks.Outputs(reference, self._evaluation_feeds([batch.feeds for batch in batches]))

    def _evaluation_feeds(self, given: Sequence[Feeds]) -> Iterable[Feeds]:
        if given:
            return given
        if self._source.calibration is not None:
            self._say("no --evaluation: quality is measured on the calibration data")
            return self._source.calibration
        self._say("no --evaluation: quality is measured on random inputs")
        return [random_feeds(self.subject.model, 8, LENGTH, seed) for seed in range(4)]

    def _example(self, batch: int) -> Feeds:
        """Inputs of `batch` rows of equal length."""
        return random_feeds(self.subject.model, batch, LENGTH)

    def _open(self, folder: Path) -> Encoder | Decoder:
        try:
            if self.subject.decoder:
                return Decoder(folder, SLOTS)
            return Encoder(folder, self._provider, self._example)
        except RUNTIME_ERRORS as error:
            raise QuantizationError(f"ONNX Runtime cannot load the {folder.name} model: {error}") from error

    def _folder(self, name: str) -> Path:
        folder = self._work / name
        folder.mkdir(exist_ok=True)
        return folder


def _gives_sentence_vectors(model: onnx.ModelProto) -> bool:
    """Whether the first output is a vector a sentence, as long as embeddings are."""
    shape = model.graph.output[0].type.tensor_type.shape.dim
    takes_tokens = "input_ids" in {value.name for value in model.graph.input}
    return takes_tokens and len(shape) == 2 and shape[1].dim_value >= 64
