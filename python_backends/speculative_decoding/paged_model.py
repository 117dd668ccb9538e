"""A decoder with PagedAttention: keys and values in blocks on the device, and a table of blocks for each sequence."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto

from speculative_decoding.device import Array, OutOfDeviceMemoryError, device_of
from speculative_decoding.execution_provider import CPU, Provider
from speculative_decoding.language_model import Counts, DecoderShape, Tokens, session_options
from speculative_decoding.paged_blocks import SCRATCH, BlockAllocator
from speculative_decoding.paged_logits import PagedLogits
from speculative_decoding.paged_prefixes import PagedPrefixes

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

# CUDA's PagedAttention reads blocks of 256 tokens with FlashAttention. With any other size it gathers each sequence's
# keys and values first: 8 rows of 5 tokens then took 8.3 ms in place of 1.9 (Llama 1.1B, H200, ONNX Runtime 1.31).
BLOCK_TOKENS = 256
# A single token is attended to by another kernel, whose sums are split by how many rows there are. From two on a
# token's logits have the same bits in any batch, width and chunk, so that no row ever has fewer.
LEAST_WIDTH = 2
WIDTHS = (2, 5, 9, 17)  # of captured calls: a wider row costs next to nothing, another captured shape costs memory
KEPT_WIDTH = WIDTHS[-1]  # of a wider row only the last token has logits
ELEMENTS: dict[int, DTypeLike] = {TensorProto.FLOAT16: np.float16, TensorProto.FLOAT: np.float32}


class PagedModel:
    """A decoder and its slots, with what the engine asks of LanguageModel. Slot r has `lengths[r]` tokens.

    Rolling back is lowering a length. Slots can share blocks; who writes to a shared one gets a copy first. A token's
    logits do not depend, to the last bit, on which tokens and rows are fed with it, where matrix products are not split
    (execution_provider sees to that).
    """

    def __init__(
        self,
        folder: Path,
        slots: int,
        threads: int,
        spinning: bool,
        provider: Provider = CPU,
        cached_bytes: int = 0,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        """Load `folder` (scripts.export_model --device cuda) with room for `slots` sequences.

        cached_bytes: memory for prefixes that no slot has. Raises ValueError when the graph is not of the expected
        form, OutOfDeviceMemoryError (a ValueError too) when it does not fit.
        """
        self.shape = DecoderShape.load(folder)
        self.lengths: Counts = np.zeros(slots, np.int32)
        self.ran_s = 0.0  # within ONNX Runtime and waiting for it, so far
        self._path = folder / self.shape.filename
        self._device = device_of(provider)
        self._size = block_tokens
        self._columns = -(-self.shape.context_length // block_tokens)
        graph = onnx.load(self._path, load_external_data=False).graph
        self._element = _element(graph)
        free = self._device.free_bytes()
        if free is not None and free < self.weight_bytes:
            raise OutOfDeviceMemoryError(
                f"{self._path}: {self.weight_bytes} bytes of weights; GPU {self._device.number} has {free} free"
            )
        self._session = self._open(threads, spinning)
        cached = cached_bytes // self.block_bytes
        self._prefixes = PagedPrefixes(block_tokens, cached)
        blocks = 1 + slots * self._columns + cached
        self._allocator = self._prefixes.allocator = BlockAllocator(blocks, self._prefixes.evict)
        self._tables: list[list[int]] = [[] for _ in range(slots)]
        try:
            size = (blocks, block_tokens, self.shape.kv_heads, self.shape.head_size)
            self._memory = self._device.zeros((self.shape.key_values.planes, *size), self._element)
            most = slots * KEPT_WIDTH
            self._logits = self._device.zeros((most, self.shape.vocabulary), self._element)
            self._best = self._device.zeros((most,), np.int32)
        except OutOfDeviceMemoryError as error:
            raise OutOfDeviceMemoryError(
                f"{self._path}: {slots} slots of {self.shape.context_length} tokens and {cached_bytes} bytes of "
                f"prefixes do not fit beside the weights: {error}; lower max_sequences or kv_cache_bytes"
            ) from error
        self._calls: dict[tuple[int, int], _BoundCall] = {}

    @property
    def slots(self) -> int:
        """How many sequences fit."""
        return len(self.lengths)

    @property
    def context_length(self) -> int:
        """Tokens that a slot can hold: one less than the positions there are, for a row's least width."""
        return self.shape.context_length - (LEAST_WIDTH - 1)

    @property
    def weight_bytes(self) -> int:
        """Size of the model's files."""
        return sum(file.stat().st_size for file in self._path.parent.glob(f"{self._path.name}*"))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes."""
        return np.dtype(self._element).itemsize * self.shape.key_values.floats_per_token

    @property
    def block_bytes(self) -> int:
        """Bytes of keys and values of a block."""
        return self._size * self.bytes_per_token

    @property
    def device(self) -> str:
        """Where it runs: cpu or cuda."""
        return self._device.name

    def forward(self, first: int, tokens: Tokens, counts: Counts) -> PagedLogits:
        """Feed the slots first, first + 1, ... and return logits [rows, width, vocabulary], valid until the next call.

        `tokens` is int64 [rows, width]; row r adds its first `counts[r]` tokens, and its logits beyond them mean
        nothing. Every slot needs room for `width` more tokens. Rows wider than KEPT_WIDTH have logits of the last
        token only. Raises MemoryError when there is no block left, and has changed nothing then.
        """
        rows, width = tokens.shape
        lengths = self.lengths[first : first + rows]
        padded_rows, padded_width = self._padded(rows, width, int(lengths.max(initial=0)))
        for slot in range(first, first + rows):
            self._reserve(slot, int(self.lengths[slot]) + padded_width)
        call = self._bind(padded_rows, padded_width)
        table = np.full((padded_rows, self._columns), SCRATCH, np.int32)
        for row in range(rows):
            blocks = self._tables[first + row]
            table[row, : len(blocks)] = blocks
        started = time.perf_counter()
        best = call.run(tokens, lengths, table)
        self.ran_s += time.perf_counter() - started
        lengths += counts
        return PagedLogits(self._device, call.logits, best, call.places[:rows, :width])

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot; a shorter slot stays as it is."""
        if self.lengths[slot] > length:
            self.lengths[slot] = length
        if not length:
            self._allocator.release(self._tables[slot])
            self._tables[slot] = []

    def move(self, source: int, destination: int) -> None:
        """Give the sequence in one slot to another, and empty the first: tables change, memory does not."""
        self.truncate(destination, 0)
        self._tables[destination], self._tables[source] = self._tables[source], []
        self.lengths[destination], self.lengths[source] = self.lengths[source], 0

    def reuse(self, slot: int, tenant: str, prompt: list[int]) -> int:
        """Begin a slot with what is known of a prompt, and return how many tokens that is."""
        self.truncate(slot, 0)
        self._tables[slot], self.lengths[slot] = self._prefixes.match(tenant, prompt)
        return int(self.lengths[slot])

    def keep(self, slot: int, tenant: str, tokens: list[int]) -> None:
        """Keep the committed tokens of a slot, all of which it has, for prompts that begin like this."""
        self._prefixes.insert(tenant, tokens, self._tables[slot])

    def rehearsal(self, rows: int, width: int) -> Callable[[], None]:
        """Return the bare call that serves so many rows and tokens, without what surrounds it, to be timed."""
        call = self._bind(*self._padded(rows, width, 0))
        return call.run_bare

    def check_integrity(self) -> None:
        """Check that every reference to a block is a slot's or a kept prefix's."""
        held = [SCRATCH, *self._prefixes.held(), *(block for table in self._tables for block in table)]
        counts = np.bincount(held, minlength=1 + self.slots * self._columns)
        for block, count in enumerate(counts.tolist()):
            assert self._allocator.references(block) == count, f"block {block} has references that nobody holds"

    def _padded(self, rows: int, width: int, longest: int) -> tuple[int, int]:
        """Return the rows and width of the call that serves so many: one that is captured, if it has room."""
        wide = next((wide for wide in WIDTHS if wide >= width), max(width, LEAST_WIDTH))
        if longest + wide > self.shape.context_length:
            wide = max(width, LEAST_WIDTH)
        return min(1 << (rows - 1).bit_length(), self.slots) if wide <= KEPT_WIDTH else rows, wide

    def _reserve(self, slot: int, length: int) -> None:
        """Have blocks for `length` tokens in a slot, those that will be written its own."""
        table = self._tables[slot]
        for at in range(int(self.lengths[slot]) // self._size, len(table)):
            if self._allocator.is_shared(table[at]):
                own = self._allocator.take()
                self._device.copy(self._memory, table[at], own)
                self._allocator.release([table[at]])
                table[at] = own
        while len(table) * self._size < length:
            table.append(self._allocator.take())

    def _bind(self, rows: int, width: int) -> "_BoundCall":
        if call := self._calls.get((rows, width)):
            return call
        is_kept = width <= KEPT_WIDTH
        graph = len(self._calls) + 1 if is_kept else None
        call = _BoundCall(self, rows, width, graph)
        if is_kept:
            self._calls[rows, width] = call
        return call

    def _open(self, threads: int, spinning: bool) -> Any:
        options = session_options(self._path.parent, threads, spinning)
        return onnxruntime.InferenceSession(str(self._path), options, providers=[self._device.provider])


class _BoundCall:
    """One number of rows and width, with inputs and outputs at fixed addresses."""

    def __init__(self, model: PagedModel, rows: int, width: int, graph: int | None) -> None:
        self._model, device = model, model._device
        self._device = device
        self._options = device.run_options(graph)
        wanted = np.arange(rows * width) if width <= KEPT_WIDTH else np.arange(width - 1, rows * width, width)
        self.places = np.full(rows * width, -1, np.int64)
        self.places[wanted] = np.arange(len(wanted))
        self.places = self.places.reshape(rows, width)
        self.logits, self._best = model._logits[: len(wanted)], model._best[: len(wanted)]
        self._inputs = {
            "input_ids": device.zeros((rows * width,), np.int64),
            "block_table": device.zeros((rows, model._columns), np.int32),
            "past_sequence_lengths": device.zeros((rows,), np.int32),
            "cumulative_sequence_lengths": device.zeros((rows + 1,), np.int32),
            "logits_indices": device.zeros((len(wanted),), np.int32),
        }
        device.upload(self._inputs["cumulative_sequence_lengths"], np.arange(0, rows * width + 1, width, np.int32))
        device.upload(self._inputs["logits_indices"], wanted.astype(np.int32))
        self._bounds = np.array([width, model._columns * model._size, 0], np.int32)
        self._binding = model._session.io_binding()
        for name, array in self._inputs.items():
            self._bind("input", name, array)
        bounds = self._bounds
        self._binding.bind_input("attention_metadata", "cpu", 0, np.int32, bounds.shape, bounds.ctypes.data)
        self._bind("output", "logits", self.logits)
        for layer in range(model.shape.layers):
            for place, kind in enumerate(("key", "value")):
                cache = model._memory[2 * layer + place]
                self._bind("input", f"past_key_values.{layer}.{kind}", cache)
                self._bind("output", f"present.{layer}.{kind}", cache)

    def run(self, tokens: Tokens, lengths: Counts, table: NDArray[np.int32]) -> NDArray[np.int32]:
        """Run on so many rows of tokens, the rest being padding, and return the likeliest next tokens."""
        rows, width = tokens.shape
        padded = np.zeros(self.places.shape, np.int64)
        padded[:rows, :width] = tokens
        past = np.zeros(len(padded), np.int32)
        past[:rows] = lengths
        self._device.upload(self._inputs["input_ids"], padded.reshape(-1))
        self._device.upload(self._inputs["past_sequence_lengths"], past)
        self._device.upload(self._inputs["block_table"], table)
        self._model._session.run_with_iobinding(self._binding, self._options)
        self._device.argmax(self.logits, self._best)
        return self._device.download(self._best).astype(np.int32)

    def run_bare(self) -> None:
        """Run on what the inputs hold, and wait."""
        self._model._session.run_with_iobinding(self._binding, self._options)
        self._device.synchronize()

    def _bind(self, kind: str, name: str, array: Array) -> None:
        bind = self._binding.bind_input if kind == "input" else self._binding.bind_output
        place = self._device.name, self._device.number
        bind(name, *place, array.dtype.type, array.shape, self._device.address(array))


def _element(graph: onnx.GraphProto) -> DTypeLike:
    inputs = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    missing = {"block_table", "logits_indices", "attention_metadata"} - inputs.keys()
    if missing:
        raise ValueError(
            f"the model has no input {sorted(missing)[0]}: export it with scripts.export_model --device cuda"
        )
    cache = inputs["past_key_values.0.key"]
    if cache not in ELEMENTS:
        raise ValueError(f"keys and values are of ONNX element type {cache}; it must be float16: export with fp16")
    return ELEMENTS[cache]
