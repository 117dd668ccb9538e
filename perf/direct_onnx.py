"""The limit for a server: ONNX Runtime called directly, with nothing between it and ready batches."""

import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported

import onnxruntime

from perf.embedder_load import Tokens, rows


class Way(NamedTuple):
    """How ONNX Runtime is called: sessions at once, threads of each, whether they spin between calls, rows a call."""

    sessions: int
    threads: int
    spinning: bool
    batch: int


def ways(cores: int, batches: Sequence[int]) -> list[Way]:
    """Return all ways worth trying: the cores to one session, which spins or not, or shared out among sessions."""
    shared = {(1, cores, True), (1, cores, False), (cores, 1, False)}
    return [Way(*split, batch) for split in sorted(shared) for batch in batches]


class Direct:
    """Runs the model at `path` in a given way."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sessions: dict[tuple[int, int, bool], list[onnxruntime.InferenceSession]] = {}

    def rows_per_s(self, way: Way, sentences: Sequence[Sequence[int]], seconds: float) -> float:
        """Return sentences a second, in batches as they come in `sentences`, for about `seconds`."""
        batches = [sentences[start : start + way.batch] for start in range(0, len(sentences), way.batch)]
        feeds = [rows(batch, max(map(len, batch))) for batch in batches if len(batch) == way.batch]
        sessions = self._open(way)
        with ThreadPoolExecutor(way.sessions) as pool:
            return sum(pool.map(lambda session: _rate(session, feeds, seconds), sessions))

    def _open(self, way: Way) -> list[onnxruntime.InferenceSession]:
        key = way[:3]
        if key not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = way.threads
            options.add_session_config_entry("session.intra_op.allow_spinning", str(int(way.spinning)))
            self._sessions[key] = [onnxruntime.InferenceSession(self._path, options) for _ in range(way.sessions)]
        return self._sessions[key]


def _rate(session: onnxruntime.InferenceSession, feeds: Sequence[dict[str, Tokens]], seconds: float) -> float:
    """Return rows a second: those of all `feeds` by the sum of their median times, so that equal turns count."""
    times: list[list[float]] = [[] for _ in feeds]
    session.run(None, feeds[0])
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or not times[-1]:
        for feed, taken in zip(feeds, times, strict=True):
            started = time.perf_counter()
            session.run(None, feed)
            taken.append(time.perf_counter() - started)
    count = sum(len(feed["input_ids"]) for feed in feeds)
    return count / sum(statistics.median(taken) for taken in times)
