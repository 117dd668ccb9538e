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

from speculative_decoding.adjustments import ENTRY, PLACE
from speculative_decoding.cuda_device import device_of
from speculative_decoding.device import OutOfDeviceMemoryError
from speculative_decoding.execution_provider import CPU, Provider
from speculative_decoding.host_tier import HostTier
from speculative_decoding.language_model import Counts, DecoderShape, Tokens, session_options
from speculative_decoding.options import MAX_BIASES, MAX_SPECULATION_LENGTH, MAX_STOPS
from speculative_decoding.paged_blocks import SCRATCH, BlockAllocator
from speculative_decoding.paged_call import KEPT_WIDTH, PagedCall, Results
from speculative_decoding.paged_logits import PagedLogits
from speculative_decoding.paged_prefixes import PagedPrefixes
from speculative_decoding.sampling import WISH

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

# CUDA's PagedAttention reads blocks of 256 tokens with FlashAttention. With any other size it gathers each sequence's
# keys and values first: 8 rows of 5 tokens then took 8.3 ms in place of 1.9 (Llama 1.1B, H200, ONNX Runtime 1.31).
BLOCK_TOKENS = 256
# A single token is attended to by another kernel, whose sums are split by how many rows there are. From two on a
# token's logits have the same bits in any batch, width and chunk, so that no row ever has fewer.
LEAST_WIDTH = 2
WIDTHS = (2, 5, 9, KEPT_WIDTH)  # of captured calls: a wider row costs next to nothing, one more shape costs memory
CHUNKS = (32, 64, 128, 256, 512)  # of prompts, one row: ONNX Runtime takes 20 ms and more for a shape it has not seen
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
        tier_bytes: int = 0,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        """Load `folder` (scripts.export_model --device cuda) with room for `slots` sequences.

        cached_bytes: memory for prefixes that no slot has; tier_bytes: the host's, for those pushed out of it.
        Raises ValueError when the graph is not of the expected form, OutOfDeviceMemoryError (a ValueError too) when it
        does not fit.
        """
        self.shape = DecoderShape.load(folder)
        self.lengths: Counts = np.zeros(slots, np.int32)
        self.most_tokens = 1 << 30  # of one call, so that no logits depend on what else is in it: paged_independence
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
        blocks = 1 + slots * self._columns + cached
        self._tables: list[list[int]] = [[] for _ in range(slots)]
        try:
            size = (blocks, block_tokens, self.shape.kv_heads, self.shape.head_size)
            self._memory = self._device.zeros((self.shape.key_values.planes, *size), self._element)
            in_tier = tier_bytes // self.block_bytes if cached else 0
            tier = HostTier(self._device, self._memory, in_tier) if in_tier else None
            most, longest = slots * KEPT_WIDTH, MAX_SPECULATION_LENGTH
            wishes = max(most, longest * slots * LEAST_WIDTH) * WISH.itemsize
            self._results = Results(
                self._device.zeros((most, self.shape.vocabulary), self._element),
                self._device.zeros((most,), np.int32),
                self._device.zeros((wishes,), np.uint8),
                self._device.zeros((longest, slots), np.int32),
                self._device.zeros((slots * self._most_entries * ENTRY.itemsize,), np.uint8),
                self._device.zeros((most * PLACE.itemsize,), np.uint8),
                self._device.zeros((slots, self.shape.vocabulary), np.float32),
            )
        except OutOfDeviceMemoryError as error:
            raise OutOfDeviceMemoryError(
                f"{self._path}: {slots} slots of {self.shape.context_length} tokens and {cached_bytes} bytes of "
                f"prefixes ({tier_bytes} on the host) do not fit: {error}; lower max_sequences, kv_cache_bytes or "
                "kv_tier_bytes"
            ) from error
        self.prefixes = PagedPrefixes(block_tokens, cached, self.block_bytes, tier)
        self._allocator = self.prefixes.allocator = BlockAllocator(blocks, self.prefixes.evict)
        self._calls: dict[tuple[int, int], PagedCall] = {}

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
    def _most_entries(self) -> int:
        """How many tokens of a sequence can be adjusted: its own, and those that a request and the model name."""
        return self.shape.context_length + MAX_BIASES + MAX_STOPS + len(self.shape.end_tokens)

    @property
    def device(self) -> str:
        """Where it runs: cpu or cuda."""
        return self._device.name

    def forward(self, first: int, tokens: Tokens, counts: Counts) -> PagedLogits:
        """Feed the slots first, first + 1, ... and return logits [rows, width, vocabulary], valid until the next call.

        `tokens` is int64 [rows, width]; row r adds its first `counts[r]` tokens, and its logits beyond them mean
        nothing. Every slot needs room for `width` more tokens. Rows wider than KEPT_WIDTH have logits of the last
        token fed only. Raises MemoryError when there is no block left, and has changed nothing then.
        """
        rows, width = tokens.shape
        call = self._start(first, tokens, counts, width)
        self.lengths[first : first + rows] += counts
        return PagedLogits(self._device, call, call.places(counts, width), self._waited)

    def follow(self, tokens: Tokens, counts: Counts, steps: int, wishes: NDArray[np.void] | None) -> Tokens:
        """Feed row r its first counts[r] of `tokens` [rows, 1 or 2], and return what follows, int64 [rows, steps].

        wishes: WISH [steps, rows], how each step's token is chosen; None for the likeliest. What is chosen is fed by
        the device to itself. A slot then holds all but the last of what follows; one that was fed nothing stays as
        it is. Every slot needs room for `width` + `steps` more tokens.
        """
        rows, width = tokens.shape
        call = self._start(0, tokens, counts, width + steps)
        if wishes is not None:
            every = np.zeros((steps, call.rows), WISH)
            every[:, :rows] = wishes
            wishes = every
        started = time.perf_counter()
        followed = call.follow(steps, wishes)
        self._waited(time.perf_counter() - started)
        self.lengths[:rows] += np.where(counts > 0, counts + steps - 1, 0).astype(np.int32)
        return followed[:, :rows].T.astype(np.int64)

    def widest(self, rows: int) -> int:
        """Return how many tokens each of so many rows may have in one call."""
        known = (*WIDTHS, *CHUNKS) if rows == 1 else WIDTHS
        padded = min(1 << (rows - 1).bit_length(), self.slots)
        return max((width for width in known if padded * width <= self.most_tokens), default=LEAST_WIDTH)

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
        self._tables[slot], self.lengths[slot] = self.prefixes.match(tenant, prompt)
        return int(self.lengths[slot])

    def keep(self, slot: int, tenant: str, tokens: list[int]) -> None:
        """Keep the committed tokens of a slot, all of which it has, for prompts that begin like this."""
        self.prefixes.insert(tenant, tokens, self._tables[slot])

    def rehearsal(self, rows: int, width: int) -> Callable[[], None]:
        """Return the bare call that serves so many rows and tokens, without what surrounds it, to be timed."""
        call = self._bind(*self._padded(rows, width, 0))

        def run() -> None:
            call.run()
            self._device.synchronize()

        return run

    def check_integrity(self) -> None:
        """Check that every reference to a block is a slot's or a kept prefix's."""
        held = [SCRATCH, *self.prefixes.held(), *(block for table in self._tables for block in table)]
        counts = np.bincount(held, minlength=1 + self.slots * self._columns)
        for block, count in enumerate(counts.tolist()):
            assert self._allocator.references(block) == count, f"block {block} has references that nobody holds"

    def _padded(self, rows: int, width: int, longest: int) -> tuple[int, int]:
        """Return the rows and width of the call that serves so many: one that is captured, if it has room."""
        known = (*WIDTHS, *CHUNKS) if rows == 1 else WIDTHS
        wide = next((wide for wide in known if wide >= width), width)
        if longest + wide > self.shape.context_length:
            wide = max(width, LEAST_WIDTH)
        return min(1 << (rows - 1).bit_length(), self.slots) if wide <= KEPT_WIDTH else rows, wide

    def _start(self, first: int, tokens: Tokens, counts: Counts, room: int) -> PagedCall:
        """Queue a call on the slots first, first + 1, ..., each with room for so many more tokens, and return it."""
        rows, width = tokens.shape
        lengths = self.lengths[first : first + rows]
        padded_rows, padded_width = self._padded(rows, width, int(lengths.max(initial=0)))
        room = max(room, padded_width)
        for slot, length in enumerate(lengths.tolist(), first):
            self._reserve(slot, length, length + room)
        call = self._bind(padded_rows, padded_width)
        started = time.perf_counter()
        call.start(tokens, lengths, counts, self._tables[first : first + rows])
        self._waited(time.perf_counter() - started)
        return call

    def _waited(self, seconds: float) -> None:
        self.ran_s += seconds

    def _reserve(self, slot: int, begin: int, end: int) -> None:
        """Have blocks for `end` tokens in a slot, those that will be written, from `begin` on, its own."""
        table = self._tables[slot]
        for at in range(begin // self._size, len(table)):
            if self._allocator.is_shared(table[at]):
                own = self._allocator.take()
                self._device.copy(self._memory, table[at], own)
                self._allocator.release([table[at]])
                table[at] = own
        while len(table) * self._size < end:
            table.append(self._allocator.take())

    def _bind(self, rows: int, width: int) -> PagedCall:
        if call := self._calls.get((rows, width)):
            return call
        is_kept = width in WIDTHS or (rows == 1 and width in CHUNKS)
        caches = {
            f"{layer}.{kind}": self._memory[2 * layer + place]
            for layer in range(self.shape.layers)
            for place, kind in enumerate(("key", "value"))
        }
        call = PagedCall(
            self._device,
            self._session,
            caches,
            self._results,
            (rows, width, self._columns),
            self._size,
            len(self._calls) + 1 if is_kept else None,
        )
        if is_kept:
            self._calls[rows, width] = call
        return call

    def _open(self, threads: int, spinning: bool) -> Any:
        options = session_options(self._path.parent, threads, spinning)
        return onnxruntime.InferenceSession(str(self._path), options, providers=[self._device.provider])


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
