"""Identical requests at one time: decoded once, sent to all."""

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from speculative_decoding.responder import Piece, Reply
from speculative_decoding.sequence import FinishReason, Sequence

logger = logging.getLogger(__name__)
NOTHING = Piece("", 0, [])
KEPT_S = 30.0  # longer than a request is on its way from a lookup that found nothing, and than storing takes


class SharableReply(Reply, Protocol):
    """A reply that may get the answers that another request asked for."""

    def follow(self) -> None:
        """Note that another one leads: it is the one that is stored and counted."""

    def when_kept(self, call: Callable[[], None]) -> None:
        """Have `call` made, on any thread, once the cache finds its answers, or never will."""

    def is_late(self) -> bool:
        """Whether the time is over that the client would wait: the sequences do not know, since they are shared."""


Start = Callable[[Reply], None]


class _Finished(NamedTuple):
    """One of the answers, and how it ended."""

    sequence: Sequence
    whole: Piece
    reason: FinishReason


class _Seat:
    """A reply that waits for shared answers, and how much of the first of them it has been sent."""

    def __init__(self, reply: SharableReply, streams: bool) -> None:
        self.reply = reply
        self._streams = streams
        self._text = self._tokens = 0

    def catch_up(self, sequence: Sequence, so_far: Piece) -> None:
        """Send what is new, to who streams."""
        if self._streams and len(so_far.text) > self._text:
            self.reply.partial(sequence, self._rest(so_far))
            self._text, self._tokens = len(so_far.text), so_far.tokens

    def complete(self, answers: list[_Finished]) -> None:
        """Send all that has not been sent."""
        for sequence, whole, reason in answers:
            self.reply.complete(sequence, self._rest(whole), whole, reason)

    def leave(self) -> bool:
        """Tell a client that has gone, or would wait no longer; return whether it has."""
        reason: FinishReason | None = (
            "cancelled" if self.reply.is_cancelled() else "timeout" if self.reply.is_late() else None
        )
        if reason:
            self.reply.fail(reason)
        return reason is not None

    def _rest(self, piece: Piece) -> Piece:
        return Piece(piece.text[self._text :], piece.tokens - self._tokens, piece.logprobs[self._tokens :])


@dataclass
class _Landed:
    """Answers that are there since one time, and that the cache finds since another, of the monotonic clock in s."""

    answers: list[_Finished]
    since: float
    found_since: float = math.inf


