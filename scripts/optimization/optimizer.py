"""The search: one technique at a time, each measured beside the best so far, until the targets are met."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from scripts.optimization.errors import OptimizationError
from scripts.optimization.measurement import Measurement
from scripts.optimization.setup import Setup
from scripts.optimization.subject import Say, Subject
from scripts.optimization.techniques import TECHNIQUES, Technique
from scripts.quantization.errors import QuantizationError
from scripts.serving.errors import ServeError

WORTHWHILE = 0.03  # what a technique must gain: less is noise
Objective = Literal["latency", "throughput", "cost"]
Verdict = Literal["original", "kept", "rejected", "not applicable", "not needed"]
MeasureAll = Callable[[Sequence[Setup]], Mapping[Setup, Measurement]]


@dataclass(frozen=True)
class Targets:
    """latency_ms: of the 95th percentile. quality: the floor. objective: what decides between setups."""

    latency_ms: float
    quality: float
    objective: Objective

    def __post_init__(self) -> None:
        """Raise OptimizationError for targets that nothing can meet, or everything."""
        if not self.latency_ms > 0:
            raise OptimizationError(f"--target-latency-ms is {self.latency_ms}: it must be above 0")
        if not 0 < self.quality <= 1:
            raise OptimizationError(f"--target-quality is {self.quality}: it must be above 0 and at most 1")

    def are_met(self, measured: Measurement) -> bool:
        """Whether both are."""
        return measured.p95_ms <= self.latency_ms and measured.quality >= self.quality

    def score(self, measured: Measurement) -> float:
        """Return what is to be made small: mean latency, seconds a request, or CPU seconds."""
        if self.objective == "latency":
            return measured.mean_ms
        return 1 / measured.per_s if self.objective == "throughput" else measured.cpu_s_per_1000


@dataclass(frozen=True)
class Trial:
    """One thing tried: what was measured of it, and what became of it."""

    technique: str
    verdict: Verdict
    reason: str
    setup: Setup | None = None
    measured: Measurement | None = None


@dataclass
class Search:
    """Everything tried, and the best: the setup that is kept, as it was last measured."""

    original: Measurement
    best: Setup
    measured: Measurement
    trials: list[Trial] = field(default_factory=list)


def optimize(
    subject: Subject,
    targets: Targets,
    measure: MeasureAll,
    say: Say,
    techniques: Sequence[Technique] = TECHNIQUES,
) -> Search:
    """Apply `techniques` to `subject` until `targets` are met or none helps.

    Raises ServeError when the model as it is cannot be served.
    """
    first = subject.first()
    say("measuring the model as it is")
    original = measure([first])[first]
    search = Search(original, first, original, [Trial("", "original", "", first, original)])
    for technique in techniques:
        if targets.are_met(search.measured):
            search.trials.append(Trial(technique.name, "not needed", "the targets are met"))
        elif why := subject.why_not(technique.name):
            search.trials.append(Trial(technique.name, "not applicable", why))
        else:
            say(f"{technique.name} ...")
            _apply(technique, subject, targets, measure, search)
    return search


def _apply(technique: Technique, subject: Subject, targets: Targets, measure: MeasureAll, search: Search) -> None:
    """Try all stages of a technique; one that fails is rejected with the error."""
    tried = len(search.trials)
    try:
        for propose in technique.stages(subject, max(0.0, search.original.quality - targets.quality)):
            candidates = [setup for setup in propose(search.best) if setup != search.best]
            if candidates:
                _try(technique.name, candidates, targets, measure, search)
    except (QuantizationError, OptimizationError, ServeError) as error:
        search.trials.append(Trial(technique.name, "rejected", str(error)))
    if len(search.trials) == tried:
        search.trials.append(Trial(technique.name, "rejected", "no form of the model keeps the quality"))


def _try(name: str, candidates: Sequence[Setup], targets: Targets, measure: MeasureAll, search: Search) -> None:
    """Measure candidates beside the best so far, and keep the best of all."""
    measured = measure([search.best, *candidates])
    before = search.measured = measured[search.best]
    good = [setup for setup in candidates if measured[setup].quality >= targets.quality]
    chosen = min(good, key=lambda setup: targets.score(measured[setup]), default=None)
    for setup in candidates:
        verdict, reason = _judge(setup, chosen, measured[setup], before, targets)
        search.trials.append(Trial(name, verdict, reason, setup, measured[setup]))
        if verdict == "kept":
            search.best, search.measured = setup, measured[setup]


def _judge(
    setup: Setup, chosen: Setup | None, measured: Measurement, before: Measurement, targets: Targets
) -> tuple[Verdict, str]:
    gain = 1 - targets.score(measured) / targets.score(before)
    change = f"{targets.objective} {'better' if gain > 0 else 'worse'} by {abs(gain):.1%}"
    if measured.quality < targets.quality:
        return "rejected", f"quality {measured.quality:.4f} is below {targets.quality}"
    if gain < WORTHWHILE:
        return "rejected", f"{change}: a gain counts from {WORTHWHILE:.0%} on"
    if setup != chosen:
        return "rejected", f"{change}, another gained more"
    return "kept", change
