"""Where a stop string ends an answer, and how much of a stream is certain not to be part of one."""

from collections.abc import Sequence


class StopStrings:
    """Takes text in pieces of any size and gives out the same text, whatever the pieces.

    The stop string that is complete first ends the text, the longest of those that are complete at once. What may be
    the beginning of one is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._ignored = 0  # characters at the beginning of `_held` in which no stop string may end
        self.found = False

    def feed(self, text: str, active: bool = True) -> str:
        """Take more text and return what is certain; with `active` false no stop string may end in it."""
        if self.found:
            return ""
        self._held += text
        if not active:
            self._ignored = len(self._held)
        end = self._first_end()
        keep = len(self._held) - self._may_begin() if end is None else end
        certain, self._held = self._held[:keep], "" if self.found else self._held[keep:]
        self._ignored = max(0, self._ignored - keep)
        return certain

    def flush(self) -> str:
        """Return what was held back, when no text follows."""
        held, self._held = self._held, ""
        return held

    def _first_end(self) -> int | None:
        """Return where the text ends, None when it goes on."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            begin = self._held.find(stop, max(0, self._ignored - len(stop) + 1))
            if begin >= 0 and (best is None or (begin + len(stop), begin) < best):
                best = begin + len(stop), begin
        if best is None:
            return None
        self.found = True
        return best[1]

    def _may_begin(self) -> int:
        """Return how many characters at the end could be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-count:]
            if any(stop.startswith(tail) for stop in self._stops):
                return count
        return 0
