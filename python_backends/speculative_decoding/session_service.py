"""Requests that name a session, served on a thread of their own: what they change is awaited on disk."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

from speculative_decoding.failures import errors_to, send_failure
from speculative_decoding.request import GenerationRequest
from speculative_decoding.sequence import FinishReason
from speculative_decoding.session_queue import SessionQueue, Waiter
from speculative_decoding.session_request import SessionRequest
from speculative_decoding.session_turn import SessionTurn, describe
from speculative_decoding.sessions import InvalidSessionError, Lease, Sessions
from speculative_decoding.tokenizer import Tokenizer
from speculative_decoding.triton_tensors import FINAL, respond
from speculative_decoding.validation import InvalidOptionError, refuse

Start = Callable[[GenerationRequest, Any, SessionTurn], None]
Open = Callable[[], Lease]
Failed = Callable[[FinishReason], None]


class SessionService:
    """Opens sessions for requests, in turn, and keeps what is answered."""

    def __init__(
        self, sessions: Sessions, tokenizer: Tokenizer, limit: int, waits: bool, start: Start, failed: Failed
    ) -> None:
        """limit: prompts have fewer tokens. waits: a request waits for a session that another has; else it is refused.

        `start` begins to decode a turn's prompt, and has `finish` or `abandon` called in the end. `failed` counts those
        that leave before.
        """
        self._sessions = sessions
        self._tokenizer = tokenizer
        self._limit = limit
        self._waits = waits
        self._start = start
        self._failed = failed
        self._queue = SessionQueue()
        self._thread = ThreadPoolExecutor(1, "sessions")

    def serve(self, request: GenerationRequest, sender: Any) -> None:
        """Do what `request.session` asks. Raises InvalidOptionError."""
        assert request.session
        if request.options.n > 1:
            raise refuse("n", request.options.n, "1 with session_id")
        if request.session.operation != "continue" and (request.text or request.options.messages):
            raise InvalidOptionError(f"session_operation is {request.session.operation!r}: text_input must be empty")
        self._thread.submit(self._serve, request, request.session, sender)

    def finish(
        self, turn: SessionTurn, tokens: list[int], answer: str, sender: Any, send: Callable[[dict[str, Any]], None]
    ) -> None:
        """Keep a turn's answer, then `send` what the client is told of the session, or an error to `sender`."""
        self._thread.submit(self._finish, turn, tokens, answer, sender, send)

    def abandon(self, turn: SessionTurn) -> None:
        """Leave a session as it was before a turn."""
        self._thread.submit(turn.lease.release)

    def close(self) -> None:
        """Return when everything is kept."""
        self._queue.close()
        self._thread.shutdown()

    def _serve(self, request: GenerationRequest, asked: SessionRequest, sender: Any) -> None:
        tenant = request.options.tenant
        with errors_to(sender):
            if asked.operation == "list":
                listed = [asdict(session) for session in self._sessions.list(tenant)]
                respond(sender, [""], json.dumps({"sessions": listed}), {}, FINAL)
            elif self._waits:
                self._wait(request, asked, sender)
            else:
                self._begin(request, asked, sender, partial(self._sessions.open, tenant, asked.id, asked.ttl_s))

    def _wait(self, request: GenerationRequest, asked: SessionRequest, sender: Any) -> None:
        """Begin when no other request has the session, unless the client goes or waits no longer."""
        options = request.options
        left = partial(self._leave, request, sender)
        waiter = Waiter(sender.is_cancelled, options.deadline(request.arrived), left)

        def begin(open_session: Open) -> None:
            self._queue.grant(waiter)
            self._begin(request, asked, sender, open_session)

        self._queue.add(waiter, self._sessions.open_in_turn(options.tenant, asked.id, asked.ttl_s, begin))

    def _leave(self, request: GenerationRequest, sender: Any, reason: FinishReason) -> None:
        send_failure(sender, reason, request.options)
        self._failed(reason)

    def _begin(self, request: GenerationRequest, asked: SessionRequest, sender: Any, open_session: Open) -> None:
        """Do what is asked of a session, or have it answered with what went wrong and let the session go."""
        with errors_to(sender):
            lease, started = open_session(), False
            try:
                if asked.operation == "continue":
                    self._start(request, sender, SessionTurn.begin(lease, request, self._tokenizer, self._limit))
                    started = True
                else:
                    respond(sender, [""], json.dumps({"session": _change(lease, asked)}), {}, FINAL)
            finally:
                if not started:
                    lease.release()

    def _finish(
        self, turn: SessionTurn, tokens: list[int], answer: str, sender: Any, send: Callable[[dict[str, Any]], None]
    ) -> None:
        try:
            with errors_to(sender):
                send(turn.keep(tokens, answer))
        finally:
            turn.lease.release()


def _change(lease: Lease, asked: SessionRequest) -> dict[str, Any]:
    """Rewind, fork or close a session, and return what a client is told."""
    if not lease.session.turns:
        raise InvalidSessionError(f"session_id is {asked.id!r}; it must be one of yours that is open")
    if asked.operation == "rewind":
        lease.rewind(asked.turn)
    elif asked.operation == "fork":
        lease.fork(asked.fork_id)
        return {**describe(lease.session), "id": asked.fork_id}
    else:
        lease.close()
        return {"id": asked.id, "closed": True}
    return describe(lease.session)
