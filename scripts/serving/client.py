"""A client of the ensemble `generate`, over one gRPC stream."""

import json
import queue
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from tritonclient import grpc

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """What came back: the text, its pieces as they came, the server's info, and client-side times.

    first_ms: to the first response; arrivals_ms: of all pieces that have text.
    """

    text: str
    pieces: list[str]
    info: dict[str, Any]
    first_ms: float
    total_ms: float
    arrivals_ms: list[float]


class GenerateClient:
    """Asks one question at a time. Use as a context manager."""

    def __init__(self, url: str, model: str = "generate") -> None:
        self._model = model
        self._client = grpc.InferenceServerClient(url)
        self._responses: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()

    def __enter__(self) -> "GenerateClient":
        self._client.start_stream(lambda result, error: self._responses.put((result, error)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.stop_stream()
        self._client.close()

    def ask(self, prompt: str, **parameters: str | int | float | bool) -> Answer:
        """Send one prompt with request parameters. Raises InferenceServerException when the server refuses it."""
        tensor = grpc.InferInput("text_input", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[prompt.encode()]], np.object_))
        started = time.perf_counter()
        self._client.async_stream_infer(self._model, [tensor], parameters=parameters)
        pieces: list[str] = []
        arrivals: list[float] = []
        first = 0.0
        while True:
            result, error = self._responses.get(timeout=TIMEOUT_S)
            elapsed = (time.perf_counter() - started) * 1e3
            if error is not None:
                raise error
            first = first or elapsed
            pieces.append(result.as_numpy("text_output").item().decode())
            if pieces[-1]:
                arrivals.append(elapsed)
            if result.get_response().parameters["triton_final_response"].bool_param:
                info = json.loads(result.as_numpy("info").item())
                return Answer("".join(pieces), [piece for piece in pieces if piece], info, first, elapsed, arrivals)
