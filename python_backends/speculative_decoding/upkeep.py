"""What is done now and then while a model is served: expired sessions are deleted, and the cache is checked."""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable

from speculative_decoding.kv_integrity import IntegrityError
from speculative_decoding.prefix_cache import PrefixCache
from speculative_decoding.sessions import Sessions

logger = logging.getLogger(__name__)
LOOK_S = 0.5
PURGE_S = 60.0


class Upkeep:
    """A thread that deletes what has expired every PURGE_S seconds, and checks the cache while nothing is decoded."""

    def __init__(
        self, sessions: Sessions, cache: PrefixCache | None, is_idle: Callable[[], bool], check_s: float = 0.0
    ) -> None:
        """check_s: seconds between two checks of the cache, 0 for none."""
        self._sessions = sessions
        self._cache = cache if check_s else None
        self._is_idle = is_idle
        self._check_s = check_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, and wait for what it is doing."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        purge_at = check_at = time.monotonic()
        while not self._closing.wait(LOOK_S):
            now = time.monotonic()
            if now >= purge_at:
                self._purge()
                purge_at = now + PURGE_S
            if self._cache and now >= check_at and self._is_idle():
                self._check(self._cache)
                check_at = now + self._check_s

    def _purge(self) -> None:
        try:
            self._sessions.purge()
        except sqlite3.Error:
            logger.exception("expired sessions could not be deleted")

    def _check(self, cache: PrefixCache) -> None:
        try:
            cache.check_integrity()
        except IntegrityError:  # the cache has counted it
            logger.exception("the key/value cache contradicts itself")
