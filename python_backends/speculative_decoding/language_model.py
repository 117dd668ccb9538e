"""A decoder in ONNX Runtime with one key/value slot per sequence, in buffers that are bound once and never copied."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from speculative_decoding.attention_inputs import attend_to_one_more, use_explicit_lengths
from speculative_decoding.execution_provider import CPU, Provider
from speculative_decoding.kv_layout import FLOAT_BYTES, KeyValueShape, SlotMemory

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

PADDING = 1  # tokens of attend_to_one_more
KEPT_WIDTH = 17  # bindings up to this width are kept for the next call: a longest draft and one token

Tokens = NDArray[np.int64]
Counts = NDArray[np.int32]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class DecoderShape:
    """What genai_config.json says of a decoder."""

    layers: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context_length: int
    end_tokens: frozenset[int]
    filename: str

    @property
    def key_values(self) -> KeyValueShape:
        """What a token adds to a slot."""
        return KeyValueShape(self.layers, self.kv_heads, self.head_size)

    @classmethod
    def load(cls, folder: Path) -> "DecoderShape":
        """Read `folder`/genai_config.json (ONNX Runtime GenAI's layout). Raises ValueError naming what is missing."""
        path = folder / "genai_config.json"
        try:
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
            decoder = model["decoder"]
            end = model["eos_token_id"]
            return cls(
                layers=decoder["num_hidden_layers"],
                kv_heads=decoder["num_key_value_heads"],
                head_size=decoder["head_size"],
                vocabulary=model["vocab_size"],
                context_length=model["context_length"],
                end_tokens=frozenset(end if isinstance(end, list) else [end]),
                filename=decoder["filename"],
            )
        except FileNotFoundError as error:
            raise ValueError(f"{path} does not exist: make the folder with scripts.export_model") from error
        except KeyError as error:
            raise ValueError(f"{path} has no field {error}") from error


class LanguageModel:
    """A decoder and its slots. Slot r holds the keys and values of `lengths[r]` tokens.

    Rolling back is lowering a length: what lies beyond it is overwritten later and never read. A token's logits do not
    depend, to the last bit, on which tokens and rows are fed with it, where the weights' products are row-independent.
    """

    def __init__(self, folder: Path, slots: int, threads: int, spinning: bool, provider: Provider = CPU) -> None:
        """Load `folder` (ONNX Runtime GenAI's layout) with room for `slots` sequences.

        Raises ValueError when the folder or the graph is not of the expected form.
        """
        self.shape = DecoderShape.load(folder)
        self.lengths: Counts = np.zeros(slots, np.int32)
        self.ran_s = 0.0  # within ONNX Runtime, so far
        self._path = folder / self.shape.filename
        self._options = session_options(self._path.parent, threads, spinning)
        self._provider = provider
        self._session = self.open_session(self.graph())
        size = (slots, self.shape.kv_heads, self.shape.context_length, self.shape.head_size)
        self._memory = np.zeros((self.shape.key_values.planes, *size), np.float32)
        self.caches: dict[str, NDArray[np.float32]] = {}  # [slots, heads, context, head size], views of it
        for layer in range(self.shape.layers):
            for place, kind in enumerate(("key", "value")):
                self.caches[f"{layer}.{kind}"] = self._memory[2 * layer + place]
        self._calls: dict[tuple[int, int, int], _BoundCall] = {}
        self._logits = np.empty(slots * KEPT_WIDTH * self.shape.vocabulary, np.float32)  # shared by the kept calls

    @property
    def slots(self) -> int:
        """How many sequences fit."""
        return len(self.lengths)

    @property
    def context_length(self) -> int:
        """Tokens that a slot can hold: one less than the positions there are, for attention's padding."""
        return self.shape.context_length - PADDING

    @property
    def weight_bytes(self) -> int:
        """Size of the model's files."""
        return sum(file.stat().st_size for file in self._path.parent.glob(f"{self._path.name}*"))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes."""
        return FLOAT_BYTES * self.shape.key_values.floats_per_token

    def slot(self, slot: int) -> SlotMemory:
        """Return a slot's keys and values, all layers', as a view."""
        return self._memory[:, slot]

    def resume(self, slot: int, length: int) -> None:
        """Say that the first `length` tokens of a slot have been written to its memory."""
        self.lengths[slot] = length

    def graph(self) -> onnx.ModelProto:
        """Return the decoder's graph as it runs: with explicit lengths, and attention's padding."""
        model = onnx.load(self._path, load_external_data=False)
        if any(value.name == "attention_mask" for value in model.graph.input):
            use_explicit_lengths(model)
        attend_to_one_more(model)
        return model

    def open_session(self, model: onnx.ModelProto) -> Any:
        """Return an ONNX Runtime session of a graph made from this model's, running where this model runs."""
        return onnxruntime.InferenceSession(model.SerializeToString(), self._options, providers=[self._provider])

    def forward(self, first: int, tokens: Tokens, counts: Counts) -> Logits:
        """Feed the slots first, first + 1, ... and return logits [rows, width, vocabulary], valid until the next call.

        `tokens` is int64 [rows, width]; row r adds its first `counts[r]` tokens, and its logits beyond them mean
        nothing. Every slot needs room for `width` more tokens.
        """
        rows, width = tokens.shape
        call = self._calls.get((first, rows, width)) or self._bind(first, rows, width)
        lengths = self.lengths[first : first + rows]
        lengths += counts
        call.tokens[:] = tokens
        np.add(counts, PADDING, out=call.counts)
        np.add(lengths, PADDING - 1, out=call.last_positions)
        call.total[...] = lengths.max() + PADDING
        started = time.perf_counter()
        self._session.run_with_iobinding(call.binding)
        self.ran_s += time.perf_counter() - started
        return call.logits

    def forward_prompts(self, first: int, chunks: Sequence[Sequence[int]]) -> Logits:
        """Feed a chunk of its prompt to a slot, and return the logits [1, 1, vocabulary] after it."""
        [chunk] = chunks
        logits: Logits = self.forward(first, np.array([chunk], np.int64), np.array([len(chunk)], np.int32))
        return logits[:, -1:]

    @property
    def prompts_at_once(self) -> int:
        """How many prompts `forward_prompts` may be given."""
        return 1

    @property
    def longest_chunk(self) -> int:
        """Tokens of prompts that may be fed in one call."""
        return self.context_length

    def widest(self, rows: int) -> int:
        """Return how many tokens each of so many rows may have in one call."""
        return self.context_length

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot; a shorter slot stays as it is."""
        if self.lengths[slot] > length:
            self.lengths[slot] = length

    def move(self, source: int, destination: int) -> None:
        """Copy the sequence in one slot to another, and empty the first."""
        length = int(self.lengths[source])
        for cache in self.caches.values():
            cache[destination, :, :length] = cache[source, :, :length]
        self.lengths[destination], self.lengths[source] = length, 0

    def _bind(self, first: int, rows: int, width: int) -> "_BoundCall":
        size = rows * width * self.shape.vocabulary
        logits = self._logits[:size] if size <= self._logits.size else np.empty(size, np.float32)
        call = _BoundCall(self._session, rows, width, logits.reshape(rows, width, self.shape.vocabulary))
        for name, cache in self.caches.items():
            slots = cache[first : first + rows]
            call.bind_cache(f"past_key_values.{name}", f"present.{name}", slots)
        if width <= KEPT_WIDTH:
            self._calls[first, rows, width] = call
        return call


class _BoundCall:
    """One combination of slots and width, with inputs and outputs at fixed addresses."""

    def __init__(self, session: Any, rows: int, width: int, logits: Logits) -> None:
        self.binding = session.io_binding()
        self.tokens = np.zeros((rows, width), np.int64)
        self.counts = np.zeros(rows, np.int32)
        self.last_positions = np.zeros(rows, np.int32)
        self.total = np.zeros((), np.int32)
        self.logits = logits
        for name, array in (
            ("input_ids", self.tokens),
            ("seqlens_k", self.last_positions),
            ("total_sequence_length", self.total),
            ("query_seqlens", self.counts),
        ):
            self.binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._bind_output("logits", self.logits)

    def bind_cache(self, past: str, present: str, slots: NDArray[np.float32]) -> None:
        """Bind past and present to the same memory, as GroupQueryAttention allows."""
        self.binding.bind_input(past, "cpu", 0, np.float32, slots.shape, slots.ctypes.data)
        self._bind_output(present, slots)

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self.binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def session_options(folder: Path, threads: int, spinning: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options
