"""The responses to one request, of one answer or several, and what is stored of them."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from speculative_decoding.answer_store import AnswerStore
from speculative_decoding.failures import send_failure
from speculative_decoding.logprobs import TokenLogprob
from speculative_decoding.metrics import Metrics
from speculative_decoding.request import GenerationRequest
from speculative_decoding.responder import Piece
from speculative_decoding.sequence import FinishReason, Sequence
from speculative_decoding.session_service import SessionService
from speculative_decoding.session_turn import SessionTurn
from speculative_decoding.tokenizer import Tokenizer
from speculative_decoding.triton_tensors import FINAL, number_tensor, respond, text_tensor
from speculative_decoding.validation import from_json, refuse

KEPT_INFO = ("tokens", "finish_reason", "logprobs")  # of `info`, with a stored answer


class _Answer(NamedTuple):
    """A finished answer: `last` is what a stream still lacks of `whole`."""

    sequence: Sequence
    last: Piece
    whole: Piece
    reason: FinishReason


class TritonReply:
    """Sends one request's responses once all its answers are there, or as they come, and has them stored."""

    def __init__(
        self,
        sender: Any,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        store: AnswerStore,
        metrics: Metrics,
        turn: SessionTurn | None,
        sessions: SessionService,
    ) -> None:
        """turn: of the session that the request continues, None for a request without."""
        self._sender = sender
        self._turn = turn
        self._sessions = sessions
        self._request = request
        self._tokenizer = tokenizer
        self._store = store
        self._metrics = metrics
        self._answers: dict[int, _Answer] = {}
        self._failed = False
        self._leads = True
        self._kept: Callable[[], None] = _nothing
        self._deadline = request.options.deadline(request.arrived)

    def follow(self) -> None:
        self._leads = False

    def when_kept(self, call: Callable[[], None]) -> None:
        self._kept = call

    def is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    def partial(self, sequence: Sequence, piece: Piece) -> None:
        respond(self._sender, [piece.text], "", self._returned(sequence, [piece], [""]))

    def complete(self, sequence: Sequence, last: Piece, whole: Piece, reason: FinishReason) -> None:
        self._answers[sequence.index] = _Answer(sequence, last, whole, reason)
        if self._leads:
            self._metrics.answered(sequence, reason)
        if len(self._answers) == self._request.options.n and not self._failed:
            self._end([self._answers[index] for index in sorted(self._answers)])

    def fail(self, reason: FinishReason) -> None:
        if not self._failed:
            self._failed = True
            send_failure(self._sender, reason, self._request.options)
        self._metrics.failed(reason)
        if self._turn:
            self._sessions.abandon(self._turn)

    def is_cancelled(self) -> bool:
        cancelled: bool = self._failed or self._sender.is_cancelled()
        return cancelled

    def _end(self, answers: list[_Answer]) -> None:
        """Send the last response, of a session's turn once that is kept."""
        if self._turn is None:
            self._send(answers, {})
            return
        [(sequence, _, whole, _)] = answers
        tokens = sequence.tokens[: len(sequence.prompt) + whole.tokens]  # the engine may have gone past a stop string
        self._sessions.finish(
            self._turn, tokens, whole.text, self._sender, lambda session: self._send(answers, {"session": session})
        )

    def _send(self, answers: list[_Answer], more: dict[str, Any]) -> None:
        pieces = [answer.last for answer in answers]
        reasons = [str(answer.reason) for answer in answers]
        prefix = self._request.text if self._request.prepended else ""
        info = self._info(answers) | more
        respond(
            self._sender,
            [prefix + piece.text for piece in pieces],
            json.dumps(info),
            self._returned(answers[0].sequence, pieces, reasons),
            FINAL,
        )
        if self._leads and self._request.cached.entry:
            kept = {name: info[name] for name in KEPT_INFO if name in info}
            texts = [answer.whole.text for answer in answers]
            self._store.put(self._request.cached.entry, encode_answers(texts), kept, self._kept)
        else:
            self._kept()

    def _info(self, answers: list[_Answer]) -> dict[str, Any]:
        """Return the output `info`; what each of several answers has of its own is a list."""
        first, several = answers[0].sequence, len(answers) > 1
        cached = self._request.cached.info
        drafted = sum(answer.sequence.drafted for answer in answers)
        accepted = sum(answer.sequence.accepted for answer in answers)
        info: dict[str, Any] = {
            "source": "decoded" if self._leads else "coalesced",
            "tokens": sum(answer.whole.tokens for answer in answers),
            "prompt_tokens": len(first.prompt),
            "reused_tokens": sum(answer.sequence.reused for answer in answers),
            "finish_reason": [answer.reason for answer in answers] if several else answers[0].reason,
            "acceptance_rate": accepted / drafted if drafted else None,
            "similarity": cached.get("similarity"),
            "milliseconds": {**cached.get("milliseconds", {}), **first.milliseconds()},
        }
        if self._request.options.temperature:
            info["seed"] = first.sampler.seed
        if self._request.options.logprobs is not None:
            logprobs = [self._readable(answer.whole.logprobs) for answer in answers]
            info["logprobs"] = logprobs if several else logprobs[0]
        return info

    def _returned(self, sequence: Sequence, pieces: list[Piece], reasons: list[str]) -> dict[str, Any]:
        """Return the optional outputs that the request asks for."""
        made = {
            "finish_reason": lambda: text_tensor("finish_reason", reasons),
            "num_input_tokens": lambda: number_tensor("num_input_tokens", [len(sequence.prompt)], np.uint32),
            "num_output_tokens": lambda: number_tensor(
                "num_output_tokens", [piece.tokens for piece in pieces], np.uint32
            ),
            "logprobs": lambda: text_tensor(
                "logprobs", [json.dumps(self._readable(piece.logprobs)) for piece in pieces]
            ),
            "cumulative_logprob": lambda: number_tensor(
                "cumulative_logprob",
                [sum(token[0].logprob for token in piece.logprobs) for piece in pieces],
                np.float32,
            ),
        }
        return {name: made[name]() for name in made if name in self._request.returned}

    def _readable(self, logprobs: list[tuple[TokenLogprob, ...]]) -> list[dict[str, Mapping[str, Any]]]:
        """Return log-probabilities as vLLM's backend writes them: for each position, by token id."""
        return [
            {
                str(one.token): {
                    "logprob": round(one.logprob, 6),
                    "rank": one.rank,
                    "decoded_token": self._tokenizer.token_text(one.token),
                }
                for one in position
            }
            for position in logprobs
        ]


def _nothing() -> None:
    """What is called when nobody wants to know."""


def encode_answers(texts: list[str]) -> str:
    """Return answers as the cache keeps them: one as it is, several as a JSON list."""
    return texts[0] if len(texts) == 1 else json.dumps(texts)


def decode_answers(text: str, count: int) -> list[str]:
    """Undo encode_answers(), for so many answers. Raises InvalidOptionError."""
    if count == 1:
        return [text]
    answers = from_json(text)
    if not isinstance(answers, list) or len(answers) != count or not all(isinstance(one, str) for one in answers):
        raise refuse("cached_output", text, f"a JSON list of {count} strings, as n says")
    return answers
