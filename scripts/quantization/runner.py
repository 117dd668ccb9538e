"""A model that is ready to run: an encoder's session, or a decoder with its slots."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from scripts.quantization.graph import Feeds
from scripts.quantization.precision import PROVIDERS, Provider
from scripts.serving.installation import PYTHON_BACKENDS

sys.path.append(str(PYTHON_BACKENDS))

from speculative_decoding.language_model import LanguageModel

PAST = 64  # tokens that a decoder has seen when its step is timed


class Runner(ABC):
    """Something to time: `step(batch)` is one call for so many rows."""

    @abstractmethod
    def step(self, batch: int) -> Callable[[], object]:
        """Return a function that runs the model once on `batch` rows."""


class Encoder(Runner):
    """A session of ONNX Runtime and example inputs."""

    def __init__(self, folder: Path, provider: Provider, example: Callable[[int], Feeds]) -> None:
        """Load `folder`/model.onnx; `example` gives inputs for a batch."""
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # or sessions timed in turns share cores
        providers = list(dict.fromkeys([PROVIDERS[provider], PROVIDERS["cpu"]]))
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=providers)
        self._example = example

    def run(self, feeds: Feeds) -> list[NDArray]:
        """Return the model's outputs."""
        outputs: list[NDArray] = self._session.run(None, feeds)
        return outputs

    def step(self, batch: int) -> Callable[[], object]:
        feeds = self._example(batch)
        return lambda: self.run(feeds)


class Decoder(Runner):
    """A language model folder, run as the backend runs it, on the CPU."""

    def __init__(self, folder: Path, slots: int) -> None:
        """Load `folder` with room for `slots` sequences."""
        self.model = LanguageModel(folder, slots, threads=0, spinning=True)

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Return the logits [tokens, vocabulary] after each token of a text, valid until the next call."""
        self.model.truncate(0, 0)
        logits: NDArray[np.float32] = self.model.forward(0, np.array([tokens]), np.array([len(tokens)], np.int32))[0]
        return logits

    def step(self, batch: int) -> Callable[[], object]:
        """One token for each of `batch` rows, behind a past of PAST tokens."""
        past = min(PAST, self.model.context_length // 2)
        for slot in range(batch):
            self.model.truncate(slot, 0)
        self.model.forward(0, np.ones((batch, past), np.int64), np.full(batch, past, np.int32))
        tokens, counts = np.ones((batch, 1), np.int64), np.ones(batch, np.int32)

        def run() -> None:
            self.model.forward(0, tokens, counts)
            for slot in range(batch):
                self.model.truncate(slot, past)

        return run
