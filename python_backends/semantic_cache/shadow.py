"""Shadow checks: some hits are decoded anyway, off the client's path, to learn how often the cache is wrong."""

import logging
import queue
import random
import threading
from collections.abc import Callable
from typing import NamedTuple

from semantic_cache.records import Hit
from semantic_cache.request import Lookup

WAITING = 64  # checks beyond which new ones are dropped: they must never pile up behind clients

logger = logging.getLogger(__name__)


class Check(NamedTuple):
    """A hit to be checked."""

    lookup: Lookup
    hit: Hit


class ShadowChecks:
    """Decodes a share of the hits on a thread of its own and has them compared."""

    def __init__(
        self,
        share: float,
        decode: Callable[[Lookup], str],
        compare: Callable[[Lookup, Hit, str], bool],
        count: Callable[[str], None],
        seed: int | None = None,
    ) -> None:
        """`decode` raises RuntimeError; `count` gets correct, wrong, dropped or failed."""
        self._share = share
        self._decode = decode
        self._compare = compare
        self._count = count
        self._random = random.Random(seed)
        self._queue: queue.Queue[Check | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def offer(self, lookup: Lookup, hit: Hit) -> None:
        """Check this hit, if the dice say so; returns at once."""
        if self._random.random() >= self._share:
            return
        try:
            self._queue.put_nowait(Check(lookup, hit))
        except queue.Full:
            self._count("dropped")

    def close(self) -> None:
        """Finish the checks that wait."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (check := self._queue.get()) is not None:
            try:
                is_correct = self._compare(*check, self._decode(check.lookup))
                self._count("correct" if is_correct else "wrong")
            except Exception:
                logger.exception("a shadow check failed")
                self._count("failed")
