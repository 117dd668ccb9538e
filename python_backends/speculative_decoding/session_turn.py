"""A request's turn in a session: the prompt made of what was said before, and the answer kept with it."""

import json
from dataclasses import dataclass
from typing import Any

from speculative_decoding.conversation import Continuation, Message, continue_chat, continue_text
from speculative_decoding.request import GenerationRequest
from speculative_decoding.session_store import StoredSession
from speculative_decoding.sessions import Lease
from speculative_decoding.tokenizer import Tokenizer
from speculative_decoding.validation import InvalidOptionError


@dataclass(frozen=True)
class SessionTurn:
    """prompt: all tokens to answer to. kept: how many of them are the session's. new: the messages that came now.

    reason: why not all of the session's tokens could be kept, "" when they were.
    """

    lease: Lease
    prompt: list[int]
    kept: int
    new: list[Message]
    reason: str

    @classmethod
    def begin(cls, lease: Lease, request: GenerationRequest, tokenizer: Tokenizer, limit: int) -> "SessionTurn":
        """Return the turn that a request adds to a session, a prompt of fewer than `limit` tokens.

        Raises InvalidOptionError.
        """
        request.check_input(tokenizer, limit)
        committed = lease.session.tokens
        messages = request.options.messages
        if tokenizer.prompt_format == "raw":
            if messages:
                raise InvalidOptionError("messages cannot be taken in a session of this model: send text_input")
            new: list[Message] = []
            continuation = _continue_text(tokenizer, committed, request.text)
        else:
            new = [message._asdict() for message in messages] or [{"role": "user", "content": request.text}]
            continuation = continue_chat(tokenizer, _history(lease.session), committed, new)
        prompt = [*committed[: continuation.kept], *continuation.tokens]
        if len(prompt) >= limit:
            raise InvalidOptionError(
                f"session_id {lease.session.id!r} would have {len(prompt)} tokens with this question; it may have at "
                f"most {limit - 1}: rewind it, or begin another"
            )
        return cls(lease, prompt, continuation.kept, new, continuation.reason)

    def keep(self, tokens: list[int], answer: str) -> dict[str, Any]:
        """Make the answer, of text `answer`, part of the session, durably; `tokens` are the prompt's and its own.

        Returns what a client is told. Raises SessionConflictError, TooManySessionsError.
        """
        said = [*self.new, {"role": "assistant", "content": answer}] if self.new else []
        self.lease.append(self.kept, tokens[self.kept :], json.dumps(said))
        told = describe(self.lease.session)
        return {**told, "rendered_anew": self.reason} if self.reason else told


def describe(session: StoredSession) -> dict[str, Any]:
    """Return what a client is told of a session."""
    return {"id": session.id, "turns": len(session.turns), "tokens": len(session.tokens)}


def _history(session: StoredSession) -> list[Message]:
    return [message for turn in session.turns for message in json.loads(turn.messages)]


def _continue_text(tokenizer: Tokenizer, committed: list[int], text: str) -> Continuation:
    if not committed:  # a beginning has what the tokenizer adds there
        return Continuation(0, tuple(tokenizer.encode_prompt(text)), "")
    return continue_text(tokenizer, committed, text)
