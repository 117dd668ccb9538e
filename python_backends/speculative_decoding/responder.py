"""From the engine's tokens to a client's responses, on a thread of its own so that decoding never waits for sending.

What an answer got while others were being sent goes into one response: the busier this thread, the fewer it sends.
"""

import enum
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from speculative_decoding.logprobs import TokenLogprob
from speculative_decoding.sequence import FinishReason, Sequence
from speculative_decoding.stop_strings import StopStrings
from speculative_decoding.tokenizer import IncrementalDecoder, Tokenizer

logger = logging.getLogger(__name__)
CANCELLATION_POLL_S = 0.02

Event = tuple[Sequence, list[int], FinishReason | None]


class _Signal(enum.Enum):
    """What the responder's thread is told besides events."""

    LOOK = enum.auto()
    CLOSE = enum.auto()


class Piece(NamedTuple):
    """What is new of an answer: its text, how many tokens came with it, and their log-probabilities when asked for."""

    text: str
    tokens: int
    logprobs: list[tuple[TokenLogprob, ...]]


class Reply(Protocol):
    """Where the responses of one request go."""

    def partial(self, sequence: Sequence, piece: Piece) -> None:
        """Send text of a stream."""

    def complete(self, sequence: Sequence, last: Piece, whole: Piece, reason: FinishReason) -> None:
        """Send the last response: `last` is what has not been sent yet, `whole` all of the answer."""

    def fail(self, reason: FinishReason) -> None:
        """Say that there is no answer."""

    def is_cancelled(self) -> bool:
        """Whether the client has gone."""


class _Conversation:
    """An answer in the making."""

    def __init__(self, sequence: Sequence, reply: Reply, tokenizer: Tokenizer) -> None:
        self.reply = reply
        self._sequence = sequence
        self._decoder = IncrementalDecoder(tokenizer)
        self._stops = StopStrings(sequence.options.stop)
        self._text = ""
        self._tokens = 0
        self._sent_text = self._sent_tokens = 0

    def feed(self, tokens: list[int]) -> bool:
        """Take new tokens; return whether a stop string has ended the answer, where decoding token by token would."""
        if not self._sequence.options.stop:
            self._tokens += len(tokens)
            self._text += self._decoder.feed(tokens)
            return False
        for token in tokens:
            self._tokens += 1
            is_long_enough = self._tokens > self._sequence.options.min_tokens
            self._text += self._stops.feed(self._decoder.feed([token]), is_long_enough)
            if self._stops.found:
                return True
        return False

    def flush(self) -> bool:
        """Take in that no token follows; return whether that completed a stop string."""
        self._text += self._stops.feed(self._decoder.flush())
        self._text += self._stops.flush()
        return self._stops.found

    def unsent(self) -> Piece | None:
        """Return what there is to send of a stream, None when there is no text."""
        return self.rest() if len(self._text) > self._sent_text else None

    def rest(self) -> Piece:
        """Return what has not been returned yet."""
        text, first = self._text[self._sent_text :], self._sent_tokens
        self._sent_text, self._sent_tokens = len(self._text), self._tokens
        return Piece(text, self._tokens - first, self._sequence.logprobs[first : self._tokens])

    def whole(self) -> Piece:
        """Return all of the answer so far."""
        return Piece(self._text, self._tokens, self._sequence.logprobs[: self._tokens])


class Responder:
    """Decodes and sends what the engine emits, and tells the engine whose answer nobody needs any more."""

    def __init__(self, tokenizer: Tokenizer, cancel: Callable[[Sequence], None]) -> None:
        self._tokenizer = tokenizer
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event | _Signal] = queue.SimpleQueue()
        self._conversations: dict[Sequence, _Conversation] = {}
        self._polled = 0.0
        self._thread = threading.Thread(target=self._run, name="responder", daemon=True)
        self._thread.start()

    def open(self, sequence: Sequence, reply: Reply) -> None:
        """Send what is emitted for `sequence` to `reply`; call it before the sequence is submitted."""
        self._conversations[sequence] = _Conversation(sequence, reply, self._tokenizer)
        self._events.put(_Signal.LOOK)  # from now on the client may go

    def discard(self, sequence: Sequence) -> None:
        """Forget a sequence that was not submitted after all."""
        del self._conversations[sequence]

    def emit(self, sequence: Sequence, tokens: list[int], reason: FinishReason | None) -> None:
        """Take new tokens of a sequence, any thread's: the engine's listener."""
        self._events.put((sequence, tokens, reason))

    def close(self) -> None:
        """Return when everything emitted has been sent."""
        self._events.put(_Signal.CLOSE)
        self._thread.join()

    def _run(self) -> None:
        events = list[Event | _Signal]()
        while _Signal.CLOSE not in events:
            events = self._wait()
            for event in _together(event for event in events if not isinstance(event, _Signal)):
                try:
                    self._handle(*event)
                except Exception:
                    logger.exception("a response could not be sent")
                self._poll_cancellations()  # however busy the others are
            self._poll_cancellations()

    def _wait(self) -> list[Event | _Signal]:
        """Wait for an event, for a while where clients may go, and return all that there are."""
        events = list[Event | _Signal]()
        try:
            events.append(self._events.get(timeout=CANCELLATION_POLL_S if self._conversations else None))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def _handle(self, sequence: Sequence, tokens: list[int], reason: FinishReason | None) -> None:
        conversation = self._conversations.get(sequence)
        if conversation is None:  # a stop string ended it while the engine went on
            return
        if conversation.feed(tokens):
            if reason is None:
                self._cancel(sequence)
            self._finish(sequence, conversation, "stop")
        elif reason in ("stop", "length"):
            self._finish(sequence, conversation, "stop" if conversation.flush() else reason)
        elif reason:
            del self._conversations[sequence]
            conversation.reply.fail(reason)
        elif sequence.options.stream and (piece := conversation.unsent()):
            conversation.reply.partial(sequence, piece)

    def _finish(self, sequence: Sequence, conversation: _Conversation, reason: FinishReason) -> None:
        del self._conversations[sequence]
        whole = conversation.whole()
        conversation.reply.complete(sequence, conversation.rest(), whole, reason)

    def _poll_cancellations(self) -> None:
        if time.monotonic() - self._polled < CANCELLATION_POLL_S:
            return
        self._polled = time.monotonic()
        for sequence, conversation in list(self._conversations.items()):
            if not sequence.cancelled and conversation.reply.is_cancelled():
                self._cancel(sequence)


def _together(events: Iterable[Event]) -> list[Event]:
    """Return one event for each sequence: all of its tokens, and how it ended if it did."""
    merged: dict[Sequence, Event] = {}
    for sequence, tokens, reason in events:
        _, before, _ = merged.get(sequence, (sequence, [], None))
        merged[sequence] = sequence, before + tokens, reason
    return list(merged.values())
