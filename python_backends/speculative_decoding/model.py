"""Triton adapter of the backend "speculative_decoding": a cached answer is sent on at once, any other is decoded."""

import json
import queue
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.append(str(Path(__file__).parents[1]))  # Triton adds this file's folder only

from speculative_decoding.drafter import ModelDrafter
from speculative_decoding.engine import Engine
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.metrics import Metrics
from speculative_decoding.options import GenerationOptions, InvalidOptionError
from speculative_decoding.responder import Responder
from speculative_decoding.scheduler import QueueFullError
from speculative_decoding.sequence import FinishReason, Sequence
from speculative_decoding.settings import Settings
from speculative_decoding.tokenizer import Tokenizer
from speculative_decoding.vocabulary import require_draft_fits, require_same_vocabulary

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """A target, an optional draft, and the engine that decodes with them."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load <model>/<version>/target and, where it exists, .../draft; an exception here is Triton's load error."""
        settings = Settings.from_config(json.loads(args["model_config"]))
        folder = Path(args["model_repository"], args["model_version"])
        self._tokenizer = Tokenizer(folder / "target", settings.prompt_format)
        target = LanguageModel(folder / "target", settings.max_sequences, settings.threads, spinning=True)
        drafter = None
        if (folder / "draft").is_dir():
            require_same_vocabulary(self._tokenizer, Tokenizer(folder / "draft", "raw"))
            # One thread, the engine's own: more would fight with the target's for the same cores.
            draft = LanguageModel(folder / "draft", settings.max_sequences, threads=1, spinning=False)
            require_draft_fits(target.shape, draft.shape)
            drafter = ModelDrafter(draft)
        self._engine = Engine(target, drafter, settings.speculation_length, settings.max_waiting)
        self._responder = Responder(self._tokenizer, self._engine.cancel)
        self._store = AnswerStore(settings.cache_model)
        self._metrics = Metrics(args["model_name"], self._engine.load)

    def execute(self, requests: list[Any]) -> None:
        """Start an answer to each request; responses follow from other threads."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._start(request, sender)
            except InvalidOptionError as error:
                _refuse(sender, str(error), pb_utils.TritonError.INVALID_ARG)
            except QueueFullError as error:
                _refuse(sender, str(error), pb_utils.TritonError.UNAVAILABLE)

    def finalize(self) -> None:
        """Cancel what runs and end the threads."""
        self._engine.stop()
        self._responder.close()
        self._store.close()
        self._metrics.close()
        del self._metrics  # a metric that outlives finalize crashes the process on its way out

    def _start(self, request: Any, sender: Any) -> None:
        options = _options(request)
        cached = _text(request, "cached_output")
        lookup = _json_object(request, "cache_info")
        if not isinstance(lookup.get("milliseconds", {}), dict):
            raise InvalidOptionError(
                f"cache_info has milliseconds {lookup['milliseconds']!r}; it must be a JSON object"
            )
        if cached:
            _respond(sender, cached, json.dumps({"acceptance_rate": None, **lookup}), FINAL)
            return
        sequence = Sequence(self._encode(request), options, self._responder.emit)
        reply = TritonReply(sender, lookup, _text(request, "cache_entry"), self._store, self._metrics)
        self._responder.open(sequence, reply)
        try:
            self._engine.submit(sequence)
        except QueueFullError:
            self._responder.discard(sequence)
            raise

    def _encode(self, request: Any) -> list[int]:
        prompt = _text(request, "text_input")
        if not prompt:
            raise InvalidOptionError("text_input is empty; it must be a prompt")
        limit = self._engine.context_length
        if len(prompt.encode()) > limit * self._tokenizer.longest_token:
            raise InvalidOptionError(f"text_input has {len(prompt.encode())} bytes; the context holds {limit} tokens")
        tokens = self._tokenizer.encode_prompt(prompt)
        if not tokens:
            raise InvalidOptionError(f"text_input is {prompt!r}, which has no tokens; it must be a prompt")
        if len(tokens) >= limit:
            raise InvalidOptionError(f"text_input has {len(tokens)} tokens; it may have at most {limit - 1}")
        return tokens


class TritonReply:
    """Sends one request's responses, and has its answer stored in the cache."""

    def __init__(self, sender: Any, lookup: dict[str, Any], entry: str, store: "AnswerStore", metrics: Metrics) -> None:
        self._sender = sender
        self._lookup = lookup
        self._entry = entry
        self._store = store
        self._metrics = metrics

    def partial(self, text: str) -> None:
        _respond(self._sender, text, "")

    def complete(self, sequence: Sequence, text: str, answer: str, reason: FinishReason) -> None:
        info = {
            "source": "decoded",
            "tokens": sequence.answered,
            "prompt_tokens": len(sequence.prompt),
            "finish_reason": reason,
            "acceptance_rate": sequence.acceptance_rate,
            "similarity": self._lookup.get("similarity"),
            "milliseconds": {**self._lookup.get("milliseconds", {}), **sequence.milliseconds()},
        }
        _respond(self._sender, text, json.dumps(info), FINAL)
        if self._entry:
            self._store.put(self._entry, answer, {"tokens": sequence.answered, "finish_reason": reason})
        self._metrics.answered(sequence, reason)

    def fail(self, reason: FinishReason) -> None:
        if reason == "cancelled":
            _refuse(self._sender, "the request was cancelled", pb_utils.TritonError.CANCELLED)
        else:
            _refuse(self._sender, "decoding failed; the server's log says why", pb_utils.TritonError.INTERNAL)
        self._metrics.failed(reason)

    def is_cancelled(self) -> bool:
        cancelled: bool = self._sender.is_cancelled()
        return cancelled