class Flights:
    """Answers being decoded, by name. Thread-safe: one lock is around a table and around all that is in it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._shared: dict[Hashable, _Shared] = {}
        self._landed: dict[Hashable, _Landed] = {}  # the oldest first
        self._clock = clock
        self._lock = threading.RLock()

    def join(
        self, name: Hashable, reply: SharableReply, streams: bool, answers: int, start: Start, asked: float
    ) -> bool:
        """Let `reply` wait for so many answers of that name; return whether they were being decoded already.

        asked: when the cache was asked, in seconds of the monotonic clock. Who found nothing there because the answers
        were still being decoded, or stored, and comes here after their end, gets them too.

        If they were not, `start` is called with the reply to decode for, which wants one answer as a stream. Raises
        what `start` raises.
        """
        with self._lock:
            self._drop_old()
            seat = _Seat(reply, streams)
            shared, landed = self._shared.get(name), self._landed.get(name)
            if shared:
                shared.join(seat)
                return True
            if landed and asked < landed.found_since:
                reply.follow()
                seat.complete(landed.answers)
                return True
            shared = self._shared[name] = _Shared(seat, answers, start, partial(self._end, name), self._lock)
            try:
                shared.start()
            except Exception:
                del self._shared[name]
                raise
            return False

    def _end(self, name: Hashable, answers: list[_Finished], leader: SharableReply | None) -> None:
        """Let nobody wait for what is over; `answers` are its result, if it has one, and `leader` has them stored."""
        del self._shared[name]
        self._landed.pop(name, None)
        if leader:
            landed = self._landed[name] = _Landed(answers, self._clock())
            leader.when_kept(partial(self._note_found, landed))

    def _note_found(self, landed: _Landed) -> None:
        with self._lock:
            landed.found_since = self._clock()

    def _drop_old(self) -> None:
        while self._landed and self._landed[oldest := next(iter(self._landed))].since < self._clock() - KEPT_S:
            del self._landed[oldest]


class _Shared:
    """What several requests wait for; the first of them leads.

    A leader that is cancelled or late is succeeded by the next, and decoding goes on. When decoding fails, the leader
    is told and the next one starts anew; what was sent before is not sent again, since the answer will be the same.
    """

    def __init__(
        self,
        leader: _Seat,
        answers: int,
        start: Start,
        end: Callable[[list[_Finished], SharableReply | None], None],
        lock: threading.RLock,
    ) -> None:
        self._seats = [leader]
        self._answers = answers
        self._start = start
        self._end_flight = end
        self._lock = lock
        self._attempt: _Attempt | None = None

    def start(self) -> None:
        """Have the answers decoded, from the beginning; what an earlier attempt still says is not heard."""
        self._attempt = _Attempt(self, self._lock)
        self._start(self._attempt)

    def join(self, seat: _Seat) -> None:
        """Let one more wait, who gets what there is."""
        if self._attempt and self._attempt.streaming:
            seat.catch_up(self._attempt.streaming, self._attempt.so_far)
        self._seats.append(seat)

    def is_current(self, attempt: "_Attempt") -> bool:
        """Whether anybody waits for what an attempt says."""
        return attempt is self._attempt

    def stream(self, sequence: Sequence, so_far: Piece) -> None:
        """Send what there is of the one answer."""
        self._tell(lambda seat: seat.catch_up(sequence, so_far))

    def finish(self, answers: list[_Finished]) -> None:
        """Send the answers, when all are there."""
        if len(answers) < self._answers:
            return
        self._end(answers, self._seats[0].reply)
        for seat in self._seats[1:]:
            seat.reply.follow()
        self._tell(lambda seat: seat.complete(answers))

    def fail(self, reason: FinishReason) -> None:
        """Tell who waits, except that the others try again after an error."""
        told, self._seats = (self._seats[:1], self._seats[1:]) if reason == "error" else (self._seats, [])
        for seat in told:
            seat.reply.fail(reason)
        if not self._seats:
            self._end()
            return
        try:
            self.start()
        except Exception:
            self._end()
            for seat in self._seats:
                seat.reply.fail("error")
            raise

    def is_deserted(self) -> bool:
        """Whether all have left; who has is told at once."""
        self._seats = [seat for seat in self._seats if not seat.leave()]
        if not self._seats:
            self._end()
        return not self._seats

    def _tell(self, tell: Callable[[_Seat], None]) -> None:
        """Tell all; one that cannot be reached leaves, and does not disturb the others."""
        for seat in list(self._seats):
            try:
                tell(seat)
            except Exception:
                logger.exception("a response could not be sent")
                self._seats.remove(seat)

    def _end(self, answers: list[_Finished] | None = None, leader: SharableReply | None = None) -> None:
        self._attempt = None
        self._end_flight(answers or [], leader)


class _Attempt:
    """The Reply of the sequences that are being decoded for all."""

    def __init__(self, shared: _Shared, lock: threading.RLock) -> None:
        self._shared = shared
        self._lock = lock
        self._finished: list[_Finished] = []
        self.streaming: Sequence | None = None
        self.so_far = NOTHING

    def partial(self, sequence: Sequence, piece: Piece) -> None:
        with self._lock:
            if self._shared.is_current(self):
                before = self.so_far
                logprobs = before.logprobs + piece.logprobs
                self.so_far = Piece(before.text + piece.text, before.tokens + piece.tokens, logprobs)
                self.streaming = sequence
                self._shared.stream(sequence, self.so_far)

    def complete(self, sequence: Sequence, last: Piece, whole: Piece, reason: FinishReason) -> None:
        with self._lock:
            if self._shared.is_current(self):
                self._finished.append(_Finished(sequence, whole, reason))
                self._shared.finish(self._finished)

    def fail(self, reason: FinishReason) -> None:
        with self._lock:
            if self._shared.is_current(self):
                self._shared.fail(reason)

    def is_cancelled(self) -> bool:
        """Whether nobody waits for this attempt any more."""
        with self._lock:
            return not self._shared.is_current(self) or self._shared.is_deserted()
