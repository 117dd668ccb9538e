"""A thread that tidies up now and then."""

import threading
from collections.abc import Callable


class Janitor:
    """Calls `task`, which must not raise, at once and then every `interval_s` seconds, on a thread of its own."""

    def __init__(self, task: Callable[[], None], interval_s: float) -> None:
        self._task = task
        self._interval_s = interval_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="janitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and wait for a task at work."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        self._task()
        while not self._closing.wait(self._interval_s):
            self._task()
