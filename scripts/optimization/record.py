"""What has been measured, kept so that a run that was stopped goes on where it was."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from scripts.optimization.measurement import Measurement, measure
from scripts.optimization.plan import Plan
from scripts.optimization.setup import Setup
from scripts.optimization.subject import Subject
from scripts.whole_file import write_whole

FILE = "measurements.json"


class Record:
    """Measures setups that stand in turns, each group once."""

    def __init__(self, subject: Subject, plan: Plan) -> None:
        self._subject = subject
        self._plan = plan
        self._file = subject.forms.folder / FILE
        self._known: dict[str, list[dict[str, float]]] = {}
        if self._file.is_file():
            self._known = json.loads(self._file.read_text(encoding="utf-8"))

    def measure(self, setups: Sequence[Setup]) -> dict[Setup, Measurement]:
        """Return a measurement of each of `setups`, from the record where it has them. Raises ServeError."""
        key = hashlib.sha256(repr((asdict(self._plan), [asdict(setup) for setup in setups])).encode()).hexdigest()
        if key not in self._known:
            measured = measure(self._subject, setups, self._plan)
            self._known[key] = [measured[setup].to_json() for setup in setups]
            write_whole(self._file, json.dumps(self._known))
        return {setup: Measurement(**values) for setup, values in zip(setups, self._known[key], strict=True)}
