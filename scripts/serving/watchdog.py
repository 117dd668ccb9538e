"""Notices a dead or hung backend process within seconds.

Dead, or stopped by a signal: the state of the server's processes says so at once.

Hung: a model leaves a request unanswered while its processes hardly use the processor. A busy model is never called
hung, however long its queue: it is not even asked, so probing adds no load where there is some, and no more than a
tiny request a second where there is none. A silent, idle model may be waiting for a busy one (through BLS), so while
any other model works, it is given a minute. Two prices: an endless loop is taken for work, since from outside nothing
tells it from a long batch; and a backend that waits for something outside the server must give up before HUNG_S.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import psutil

from scripts.serving import probe
from scripts.serving.process import TritonProcess

LOOK_S = 0.5  # between two looks at the processes
PROBE_S = 1.0  # between two probes of an idle model
HUNG_S = 2.5  # unanswered and idle for so long is hung; with the two above, noticed within 4 s
HUNG_AMONG_WORK_S = 60.0  # the same while another model works
PROBE_TIMEOUT_S = 60.0  # a probe may wait in a busy model's queue, one at a time
BUSY = 0.05  # of one core; a probe and housekeeping stay below

GONE = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}


class Watchdog:
    """Watches one run of the server, which must be ready when this is made."""

    def __init__(self, process: TritonProcess, url: str, models: list[str]) -> None:
        children = process.children()
        self._processes = [("tritonserver", process.server), *children]
        self._models: list[_Subject] = []
        for model in models:
            config = probe.model_config(url, model, PROBE_TIMEOUT_S)
            if config["platform"] != "ensemble":  # an ensemble is as alive as its steps
                ask = partial(probe.ask_model, url, config, PROBE_TIMEOUT_S)
                backends = [child for name, child in children if name == model]
                self._models.append(_Subject(f"model {model}", ask, backends or [process.server]))
        server = _Subject("the server", partial(probe.ask_server, url, PROBE_TIMEOUT_S), [process.server])
        self._subjects = [server, *self._models]
        self._pool = ThreadPoolExecutor(len(self._subjects), thread_name_prefix="probe")
        self._looked = time.monotonic()

    def fault(self) -> str | None:
        """Look once; return what is wrong, or None. Call it every LOOK_S seconds."""
        now = time.monotonic()
        try:
            broken = self._broken_process()
            if broken:
                return broken
            for subject in self._subjects:
                if now - self._looked > 2 * LOOK_S:
                    subject.forgive(now)  # this process itself was starved: the silence may be its own
                subject.look(now, self._pool)
        except psutil.NoSuchProcess as gone:
            return f"process {gone.pid} died"
        self._looked = now
        for subject in self._subjects:
            others = [other for other in self._models if other is not subject]
            patience = HUNG_AMONG_WORK_S if any(other.has_worked(now, HUNG_S) for other in others) else HUNG_S
            if subject.is_silent(now, patience) and subject.is_idle(now, patience):
                return f"{subject.name} hangs: no answer and no work for {patience} s"
        return None

    def close(self) -> None:
        """Stop asking. Call it after the server has ended, which ends the probes under way."""
        self._pool.shutdown(cancel_futures=True)

    def _broken_process(self) -> str | None:
        for name, process in self._processes:
            status = process.status()
            if status in GONE or status == psutil.STATUS_STOPPED:
                what = "is stopped" if status == psutil.STATUS_STOPPED else "died"
                return f"process {process.pid} ({name or 'a backend'}) {what}"
        return None


class _Subject:
    """What answers for itself: the server or one of its models, and the processes that do its work."""

    def __init__(self, name: str, ask: Callable[[], None], processes: list[psutil.Process]) -> None:
        self.name = name
        self._ask = ask
        self._processes = processes
        self._used = self._processor_time()
        self._pending: Future[None] | None = None
        self._asked = self._worked = -math.inf
        self.forgive(time.monotonic())

    def forgive(self, now: float) -> None:
        """Start counting anew."""
        self._looked = self._idle_since = now
        self._unanswered_since: float | None = None

    def look(self, now: float, pool: ThreadPoolExecutor) -> None:
        """Measure the processor time used, take the answer to the last probe, and send the next if one is due."""
        self._measure(now)
        if self._pending and self._pending.done():
            if self._pending.exception() is None:
                self._unanswered_since = None
            self._pending = None
        if self._pending is None and now > self._idle_since and now - self._asked >= PROBE_S:
            self._pending, self._asked = pool.submit(self._ask), now
        if self._pending and self._unanswered_since is None:
            self._unanswered_since = now

    def is_silent(self, now: float, seconds: float) -> bool:
        return self._unanswered_since is not None and now - self._unanswered_since >= seconds

    def is_idle(self, now: float, seconds: float) -> bool:
        return now - self._idle_since >= seconds

    def has_worked(self, now: float, seconds: float) -> bool:
        """Whether it did more than answer a probe in the last `seconds`."""
        return now - self._worked <= seconds

    def _measure(self, now: float) -> None:
        used = self._processor_time()
        if used - self._used >= BUSY * (now - self._looked):
            self._idle_since = now
            if self._asked < self._looked:  # else a probe was sent at the last look, and this may be all of its work
                self._worked = now
        self._used, self._looked = used, now

    def _processor_time(self) -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in self._processes))
