"""From the engine's tokens to a client's responses, on a thread of its own so that decoding never waits for sending."""

import enum
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from speculative_decoding.sequence import FinishReason, Sequence
from speculative_decoding.tokenizer import IncrementalDecoder, Tokenizer

logger = logging.getLogger(__name__)
CANCELLATION_POLL_S = 0.02

Event = tuple[Sequence, list[int], FinishReason | None]


class _Signal(enum.Enum):
    """What the responder's thread is told besides events."""

    LOOK = enum.auto()
    CLOSE = enum.auto()


class Reply(Protocol):
    """Where the responses of one request go."""

    def partial(self, text: str) -> None:
        """Send text of a stream."""

    def complete(self, sequence: Sequence, text: str, answer: str, reason: FinishReason) -> None:
        """Send the last response: `text` is what has not been sent yet, `answer` all of it."""

    def fail(self, reason: FinishReason) -> None:
        """Say that there is no answer."""

    def is_cancelled(self) -> bool:
        """Whether the client has gone."""


class _Conversation:
    """A reply in the making."""

    def __init__(self, reply: Reply, tokenizer: Tokenizer) -> None:
        self.reply = reply
        self.decoder = IncrementalDecoder(tokenizer)
        self.answer = ""
        self.sent = 0


class Responder:
    """Decodes and sends what the engine emits, and tells the engine of clients that have gone."""

    def __init__(self, tokenizer: Tokenizer, cancel: Callable[[Sequence], None]) -> None:
        self._tokenizer = tokenizer
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event | _Signal] = queue.SimpleQueue()
        self._conversations: dict[Sequence, _Conversation] = {}
        self._thread = threading.Thread(target=self._run, name="responder", daemon=True)
        self._thread.start()

    def open(self, sequence: Sequence, reply: Reply) -> None:
        """Send what is emitted for `sequence` to `reply`; call it before the sequence is submitted."""
        self._conversations[sequence] = _Conversation(reply, self._tokenizer)
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
        looked = 0.0
        while (event := self._next()) is not _Signal.CLOSE:
            if not isinstance(event, _Signal):
                try:
                    self._handle(*event)
                except Exception:
                    logger.exception("a response could not be sent")
            if time.monotonic() - looked >= CANCELLATION_POLL_S:  # however busy the others are
                self._poll_cancellations()
                looked = time.monotonic()

    def _next(self) -> Event | _Signal:
        try:
            return self._events.get(timeout=CANCELLATION_POLL_S if self._conversations else None)
        except queue.Empty:
            return _Signal.LOOK

    def _handle(self, sequence: Sequence, tokens: list[int], reason: FinishReason | None) -> None:
        conversation = self._conversations[sequence]
        conversation.answer += conversation.decoder.feed(tokens)
        if reason:
            del self._conversations[sequence]
            self._finish(sequence, conversation, reason)
        elif sequence.options.stream and len(conversation.answer) > conversation.sent:
            conversation.reply.partial(conversation.answer[conversation.sent :])
            conversation.sent = len(conversation.answer)

    def _finish(self, sequence: Sequence, conversation: _Conversation, reason: FinishReason) -> None:
        if reason in ("stop", "length"):
            conversation.answer += conversation.decoder.flush()
            unsent = conversation.answer[conversation.sent :]
            conversation.reply.complete(sequence, unsent, conversation.answer, reason)
        else:
            conversation.reply.fail(reason)

    def _poll_cancellations(self) -> None:
        for sequence, conversation in list(self._conversations.items()):
            if not sequence.cancelled and conversation.reply.is_cancelled():
                self._cancel(sequence)
