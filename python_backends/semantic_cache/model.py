"""Triton adapter of the backend "semantic_cache": tensors and parameters in, outcomes out.

A request is a lookup, or, when it has the input `cache_entry`, an answer to store. An exact hit is answered at once;
searches and stores go to a thread each, so that no hit waits for an embedding or for the disk.
"""

import json
import os
import sqlite3
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.append(str(Path(__file__).parents[1]))  # Triton adds this file's folder only

from semantic_cache.batcher import Batcher
from semantic_cache.cache import Outcome, SemanticCache
from semantic_cache.embedder import Embedder, Tokens, Vector
from semantic_cache.janitor import Janitor
from semantic_cache.metrics import Metrics
from semantic_cache.policy import Policy
from semantic_cache.request import Answer, InvalidRequest, Lookup, parse_answer, parse_lookup
from semantic_cache.store import Store

STORE_NAME = "semantic_cache.sqlite"
STATE_VARIABLE = "INFERENCE_STATE_DIR"
TIDY_INTERVAL_S = 10.0


class TritonPythonModel:
    """The one instance of the cache model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the store and start the threads; an exception here is Triton's load error."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self._policy = Policy.from_parameters(parameters)
        tokenizer_file = Path(args["model_repository"], args["model_version"], "tokenizer.json")
        embed = Embedder(tokenizer_file, partial(_infer, self._policy.embedder))
        self._metrics = Metrics()
        self._store = _open_store(self._policy, os.environ)
        self._cache = SemanticCache(self._policy, self._store, embed, self._report)
        limit = config["max_batch_size"]
        self._searches: Batcher[tuple[Any, Lookup]] = Batcher(self._search, limit, "search")
        self._puts: Batcher[tuple[Any, Answer]] = Batcher(self._put, limit, "store")
        self._janitor = Janitor(self._tidy, TIDY_INTERVAL_S)

    def execute(self, requests: list[Any]) -> None:
        """Answer, or hand on, each request by itself: one that is wrong does not disturb its neighbours."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                asked = _parse(request, self._policy)
            except InvalidRequest as error:
                _refuse(sender, str(error), pb_utils.TritonError.INVALID_ARG)
                continue
            if isinstance(asked, Answer):
                self._puts.submit((sender, asked))
            elif outcome := self._cache.exact(asked):
                self._answer(sender, outcome)
            else:
                self._searches.submit((sender, asked))

    def finalize(self) -> None:
        """Finish what is at work and close the store."""
        self._searches.close()
        self._puts.close()
        self._janitor.close()
        self._store.close()
        del self._metrics  # a metric that outlives finalize crashes the process on its way out

    def _search(self, batch: list[tuple[Any, Lookup]]) -> None:
        outcomes = self._cache.search([lookup for _, lookup in batch])
        for (sender, _), outcome in zip(batch, outcomes, strict=True):
            self._answer(sender, outcome)

    def _put(self, batch: list[tuple[Any, Answer]]) -> None:
        senders = [sender for sender, _ in batch]
        try:
            results = self._cache.put([answer for _, answer in batch])
        except sqlite3.Error as error:
            self._report("store", error)
            for sender in senders:
                _refuse(sender, f"the answer was not stored: {error}", pb_utils.TritonError.INTERNAL)
            return
        for sender, result in zip(senders, results, strict=True):
            _respond(sender, "", "", json.dumps({"source": result}))
            self._metrics.stored(result)

    def _answer(self, sender: Any, outcome: Outcome) -> None:
        _respond(sender, outcome.answer, outcome.entry, outcome.to_json())
        self._metrics.looked_up(outcome.source, (outcome.lookup_ms + outcome.embed_ms) / 1e3)

    def _report(self, stage: str, error: Exception) -> None:
        pb_utils.Logger.log_error(f"semantic_cache: {stage}: {type(error).__name__}: {error}")
        self._metrics.failed(stage)

    def _tidy(self) -> None:
        try:
            self._cache.purge()
            self._metrics.set_entries(self._store.count())
        except sqlite3.Error as error:
            self._report("purge", error)


def _open_store(policy: Policy, environment: Mapping[str, str]) -> Store:
    folder = environment.get(STATE_VARIABLE)
    if not policy.store_path and not folder:
        raise ValueError(
            f"the semantic cache has nowhere to store answers: set its parameter store_path to a file, "
            f"or the environment variable {STATE_VARIABLE} to a folder"
        )
    path = Path(policy.store_path) if policy.store_path else Path(str(folder), STORE_NAME)
    try:
        return Store(path)
    except (OSError, sqlite3.Error) as error:
        raise RuntimeError(f"the semantic cache cannot open its store {path}: {error}") from error


def _parse(request: Any, policy: Policy) -> Lookup | Answer:
    entry = _input(request, "cache_entry")
    if entry is not None:
        return parse_answer(entry, _input(request, "answer"), _input(request, "answer_info"))
    return parse_lookup(_input(request, "text_input") or b"", json.loads(request.parameters() or "{}"), policy)


def _input(request: Any, name: str) -> bytes | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    elements = tensor.as_numpy().ravel()
    if elements.size != 1:
        raise InvalidRequest(f"{name} has {elements.size} elements; it must have one: send one prompt per request")
    return bytes(elements[0])


def _infer(embedder: str, input_ids: Tokens, attention_mask: Tokens) -> Vector:
    request = pb_utils.InferenceRequest(
        model_name=embedder,
        requested_output_names=["embedding"],
        inputs=[pb_utils.Tensor("input_ids", input_ids), pb_utils.Tensor("attention_mask", attention_mask)],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
    )
    response = request.exec()
    if response.has_error():
        raise RuntimeError(response.error().message())
    vectors: Vector = pb_utils.get_output_tensor_by_name(response, "embedding").as_numpy()
    return vectors


def _respond(sender: Any, cached_output: str, cache_entry: str, cache_info: str) -> None:
    texts = {"cached_output": cached_output, "cache_entry": cache_entry, "cache_info": cache_info}
    tensors = [pb_utils.Tensor(name, np.array([[text.encode()]], np.object_)) for name, text in texts.items()]
    sender.send(pb_utils.InferenceResponse(tensors), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _refuse(sender: Any, message: str, code: int) -> None:
    sender.send(
        pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code)),
        flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
    )
