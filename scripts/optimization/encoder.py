"""A sentence encoder, classifier or other ONNX model that Triton's onnxruntime backend serves."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient import grpc
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import np_to_triton_dtype

from scripts.optimization.batching import Settings
from scripts.optimization.setup import FP32, Setup
from scripts.optimization.subject import Ask, Request, Subject
from scripts.quantization.graph import Feeds, random_feeds
from scripts.quantization.install import encoder_config
from scripts.quantization.samples import Samples, tokenize
from scripts.quantization.tasks import read_pairs, sentences

RANDOM_REQUESTS, RANDOM_LENGTH = 600, 32
NOT_HERE = {
    "speculative decoding": "an encoder gives its whole output in one step",
    "KV reuse": "an encoder keeps no keys and values",
}


class EncoderSubject(Subject):
    """Quality is scripts.quantize's: accuracy where the data has labels, else how little the outputs changed."""

    kind = "encoder"

    def first(self) -> Setup:
        return Setup(FP32, Settings(min(1, self._config.max_batch_size), None, 1, os.cpu_count() or 1))

    @cached_property
    def _config(self) -> ModelConfig:
        return text_format.Parse(encoder_config(self._source.model, "cpu"), ModelConfig())

    @cached_property
    def _requests(self) -> list[Feeds]:
        source = self._source
        if self._data:
            feeds = [batch.feeds for batch in Samples(self._data, source.inputs, source.tokenizer, rows=1)]
        elif source.tokenizer and "input_ids" in {taken.name for taken in source.inputs}:
            feeds = [tokenize(source.tokenizer, [text], source.inputs) for text in sentences(read_pairs())]
        else:
            feeds = [random_feeds(source.model, 1, RANDOM_LENGTH, seed) for seed in range(RANDOM_REQUESTS)]
        different = {tuple(values.tobytes() for values in one.values()): one for one in feeds}
        return list(different.values())

    def requests(self) -> Sequence[Request]:
        return self._requests

    def write(self, setup: Setup, repository: Path) -> None:
        folder = repository / self.name
        (folder / "1").mkdir(parents=True)
        for file in self.weights(setup.weights).glob("model.onnx*"):
            shutil.copy(file, folder / "1")
        config = ModelConfig()
        config.CopyFrom(self._config)
        setup.batching.apply(config)
        config.response_cache.enable = setup.cached
        (folder / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")

    def ask(self, setup: Setup, scope: str) -> Callable[[str], Ask]:
        """Triton's response cache knows no scopes: every pass asks other things."""

        @contextmanager
        def connect(url: str) -> Iterator[Callable[[Feeds], None]]:
            with grpc.InferenceServerClient(url) as client:

                def send(feeds: Feeds) -> None:
                    client.infer(self.name, [_tensor(name, values) for name, values in feeds.items()])

                yield send

        return connect

    def quality(self, setup: Setup, answers: Sequence[tuple[Request, Any]]) -> float:
        """The weights': how a model is served changes no output of it."""
        known, name = self._qualities, setup.weights
        if name not in known:
            figures = self.study.judge(self.weights(name))
            known[name] = float(figures.get("accuracy", 1 - figures["loss"]))
        return known[name]

    @cached_property
    def _qualities(self) -> dict[str, float]:
        return {}

    def why_not(self, technique: str) -> str:
        if technique == "batching" and not self._config.max_batch_size:
            return "the model's inputs and outputs have no free batch dimension"
        if technique == "distillation":
            return self._students.why_not()
        return NOT_HERE.get(technique, "")


def _tensor(name: str, values: Any) -> grpc.InferInput:
    tensor = grpc.InferInput(name, values.shape, np_to_triton_dtype(values.dtype))
    tensor.set_data_from_numpy(values)
    return tensor
