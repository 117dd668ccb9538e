"""One request at a time on a session; the others wait their turn, or are refused."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MAX_WAITING = 16  # requests on one session

Key = tuple[str, str]  # tenant and session id
Granted = Callable[[], None]


class SessionBusyError(Exception):
    """Another request holds the session, and this one may not wait, or too many do."""


class SessionLocks:
    """Thread-safe, and no thread waits: whoever must wait is called when its turn comes, first come, first served."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Key, deque[Granted]] = {}  # of the sessions that are held

    def take(self, key: Key) -> None:
        """Hold a session. Raises SessionBusyError when another request does."""
        with self._lock:
            if key in self._waiting:
                raise SessionBusyError(f"session_id {key[1]!r} is in use by another request")
            self._waiting[key] = deque()

    def take_in_turn(self, key: Key, granted: Granted) -> None:
        """Have `granted` called once the session is held: now, or later on the thread that lets go of it.

        Raises SessionBusyError when too many wait already.
        """
        with self._lock:
            queue = self._waiting.get(key)
            if queue is not None:
                if len(queue) >= MAX_WAITING:
                    raise SessionBusyError(f"{MAX_WAITING} requests wait for session_id {key[1]!r} already")
                queue.append(granted)
                return
            self._waiting[key] = deque()
        granted()

    @contextmanager
    def held(self, key: Key) -> Iterator[None]:
        """Hold a session for a while. Raises SessionBusyError when another request does."""
        self.take(key)
        try:
            yield
        finally:
            self.give(key)

    def withdraw(self, key: Key, granted: Granted) -> bool:
        """Wait no longer; False when the session is held already, or was."""
        with self._lock:
            queue = self._waiting.get(key, deque())
            if granted not in queue:
                return False
            queue.remove(granted)
            return True

    def give(self, key: Key) -> None:
        """Let go of a session; the next in line has it then."""
        with self._lock:
            queue = self._waiting[key]
            following = queue.popleft() if queue else None
            if following is None:
                del self._waiting[key]
        if following:
            following()

    def load(self) -> tuple[int, int]:
        """Return how many sessions are held, and how many requests wait for one."""
        with self._lock:
            return len(self._waiting), sum(len(queue) for queue in self._waiting.values())
