"""Locust users of `generate` and `embedder`, over HTTP and gRPC, with think time; `make load` runs them.

Some objects of the standard library are asked about far more often than others (Zipf), each in many phrasings, so that
the cache finds some prompts by their bytes, some by their meaning, and others not at all. Beside whole requests the
report has rows of type TTFT (to the first response of a stream) and ITL (between responses that have text). Sessions
are on: they repeat the conversation in every turn, and name it in `session_id` where the served language model keeps
keys and values (its config has `kv_cache_bytes`).
"""

import itertools
import json
import os
import random
import time
import uuid
from typing import Any, ClassVar

import numpy as np
from grpc.experimental import gevent as grpc_gevent
from locust import FastHttpUser, User, between, events, tag, task
from tritonclient import grpc

from perf.zipf import zipf
from scripts.demo import NAMES
from scripts.demo_models.phrasings import TRAINED
from scripts.serving.client import GenerateClient

grpc_gevent.init_gevent()  # or a call that waits would stop all users

MOST_TOKENS = 48
TURNS = 3
LENGTHS = (16, 32, 64)
VOCABULARY = (1000, 30000)
WEIGHTS = zipf(len(NAMES)).tolist()
GRPC_URL = os.environ.get("GRPC_URL", "127.0.0.1:8001")


def prompt() -> str:
    """Return a question: the object by Zipf's law, the phrasing at random."""
    name = random.choices(NAMES, WEIGHTS)[0]
    return random.choice(TRAINED).format(n=name)


def sentence() -> dict[str, np.ndarray]:
    """Return the embedder's inputs for one sentence of random length, padded to a bucket."""
    length = random.choice(LENGTHS)
    ids, mask = np.zeros((1, length), np.int64), np.zeros((1, length), np.int64)
    tokens = random.randint(length // 2 + 1, length)
    ids[0, :tokens] = np.random.default_rng(random.getrandbits(32)).integers(*VOCABULARY, tokens)
    mask[0, :tokens] = 1
    return {"input_ids": ids, "attention_mask": mask}


def report(kind: str, name: str, milliseconds: float, length: int = 0, error: Exception | None = None) -> None:
    """Put one time into locust's statistics."""
    events.request.fire(
        request_type=kind, name=name, response_time=milliseconds, response_length=length, exception=error, context={}
    )


def report_stream(name: str, first_ms: float, arrivals_ms: list[float]) -> None:
    """Report when the responses of a stream came."""
    report("TTFT", name, first_ms)
    for early, late in itertools.pairwise(arrivals_ms):
        report("ITL", name, late - early)


class HttpUser(FastHttpUser):
    """Asks over HTTP, in whole and streamed."""

    weight = 3
    wait_time = between(0.2, 1.0)

    @tag("generate")
    @task(2)
    def ask(self) -> None:
        body = {"text_input": prompt(), "max_tokens": MOST_TOKENS}
        self.client.post("/v2/models/generate/generate", json=body, name="generate")

    @tag("generate", "stream")
    @task(2)
    def stream(self) -> None:
        body = {"text_input": prompt(), "max_tokens": MOST_TOKENS, "stream": True}
        started, arrivals = time.perf_counter(), []
        with self.client.post(
            "/v2/models/generate/generate_stream", json=body, name="generate_stream", stream=True, catch_response=True
        ) as response:
            while line := response.stream.readline(b"\n"):
                if line.startswith(b"data:"):
                    event = json.loads(line.removeprefix(b"data:"))
                    if "error" in event:
                        response.failure(event["error"])
                        return
                    arrivals.append(1e3 * (time.perf_counter() - started))
            if arrivals:
                report_stream("generate_stream", arrivals[0], arrivals)
            else:
                response.failure("a stream without a response")

    @tag("embedder")
    @task(1)
    def embed(self) -> None:
        inputs = [
            {"name": name, "shape": list(values.shape), "datatype": "INT64", "data": values.ravel().tolist()}
            for name, values in sentence().items()
        ]
        self.client.post("/v2/models/embedder/infer", json={"inputs": inputs}, name="embedder")


class GrpcUser(User):
    """Asks over gRPC, streamed, and embeds."""

    weight = 2
    wait_time = between(0.2, 1.0)

    def on_start(self) -> None:
        self.generate = GenerateClient(GRPC_URL)
        self.generate.__enter__()
        self.embedder = grpc.InferenceServerClient(GRPC_URL)

    def on_stop(self) -> None:
        self.generate.__exit__(None, None, None)
        self.embedder.close()

    @tag("generate", "stream")
    @task(2)
    def stream(self) -> None:
        self.timed("generate stream", prompt(), stream=True)

    @tag("generate")
    @task(1)
    def ask(self) -> None:
        self.timed("generate", prompt())

    @tag("embedder")
    @task(1)
    def embed(self) -> None:
        tensors = []
        for name, values in sentence().items():
            tensors.append(grpc.InferInput(name, list(values.shape), "INT64"))
            tensors[-1].set_data_from_numpy(values)
        started = time.perf_counter()
        failure = None
        try:
            self.embedder.infer("embedder", tensors)
        except Exception as error:  # a failed request is a result
            failure = error
        report("gRPC", "embedder", 1e3 * (time.perf_counter() - started), error=failure)

    def timed(self, name: str, text: str, **parameters: str | bool) -> str:
        """Ask, report, and return the answer, empty when it failed."""
        started = time.perf_counter()
        try:
            answer = self.generate.ask(text, max_tokens=MOST_TOKENS, **parameters)
        except Exception as error:  # a failed request is a result
            report("gRPC", name, 1e3 * (time.perf_counter() - started), error=error)
            return ""
        report("gRPC", name, answer.total_ms, len(answer.text))
        if parameters.get("stream"):
            report_stream(name, answer.first_ms, answer.arrivals_ms)
        return answer.text


class SessionUser(GrpcUser):
    """Has conversations: each turn sends all turns before it."""

    weight = 1
    tasks: ClassVar[list[Any]] = []  # not those of GrpcUser

    def on_start(self) -> None:
        super().on_start()
        config = self.embedder.get_model_config("language_model").config
        self.keeps_keys = "kv_cache_bytes" in config.parameters

    @tag("session")
    @task
    def converse(self) -> None:
        session = {"session_id": uuid.uuid4().hex} if self.keeps_keys else {}
        messages: list[dict[str, str]] = []
        for _ in range(TURNS):
            messages.append({"role": "user", "content": prompt()})
            text = self.timed("session turn", "", messages=json.dumps(messages), stream=True, **session)
            messages.append({"role": "assistant", "content": text})
            self.wait()
