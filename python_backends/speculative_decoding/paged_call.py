"""One shape of a paged model's call, with inputs and outputs at fixed addresses."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from speculative_decoding.adjustments import PLACE, Adjustments
from speculative_decoding.device import Array, Device
from speculative_decoding.followed import Followed
from speculative_decoding.language_model import Counts, Tokens
from speculative_decoding.sampling import WISH

KEPT_WIDTH = 17  # tokens of a row, at most
# A single token is attended to by another kernel, whose sums are split by how many rows there are. From two on a
# token's logits have the same bits in any batch, width and chunk, so that no row or chunk ever has fewer.
LEAST_WIDTH = 2
PROMPTS = 8  # whose chunks one call can have


class CallShape(NamedTuple):
    """rows: of `width` tokens each, all of which have logits. chunk: tokens of prompts together, whose last have."""

    rows: int
    width: int
    chunk: int = 0

    @property
    def sequences(self) -> int:
        """Rows, prompts, and what takes the tokens that no prompt has."""
        return self.rows + (PROMPTS + 1 if self.chunk else 0)

    @property
    def tokens(self) -> int:
        """Tokens fed, padding included."""
        return self.rows * self.width + self.chunk

    @property
    def logits(self) -> int:
        """How many tokens have logits, a prompt's last among them."""
        return self.rows * self.width + (PROMPTS if self.chunk else 0)


class Chunk(NamedTuple):
    """Tokens of a prompt, how many its slot has already, and the slot's blocks."""

    tokens: Sequence[int]
    past: int
    table: list[int]


class Results(NamedTuple):
    """A model's buffers for what its calls give: logits, tokens chosen of them and how, and drafts, a row a step.

    chosen: two for each of the logits, a token and how many drafts stand. wishes, entries, places: bytes of WISH, ENTRY
    and PLACE. adjusted: float32 of some rows of logits.
    """

    logits: Array
    chosen: Array
    wishes: Array
    proposals: Array
    entries: Array
    places: Array
    adjusted: Array


