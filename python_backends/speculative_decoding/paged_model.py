"""A decoder with PagedAttention: keys and values in blocks on the device, and a table of blocks for each sequence."""

import os
import time
from collections.abc import Callable, Sequence
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
from speculative_decoding.followed import Followed
from speculative_decoding.host_tier import HostTier
from speculative_decoding.language_model import Counts, DecoderShape, Tokens, session_options
from speculative_decoding.options import MAX_BIASES, MAX_SPECULATION_LENGTH, MAX_STOPS
from speculative_decoding.paged_blocks import SCRATCH, BlockAllocator
from speculative_decoding.paged_call import (
    KEPT_WIDTH,
    LEAST_WIDTH,
    PROMPTS,
    CallShape,
    Chunk,
    PagedCall,
    Results,
)
from speculative_decoding.paged_logits import PagedLogits
from speculative_decoding.paged_prefixes import PagedPrefixes
from speculative_decoding.sampling import WISH

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

# CUDA's PagedAttention reads blocks of 256 tokens with FlashAttention. With any other size it gathers each sequence's
# keys and values first: 8 rows of 5 tokens then took 8.3 ms in place of 1.9 (Llama 1.1B, H200, ONNX Runtime 1.31).
BLOCK_TOKENS = 256
# Of captured calls: a wider row costs next to nothing, one more shape costs memory. With powers of two the rows fill a
# call up to most_tokens, 256 for 0.28B on an H100: 64 rows of 4, 32 of 8.
WIDTHS = (2, 4, 8, KEPT_WIDTH)
FOLLOWED_WIDTH = WIDTHS[1]  # tokens that a row may be fed before what follows them is drafted
CHUNKS = (32, 64, 128, 256, 512)  # of prompts alone: ONNX Runtime takes 20 ms and more for a shape it has not seen
MIXED_WIDTHS, MIXED_CHUNKS = (2, 4, 8), (64, 128, 256)  # of calls that have both rows and prompts
NO_ROWS = np.zeros((0, 0), np.int64), np.zeros(0, np.int32)
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
            most, longest = slots * KEPT_WIDTH + PROMPTS, MAX_SPECULATION_LENGTH
            wishes = max(most, longest * slots * FOLLOWED_WIDTH) * WISH.itemsize
            self._results = Results(
                self._device.zeros((most, self.shape.vocabulary), self._element),
                self._device.zeros((2 * most,), np.int32),
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
        self._calls: dict[CallShape, PagedCall] = {}

    @property
    def slots(self) -> int:
        """How many sequences fit."""
        return len(self.lengths)

    @property
    def context_length(self) -> int:
        """Tokens that a slot can hold: fewer than the positions there are, for a row may be as wide at its end."""
        return self.shape.context_length - (FOLLOWED_WIDTH - 1)

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

    def forward(self, first: int, tokens: Tokens, counts: Counts, drafts: Followed | None = None) -> PagedLogits:
        """Feed the slots first, first + 1, ... and return logits [rows, width, vocabulary], valid until the next call.

        `tokens` is int64 [rows, width]; row r adds its first `counts[r]` tokens, and its logits beyond them mean
        nothing. Every slot needs room for `width` more tokens. One row may be wider than KEPT_WIDTH; only its last
        token then has logits. Those of `drafts` that stand as ON_DEVICE are not waited for. Raises MemoryError when
        there is no block left, and has changed nothing then.
        """
        rows, width = tokens.shape
        if width > KEPT_WIDTH:
            [fed], [count] = tokens.tolist(), counts.tolist()
            return self.forward_prompts(first, [fed[:count]]).alone_in_row(width, count - 1)
        call = self._start(first, tokens, counts, width, drafts)
        self.lengths[first : first + rows] += counts
        return self._rows_of(call, rows, width)

    def forward_prompts(self, first: int, chunks: Sequence[Sequence[int]]) -> PagedLogits:
        """Feed a chunk of its prompt to each of the slots first, first + 1, ...: PROMPTS at most, in one call.

        Returns the logits [chunks, 1, vocabulary] after each chunk, valid until the next call. Raises MemoryError as
        `forward` does.
        """
        if len(chunks) == 1 and len(chunks[0]) <= KEPT_WIDTH:
            logits = self.forward(first, np.array(chunks), np.array([len(chunks[0])], np.int32))
            return logits.last()
        size = sum(max(len(chunk), LEAST_WIDTH) for chunk in chunks)
        shape = CallShape(0, 0, next((known for known in self.chunks if known >= size), size))
        return self._prompts_of(self._start_mixed(shape, NO_ROWS, first, chunks), chunks)

    def mixes(self, rows: int, width: int, chunks: Sequence[Sequence[int]]) -> bool:
        """Return whether `forward_mixed` can be called with such rows, in the first slots, and such chunks."""
        return self._mixed(rows, width, chunks) is not None

    def forward_mixed(
        self, tokens: Tokens, counts: Counts, chunks: Sequence[Sequence[int]], drafts: Followed | None = None
    ) -> tuple[PagedLogits, PagedLogits]:
        """Do in one call what `forward` does with the first slots and `forward_prompts` with those after them.

        Returns the logits of both, valid until the next call. Raises MemoryError as they do.
        """
        rows, width = tokens.shape
        shape = self._mixed(rows, width, chunks)
        assert shape
        call = self._start_mixed(shape, (tokens, counts), rows, chunks, drafts)
        self.lengths[:rows] += counts
        return self._rows_of(call, rows, width), self._prompts_of(call, chunks)

    def follow(self, tokens: Tokens, counts: Counts, steps: int, wishes: NDArray[np.void] | None) -> Followed:
        """Feed row r its first counts[r] of `tokens`, and return what follows them, [rows, steps].

        `tokens` is int64 [rows, FOLLOWED_WIDTH at most]. wishes: WISH [steps, rows], how each step's token is chosen;
        None for the likeliest. What is chosen is fed by the device to itself, and the host waits for none of it. A slot
        then holds all but the last of what follows; one that was fed nothing stays as it is. Every slot needs room for
        `width` + `steps` more tokens.
        """
        rows, width = tokens.shape
        began, began_at = self._device.mark(), time.perf_counter()
        call = self._start(0, tokens, counts, width + steps)
        if wishes is not None:
            every = np.zeros((steps, call.shape.rows), WISH)
            every[:, :rows] = wishes
            wishes = every
        started = time.perf_counter()
        proposals = call.follow(steps, wishes)
        self._waited(time.perf_counter() - started)
        followed = Followed(self._device, began, began_at, proposals, rows, self._waited)
        self.lengths[:rows] += np.where(counts > 0, counts + steps - 1, 0).astype(np.int32)
        return followed

    def widest(self, rows: int) -> int:
        """Return how many tokens each of so many rows may have in one call."""
        padded = self._captured_rows(rows)
        return max((width for width in WIDTHS if padded * width <= self.most_tokens), default=LEAST_WIDTH)

    def call_shape(self, rows: int, width: int, longest: int = 0) -> CallShape:
        """Return the call that serves so many: one that is captured, if the longest of the rows has room for it."""
        wide = next(wide for wide in WIDTHS if wide >= width)
        if longest + wide > self.shape.context_length:
            wide = max(width, LEAST_WIDTH)
        return CallShape(self._captured_rows(rows), wide)

    @property
    def row_counts(self) -> list[int]:
        """Rows that captured calls have."""
        return sorted({self._captured_rows(rows) for rows in range(1, self.slots + 1)})

    @property
    def chunks(self) -> list[int]:
        """Tokens of prompts that captured calls have: those for which a slot has room, for all may be padding."""
        return [chunk for chunk in CHUNKS if chunk + KEPT_WIDTH <= self.context_length]

    @property
    def longest_chunk(self) -> int:
        """Tokens of prompts that may be fed in one call."""
        return max((chunk for chunk in self.chunks if chunk <= self.most_tokens), default=self.widest(1))

    @property
    def prompts_at_once(self) -> int:
        """How many prompts `forward_prompts` may be given."""
        return PROMPTS if self.longest_chunk > KEPT_WIDTH else 1

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
        call = self._bind(self.call_shape(rows, width))

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

    def _captured_rows(self, rows: int) -> int:
        return min(1 << (rows - 1).bit_length(), self.slots)

    def _mixed(self, rows: int, width: int, chunks: Sequence[Sequence[int]]) -> CallShape | None:
        """Return the call that serves so many, if one is captured and has room."""
        size = sum(max(len(chunk), LEAST_WIDTH) for chunk in chunks)
        wide = next((wide for wide in MIXED_WIDTHS if wide >= width), None)
        chunk = next((known for known in self.chunks if known in MIXED_CHUNKS and known >= size), None)
        if wide is None or chunk is None or int(self.lengths[:rows].max()) + wide > self.shape.context_length:
            return None
        shape = CallShape(self._captured_rows(rows), wide, chunk)
        return shape if shape.tokens <= self.most_tokens else None

    def _start(
        self, first: int, tokens: Tokens, counts: Counts, room: int, drafts: Followed | None = None
    ) -> PagedCall:
        """Queue a call on the slots first, first + 1, ..., each with room for so many more tokens, and return it."""
        rows, width = tokens.shape
        lengths = self.lengths[first : first + rows]
        shape = self.call_shape(rows, width, int(lengths.max(initial=0)))
        room = max(room, shape.width)
        for slot, length in enumerate(lengths.tolist(), first):
            self._reserve(slot, length, length + room)
        call = self._bind(shape)
        started = time.perf_counter()
        call.start(tokens, lengths, counts, self._tables[first : first + rows], drafts=drafts)
        self._waited(time.perf_counter() - started)
        return call

    def _start_mixed(
        self,
        shape: CallShape,
        fed: tuple[Tokens, Counts],
        first: int,
        chunks: Sequence[Sequence[int]],
        drafts: Followed | None = None,
    ) -> PagedCall:
        """Queue a call on rows in the first slots and chunks in the slots first, first + 1, ..., and return it."""
        tokens, counts = fed
        rows = len(tokens)
        for slot, length in enumerate(self.lengths[:rows].tolist()):
            self._reserve(slot, length, length + shape.width)
        given = []
        for slot, chunk in enumerate(chunks, first):
            length = int(self.lengths[slot])
            self._reserve(slot, length, length + max(len(chunk), LEAST_WIDTH))
            given.append(Chunk(chunk, length, self._tables[slot]))
        call = self._bind(shape)
        started = time.perf_counter()
        call.start(tokens, self.lengths[:rows], counts, self._tables[:rows], given, drafts)
        self._waited(time.perf_counter() - started)
        self.lengths[first : first + len(chunks)] += [len(chunk) for chunk in chunks]
        return call

    def _rows_of(self, call: PagedCall, rows: int, width: int) -> PagedLogits:
        """Return the logits of so many rows of a call."""
        shape = call.shape
        places = np.arange(shape.rows * shape.width).reshape(shape.rows, shape.width)[:rows, :width]
        return PagedLogits(self._device, call, places, self._waited)

    def _prompts_of(self, call: PagedCall, chunks: Sequence[Sequence[int]]) -> PagedLogits:
        """Return the logits after the chunks of a call."""
        places = call.shape.rows * call.shape.width + np.arange(len(chunks))[:, None]
        return PagedLogits(self._device, call, places, self._waited)

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

    def _bind(self, shape: CallShape) -> PagedCall:
        if call := self._calls.get(shape):
            return call
        rows = shape._replace(chunk=0)
        is_kept = shape.chunk in (0, *CHUNKS) and (not shape.rows or rows == self.call_shape(shape.rows, shape.width))
        caches = {
            f"{layer}.{kind}": self._memory[2 * layer + place]
            for layer in range(self.shape.layers)
            for place, kind in enumerate(("key", "value"))
        }
        graph = len(self._calls) + 1 if is_kept else None
        given = self._device, self._session, caches, self._results
        call = PagedCall(*given, shape, self._columns, self._size, graph)
        if is_kept:
            self._calls[shape] = call
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