class AnswerStore:
    """Sends finished answers to the cache, on a thread of its own: no client waits for it."""

    def __init__(self, cache_model: str) -> None:
        self._cache_model = cache_model
        self._queue: queue.SimpleQueue[tuple[str, str, dict[str, Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="answer store", daemon=True)
        self._thread.start()

    def put(self, entry: str, answer: str, info: dict[str, Any]) -> None:
        """Have `answer` stored under the cache's handle `entry`."""
        self._queue.put((entry, answer, info))

    def close(self) -> None:
        """End the thread; what waits is dropped, since the server is going."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            entry, answer, info = item
            texts = {"text_input": "", "cache_entry": entry, "answer": answer, "answer_info": json.dumps(info)}
            response = pb_utils.InferenceRequest(
                model_name=self._cache_model,
                requested_output_names=["cache_info"],
                inputs=[_tensor(name, text) for name, text in texts.items()],
            ).exec()
            if response.has_error():
                pb_utils.Logger.log_error(f"an answer was not cached: {response.error().message()}")


def _options(request: Any) -> GenerationOptions:
    parameters = json.loads(request.parameters() or "{}")
    stream = pb_utils.get_input_tensor_by_name(request, "stream")
    if stream is not None:
        parameters["stream"] = bool(stream.as_numpy().ravel()[0])
    return GenerationOptions.parse(parameters | _json_object(request, "sampling_parameters"))


def _json_object(request: Any, name: str) -> dict[str, Any]:
    """Return the JSON object in an optional input, {} without it. Raises InvalidOptionError."""
    text = _text(request, name)
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InvalidOptionError(f"{name} is {text!r}; it must be a JSON object")
    return value


def _text(request: Any, name: str) -> str:
    """Return the one string in an optional input, '' without it. Raises InvalidOptionError."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return ""
    elements = tensor.as_numpy().ravel()
    if elements.size != 1:
        raise InvalidOptionError(f"{name} has {elements.size} elements; it must have one")
    try:
        return bytes(elements[0]).decode()
    except UnicodeDecodeError as error:
        raise InvalidOptionError(f"{name} is not valid UTF-8: {error.reason} at byte {error.start}") from error


def _tensor(name: str, text: str) -> Any:
    return pb_utils.Tensor(name, np.array([[text.encode()]], np.object_))


def _respond(sender: Any, text: str, info: str, flags: int = 0) -> None:
    response = pb_utils.InferenceResponse([_tensor("text_output", text), _tensor("info", info)])
    sender.send(response, flags=flags)


def _refuse(sender: Any, message: str, code: int) -> None:
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code)), flags=FINAL)
