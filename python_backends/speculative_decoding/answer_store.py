"""Sends finished answers to the semantic cache, on a thread of its own: no client waits for it."""

import json
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import triton_python_backend_utils as pb_utils

from speculative_decoding.triton_tensors import text_tensor


class _Item(NamedTuple):
    entry: str
    answer: str
    info: dict[str, Any]
    done: Callable[[], None]


class AnswerStore:
    """A queue of answers, and the thread that stores them."""

    def __init__(self, cache_model: str) -> None:
        self._cache_model = cache_model
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="answer store", daemon=True)
        self._thread.start()

    def put(self, entry: str, answer: str, info: dict[str, Any], done: Callable[[], None]) -> None:
        """Have `answer` stored under the cache's handle `entry`; `done` is called when it is, or cannot be."""
        self._queue.put(_Item(entry, answer, info, done))

    def close(self) -> None:
        """End the thread; what waits is dropped, since the server is going."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            self._store(item)
            item.done()

    def _store(self, item: _Item) -> None:
        texts = {
            "text_input": "",
            "cache_entry": item.entry,
            "answer": item.answer,
            "answer_info": json.dumps(item.info),
        }
        response = pb_utils.InferenceRequest(
            model_name=self._cache_model,
            requested_output_names=["cache_info"],
            inputs=[text_tensor(name, [text]) for name, text in texts.items()],
        ).exec()
        if response.has_error():
            pb_utils.Logger.log_error(f"an answer was not cached: {response.error().message()}")
