"""Triton adapter of the backend "semantic_cache": tensors and parameters in, outcomes out.

A request is a lookup; with the input `cache_entry`, an answer to store; with the input `admin`, a command. An exact hit
is answered at once; searches, stores and commands go to a thread each, so that no hit waits for an embedding or a disk.
With `upstream_model`, the model answers misses too: its outputs are then text_output and info.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.append(str(Path(__file__).parents[1]))  # Triton adds this file's folder only

from semantic_cache.admin import Admin
from semantic_cache.batcher import Batcher
from semantic_cache.cache import Outcome, SemanticCache
from semantic_cache.embedder import Embedder, Tokens
from semantic_cache.exact_index import ExactIndex
from semantic_cache.guard import GuardedReads
from semantic_cache.janitor import Janitor
from semantic_cache.key import Keys
from semantic_cache.metrics import Metrics
from semantic_cache.opening import open_store
from semantic_cache.pair_model import PairModel
from semantic_cache.partition_index import GraphIndex
from semantic_cache.policy import Policy
from semantic_cache.records import Vector
from semantic_cache.replay import pieces
from semantic_cache.request import Answer, InvalidRequest, Lookup, decode, parse_answer, parse_lookup
from semantic_cache.shadow import ShadowChecks
from semantic_cache.store import StoreError
from semantic_cache.text_model import TextModel
from semantic_cache.upstream import Upstream
from semantic_cache.verifier.pair_verifier import PairVerifier
from semantic_cache.verifier.slips import Slips
from semantic_cache.verifier.verifier import Verifier

TIDY_INTERVAL_S = 10.0
URL_VARIABLE = "INFERENCE_HTTP_URL"
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

Command = Callable[[], str]


class _Put(NamedTuple):
    """An answer to store, the sender that waits for it, if any, and what is called when it is stored, or cannot be."""

    sender: Any
    answer: Answer
    done: Callable[[], None]


class TritonPythonModel:
    """The one instance of the cache model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the store and start the threads; an exception here is Triton's load error."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self._policy = policy = Policy.from_parameters(parameters)
        tokenizer_file = Path(args["model_repository"], args["model_version"], "tokenizer.json")
        embed = Embedder(tokenizer_file, partial(_embed, policy.embedder))
        verifier = _verifier(policy, tokenizer_file)
        on_gpu, number = args["model_instance_kind"] == "GPU", int(args["model_instance_device_id"])
        make_index = partial(ExactIndex, device=number) if on_gpu else GraphIndex
        self._store, secret, is_remote = open_store(policy.store, make_index=make_index)
        judges = (policy.embedder, verifier.version if verifier else "none")
        self._keys = Keys(secret, policy.fronted_model, judges)
        self._metrics = Metrics()
        self._reads = GuardedReads(self._store, is_remote)
        self._cache = SemanticCache(policy, self._store, self._reads, embed, verifier, self._report)
        self._admin = Admin(policy, self._keys, self._store, self._cache, time.time)
        shadow_model = policy.upstream_model or policy.shadow_model
        url = os.environ.get(URL_VARIABLE) or policy.upstream_url
        ask = TextModel(url, shadow_model)
        self._shadow = ShadowChecks(
            policy.shadow_share,
            lambda lookup: "".join(ask(lookup)),
            self._cache.observe,
            self._metrics.checked,
        )
        self._upstream = Upstream(ask, self._metrics.coalesced)
        limit = max(1, config["max_batch_size"])
        self._searches: Batcher[tuple[Any, Lookup]] = Batcher(self._search, limit, "search")
        self._puts: Batcher[_Put] = Batcher(self._put, limit, "store")
        self._commands: Batcher[tuple[Any, Command]] = Batcher(self._command, 1, "admin")
        self._is_warm = False
        self._janitor = Janitor(self._tidy, TIDY_INTERVAL_S)

    def execute(self, requests: list[Any]) -> None:
        """Answer, or hand on, each request by itself: one that is wrong does not disturb its neighbours."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._take(request, sender)
            except InvalidRequest as error:
                _refuse(sender, str(error), pb_utils.TritonError.INVALID_ARG)

    def finalize(self) -> None:
        """Finish what is at work and close the store."""
        for part in (self._searches, self._upstream, self._puts, self._commands, self._shadow, self._janitor):
            part.close()
        self._reads.close()
        self._store.close()
        # Triton's metrics and senders crash the process when they are freed after this, by the interpreter's end.
        vars(self).clear()
        gc.collect()

    def _take(self, request: Any, sender: Any) -> None:
        parameters = json.loads(request.parameters() or "{}")
        text = _input(request, "text_input") or b""
        command, entry = _input(request, "admin"), _input(request, "cache_entry")
        if command is not None:
            name = decode("admin", command)
            self._commands.submit((sender, lambda: self._admin.run(name, text, parameters)))
        elif entry is not None:
            answer = parse_answer(entry, _input(request, "answer"), _input(request, "answer_info"))
            self._puts.submit(_Put(sender, answer, lambda: None))
        else:
            lookup = parse_lookup(text, parameters, self._policy, self._keys)
            if outcome := self._cache.exact(lookup):
                self._answer(sender, lookup, outcome)
            else:
                self._searches.submit((sender, lookup))

    def _search(self, batch: list[tuple[Any, Lookup]]) -> None:
        outcomes = self._cache.search([lookup for _, lookup in batch])
        for (sender, lookup), outcome in zip(batch, outcomes, strict=True):
            self._answer(sender, lookup, outcome)

    def _answer(self, sender: Any, lookup: Lookup, outcome: Outcome) -> None:
        if outcome.source == "miss" and lookup.mode == "only":
            _refuse(sender, "cache is 'only' and no answer is cached", pb_utils.TritonError.NOT_FOUND)
        elif not self._policy.upstream_model:
            self._respond(sender, outcome.answer, outcome.entry, outcome.to_json())
        elif outcome.answer:
            _replay(sender, outcome, bool(lookup.parameters.get("stream")))
        else:
            self._upstream.answer(lookup, TritonPassenger(sender, lookup, outcome, self._put_later))
        if outcome.hit:
            self._shadow.offer(lookup, outcome.hit)
        self._metrics.looked_up(outcome)

    def _put_later(self, answer: Answer, done: Callable[[], None]) -> None:
        self._puts.submit(_Put(None, answer, done))

    def _put(self, batch: list[_Put]) -> None:
        try:
            results = self._cache.put([put.answer for put in batch])
        except StoreError as error:
            self._report("store", error)
            for put in batch:
                if put.sender:
                    _refuse(put.sender, f"the answer was not stored: {error}", pb_utils.TritonError.UNAVAILABLE)
            return
        finally:
            for put in batch:
                put.done()
        for put, result in zip(batch, results, strict=True):
            if put.sender:
                self._respond(put.sender, "", "", json.dumps({"source": result}))
            self._metrics.stored(result)

    def _command(self, batch: list[tuple[Any, Command]]) -> None:
        for sender, command in batch:
            try:
                result = command()
            except InvalidRequest as error:
                _refuse(sender, str(error), pb_utils.TritonError.INVALID_ARG)
            except StoreError as error:
                self._report("admin", error)
                _refuse(sender, f"the store failed: {error}", pb_utils.TritonError.UNAVAILABLE)
            else:
                self._respond(sender, result, "", '{"source": "admin"}')

    def _respond(self, sender: Any, text: str, entry: str, info: str) -> None:
        """Send the one response, in the outputs that this model has."""
        if self._policy.upstream_model:
            _respond(sender, {"text_output": text, "info": info}, FINAL)
        else:
            _respond(sender, {"cached_output": text, "cache_entry": entry, "cache_info": info}, FINAL)

    def _report(self, stage: str, error: Exception) -> None:
        pb_utils.Logger.log_error(f"semantic_cache: {stage}: {type(error).__name__}: {error}")
        self._metrics.failed(stage)

    def _tidy(self) -> None:
        try:
            if not self._is_warm:
                self._store.warm()
                self._is_warm = True
            evicted, (entries, size) = self._cache.tidy()
            self._store.keep()
        except StoreError as error:
            self._report("tidy", error)
            return
        self._metrics.tidied(self._policy.eviction, evicted, entries, size, self._cache.false_hits.bounds())


class TritonPassenger:
    """A client of a cache that asks an upstream model."""

    def __init__(
        self, sender: Any, lookup: Lookup, outcome: Outcome, store: Callable[[Answer, Callable[[], None]], None]
    ) -> None:
        self._sender = sender
        self._streams = bool(lookup.parameters.get("stream"))
        self._outcome = outcome
        self._store = store

    def send(self, text: str) -> None:
        if self._streams:
            _respond(self._sender, {"text_output": text, "info": ""})

    def finish(self, answer: str, kept: Callable[[], None] | None) -> None:
        info = {**json.loads(self._outcome.to_json()), "source": "upstream" if kept else "coalesced"}
        for internal in ("flight", "asked"):
            info.pop(internal, None)
        _respond(self._sender, {"text_output": "" if self._streams else answer, "info": json.dumps(info)}, FINAL)
        if kept and self._outcome.entry:
            self._store(Answer(self._outcome.entry, answer, "{}"), kept)
        elif kept:
            kept()

    def fail(self, message: str) -> None:
        _refuse(self._sender, message, pb_utils.TritonError.UNAVAILABLE)

    def has_left(self) -> bool:
        left: bool = self._sender.is_cancelled()
        return left


def _replay(sender: Any, outcome: Outcome, streams: bool) -> None:
    """Send a hit as an upstream model would have: piece by piece to who wants a stream."""
    *others, last = pieces(outcome.answer) if streams else [outcome.answer]
    for piece in others:
        _respond(sender, {"text_output": piece, "info": ""})
    _respond(sender, {"text_output": last, "info": outcome.to_json()}, FINAL)


def _input(request: Any, name: str) -> bytes | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    elements = tensor.as_numpy().ravel()
    if elements.size != 1:
        raise InvalidRequest(f"{name} has {elements.size} elements; it must have one: send one prompt per request")
    return bytes(elements[0])


def _verifier(policy: Policy, tokenizer_file: Path) -> Verifier | PairVerifier | None:
    if not policy.verify:
        return None
    words = Verifier.load()
    if not policy.pair_model:
        return words
    score = PairModel(tokenizer_file, partial(_infer, policy.pair_model, "logit"))
    return PairVerifier(words, score, policy.pair_model, Slips(score.words()))


def _embed(model: str, input_ids: Tokens, attention_mask: Tokens) -> Vector:
    vectors: Vector = _infer(model, "embedding", input_ids=input_ids, attention_mask=attention_mask)
    return vectors


def _infer(model: str, output: str, **inputs: Tokens) -> Any:
    """Return what a model, given as name:version, makes of tokens."""
    name, _, version = model.partition(":")
    request = pb_utils.InferenceRequest(
        model_name=name,
        model_version=int(version),
        requested_output_names=[output],
        inputs=[pb_utils.Tensor(tensor, values) for tensor, values in inputs.items()],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
    )
    response = request.exec()
    if response.has_error():
        raise RuntimeError(response.error().message())
    return pb_utils.get_output_tensor_by_name(response, output).as_numpy()


def _respond(sender: Any, texts: dict[str, str], flags: int = 0) -> None:
    # Held until send() has returned: it drops outputs that were not asked for, and would free them without the GIL
    # (tritonserver 2.51; mended in python_backend #390).
    tensors = [_tensor(name, text) for name, text in texts.items()]
    sender.send(pb_utils.InferenceResponse(tensors), flags=flags)


def _tensor(name: str, text: str) -> Any:
    return pb_utils.Tensor(name, np.array([[text.encode()]], np.object_))


def _refuse(sender: Any, message: str, code: int) -> None:
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code)), flags=FINAL)