class PagedCall:
    """Feeds rows of tokens and chunks of prompts, and chooses of their logits."""

    def __init__(
        self,
        device: Device,
        session: Any,
        caches: Mapping[str, Array],
        results: Results,
        shape: CallShape,
        columns: int,
        block_tokens: int,
        graph: int | None,
    ) -> None:
        """`caches`: blocks by layer and kind. `columns`: blocks of a sequence, at most. `graph`: see Device."""
        self._device, self._session = device, session
        self._options = device.run_options(graph)
        self.shape = shape
        self.logits, self._decided = results.logits[: shape.logits], results.chosen[: 2 * shape.logits]
        self._chosen, self._standing = self._decided[: shape.logits], self._decided[shape.logits :]
        self._wishes, self._proposals = results.wishes, results.proposals[:, : shape.rows]
        self._results = results
        sequences = shape.sequences
        sizes = {
            "tokens": 8 * shape.tokens,
            "past": 4 * sequences,
            "counts": 4 * shape.rows,
            "indices": 4 * shape.logits,
            "bounds": 4 * (sequences + 1),
            "table": 4 * sequences * columns,
        }
        self._staged = np.zeros(sum(sizes.values()), np.uint8)  # all that changes goes up in one copy
        self._inputs = device.zeros(self._staged.shape, np.uint8)
        self._host, self._fed = (_parts(buffer, sizes) for buffer in (self._staged, self._inputs))
        in_rows = shape.rows * shape.width
        self._in_rows = self._fed["tokens"][:in_rows]
        self._host["indices"][:in_rows] = np.arange(in_rows)
        self._host["bounds"][: shape.rows + 1] = shape.width * np.arange(shape.rows + 1)
        inputs = {
            "input_ids": self._fed["tokens"],
            "past_sequence_lengths": self._fed["past"],
            "logits_indices": self._fed["indices"],
            "block_table": self._fed["table"].reshape(sequences, columns),
            "cumulative_sequence_lengths": self._fed["bounds"],
        }
        self._limits = np.array([max(shape.width, shape.chunk), columns * block_tokens, 0], np.int32)
        self._binding = session.io_binding()
        for name, array in inputs.items():
            self._bind("input", name, array)
        limits = self._limits
        self._binding.bind_input("attention_metadata", "cpu", 0, np.int32, limits.shape, limits.ctypes.data)
        self._bind("output", "logits", self.logits)
        for name, cache in caches.items():
            self._bind("input", f"past_key_values.{name}", cache)
            self._bind("output", f"present.{name}", cache)

    def start(
        self,
        tokens: Tokens,
        past: Counts,
        counts: Counts,
        tables: list[list[int]],
        chunks: Sequence[Chunk] = (),
        drafts: Followed | None = None,
    ) -> None:
        """Queue the call on so many rows of tokens and so many chunks, the rest being padding.

        drafts: what those of the tokens are that are ON_DEVICE; they come after each row's first.
        """
        rows, width = tokens.shape
        host, shape = self._host, self.shape
        for name in ("tokens", "past", "counts", "table"):
            host[name][:] = 0
        in_rows = shape.rows * shape.width
        host["tokens"][:in_rows].reshape(shape.rows, shape.width)[:rows, :width] = tokens
        host["past"][:rows] = past
        host["counts"][:rows] = counts
        table = host["table"].reshape(shape.sequences, -1)
        for row, blocks in enumerate(tables):
            table[row, : len(blocks)] = blocks
        begin = in_rows
        for number, chunk in enumerate(chunks):
            size, row = len(chunk.tokens), shape.rows + number
            host["tokens"][begin : begin + size] = chunk.tokens
            host["past"][row] = chunk.past
            table[row, : len(chunk.table)] = chunk.table
            host["indices"][in_rows + number] = begin + size - 1
            begin += max(size, LEAST_WIDTH)
            host["bounds"][row + 1] = begin
        if shape.chunk:
            assert begin <= shape.tokens
            host["bounds"][shape.rows + len(chunks) + 1 : -1] = begin
            host["bounds"][-1] = shape.tokens
        self._device.upload(self._inputs, self._staged)
        if drafts:
            self._device.wait_for(drafts.ended)
            self._device.complete(self._in_rows, shape.width, drafts.proposals)
        self.run()

    def run(self) -> None:
        """Queue the call on what the inputs hold."""
        self._session.run_with_iobinding(self._binding, self._options)

    def choose(self, wishes: NDArray[np.void] | None, adjustments: Adjustments | None = None) -> NDArray[np.int32]:
        """Return the tokens chosen of all logits, as `wishes` WISH [logits] says; the likeliest without.

        adjustments: what is done to the logits before, with places [logits]; only with wishes. Returns int32
        [2, logits]: the tokens, and, where a row begins, how many of the tokens fed after its first were chosen.
        """
        if wishes is not None:
            self._device.upload(self._wishes[: wishes.nbytes], wishes.view(np.uint8))
        if adjustments is not None:
            self._choose_adjusted(adjustments)
        else:
            self._choose(0 if wishes is not None else None)
        self._device.accept(self._chosen, self._in_rows, self._fed["counts"], self._standing)
        return self._device.download(self._decided).reshape(2, -1)

    def follow(self, steps: int, wishes: NDArray[np.void] | None) -> Array:
        """Queue what follows the tokens that a row was started with, int32 [steps, rows], each fed in its turn.

        wishes: WISH [steps, rows], None for the likeliest. What is returned stays as it is until the next time.
        """
        if wishes is not None:
            each = np.repeat(wishes, self.shape.width, axis=1)
            self._device.upload(self._wishes[: each.nbytes], each.reshape(-1).view(np.uint8))
        fed = self._fed
        for step in range(steps):
            if step:
                self.run()
            self._choose(step if wishes is not None else None)
            self._device.advance(self._chosen, fed["tokens"], fed["past"], fed["counts"], self._proposals[step])
        return self._proposals[:steps]

    def _choose(self, step: int | None) -> None:
        """Queue the choice of all logits by the wishes of a step; None for the likeliest."""
        if step is None:
            self._device.argmax(self.logits, self._chosen)
            return
        size = len(self._chosen) * WISH.itemsize
        self._device.choose(self.logits, self._wishes[step * size : (step + 1) * size], self._chosen)

    def _choose_adjusted(self, adjustments: Adjustments) -> None:
        """Queue the choice of all logits, adjusted in float32, some rows at a time."""
        entries, places, adjusted = self._results.entries, self._results.places, self._results.adjusted
        for there, values in ((entries, adjustments.entries), (places, adjustments.places)):
            self._device.upload(there[: values.nbytes], values.view(np.uint8))
        for begin in range(0, len(self.logits), len(adjusted)):
            end = min(begin + len(adjusted), len(self.logits))
            some = adjusted[: end - begin]
            at, wishes = (slice(begin * dtype.itemsize, end * dtype.itemsize) for dtype in (PLACE, WISH))
            self._device.adjust(self.logits[begin:end], entries, places[at], some)
            self._device.choose(some, self._wishes[wishes], self._chosen[begin:end])

    def _bind(self, kind: str, name: str, array: Array) -> None:
        bind = self._binding.bind_input if kind == "input" else self._binding.bind_output
        place = self._device.name, self._device.number
        bind(name, *place, array.dtype.type, array.shape, self._device.address(array))


def _parts(buffer: Array, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Return the named parts of a buffer of bytes, tokens as int64 and the rest as int32."""
    parts, begin = {}, 0
    for name, size in sizes.items():
        part = buffer[begin : begin + size]
        parts[name] = part.view(np.int64 if name == "tokens" else np.int32)
        begin += size
    return parts
