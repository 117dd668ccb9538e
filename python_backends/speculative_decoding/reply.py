"""The responses to one request, of one answer or several, and what is stored of them."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils

from speculative_decoding.answer_store import AnswerStore
from speculative_decoding.logprobs import TokenLogprob
from speculative_decoding.metrics import Metrics
from speculative_decoding.request import GenerationRequest
from speculative_decoding.responder import Piece
from speculative_decoding.sequence import FinishReason, Sequence
from speculative_decoding.tokenizer import Tokenizer
from speculative_decoding.triton_tensors import FINAL, number_tensor, respond, send_error, text_tensor

FAILURES = {  # messages, and Triton's names of errors, which it defines after this is imported
    "cancelled": ("the request was cancelled", "CANCELLED"),
    "timeout": ("the request's timeout of {timeout} microseconds is over", "UNAVAILABLE"),
    "error": ("decoding failed; the server's log says why", "INTERNAL"),
}

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
        self, sender: Any, request: GenerationRequest, tokenizer: Tokenizer, store: AnswerStore, metrics: Metrics
    ) -> None:
        self._sender = sender
        self._request = request
        self._tokenizer = tokenizer
        self._store = store
        self._metrics = metrics
        self._answers: dict[int, _Answer] = {}
        self._failed = False

    def partial(self, sequence: Sequence, piece: Piece) -> None:
        respond(self._sender, [piece.text], "", self._returned(sequence, [piece], [""]))

    def complete(self, sequence: Sequence, last: Piece, whole: Piece, reason: FinishReason) -> None:
        self._answers[sequence.index] = _Answer(sequence, last, whole, reason)
        self._metrics.answered(sequence, reason)
        if len(self._answers) == self._request.options.n and not self._failed:
            self._send([self._answers[index] for index in sorted(self._answers)])

    def fail(self, sequence: Sequence, reason: FinishReason) -> None:
        if not self._failed:
            self._failed = True
            message, code = FAILURES[reason]
            send_error(
                self._sender, message.format(timeout=sequence.options.timeout), getattr(pb_utils.TritonError, code)
            )
        self._metrics.failed(reason)

    def is_cancelled(self) -> bool:
        cancelled: bool = self._failed or self._sender.is_cancelled()
        return cancelled

    def _send(self, answers: list[_Answer]) -> None:
        pieces = [answer.last for answer in answers]
        reasons = [str(answer.reason) for answer in answers]
        prefix = self._request.text if self._request.prepended else ""
        info = self._info(answers)
        respond(
            self._sender,
            [prefix + piece.text for piece in pieces],
            json.dumps(info),
            self._returned(answers[0].sequence, pieces, reasons),
            FINAL,
        )
        if self._request.cached.entry:
            kept = {name: info[name] for name in KEPT_INFO if name in info}
            self._store.put(self._request.cached.entry, encode_answers([one.whole.text for one in answers]), kept)

    def _info(self, answers: list[_Answer]) -> dict[str, Any]:
        """Return the output `info`; what each of several answers has of its own is a list."""
        first, several = answers[0].sequence, len(answers) > 1
        cached = self._request.cached.info
        drafted = sum(answer.sequence.drafted for answer in answers)
        accepted = sum(answer.sequence.accepted for answer in answers)
        info: dict[str, Any] = {
            "source": "decoded",
            "tokens": sum(answer.whole.tokens for answer in answers),
            "prompt_tokens": len(first.prompt),
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


def encode_answers(texts: list[str]) -> str:
    """Return answers as the cache keeps them: one as it is, several as a JSON list."""
    return texts[0] if len(texts) == 1 else json.dumps(texts)


def decode_answers(text: str, count: int) -> list[str]:
    """Undo encode_answers(), for so many answers."""
    return [text] if count == 1 else [str(answer) for answer in json.loads(text)]
