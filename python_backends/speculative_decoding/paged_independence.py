"""How many tokens a GPU may be fed at once before a token's logits depend on what is fed with it.

Its kernels differ by how many rows a matrix product has. Those of few rows keep a row's bits; with more, a row at the
end may be summed in another order, and a near tie be decided otherwise.
"""

from collections.abc import Iterator
from itertools import groupby, product

import numpy as np
from numpy.typing import NDArray

from speculative_decoding.paged_call import KEPT_WIDTH, LEAST_WIDTH, PROMPTS, CallShape
from speculative_decoding.paged_logits import PagedLogits
from speculative_decoding.paged_model import CHUNKS, MIXED_CHUNKS, MIXED_WIDTHS, WIDTHS, PagedModel

PAST = 12  # tokens in a slot before the comparison
# Products are computed in tiles of so many rows, or a multiple. In the tile where bits begin to differ a few rows may
# agree by accident: 264 tokens passed and 265 did not (H100, random weights), and of 1,000 real answers one differed.
TILE = 64
PIECE = KEPT_WIDTH - 1  # tokens of a prompt fed at once, to compare with


def limit_tokens(model: PagedModel) -> bool:
    """Have a model feed no more tokens in one call than keep their bits; return whether all slots can decode so.

    Every shape of a call that is used is compared with tokens fed one by one and prompts in small pieces, all slots and
    several prompts of it. All slots are empty before and after.
    """
    try:
        model.most_tokens = _most_tokens(model)
    finally:
        for slot in range(model.slots):
            model.truncate(slot, 0)
    return model.most_tokens >= LEAST_WIDTH * model.slots


def _most_tokens(model: PagedModel) -> int:
    reference = _Reference(model)
    good = 0
    for size, shapes in groupby(sorted(_shapes(model), key=_tokens), key=_tokens):
        if not all(reference.agrees(shape) for shape in shapes):
            return good if size <= TILE else min(good, (size - 1) // TILE * TILE)
        good = size
    return good


def _shapes(model: PagedModel) -> Iterator[CallShape]:
    """Yield the shapes of the calls that a model is fed with."""
    yield from (CallShape(rows, width) for rows, width in product(model.row_counts, WIDTHS))
    for chunk in model.chunks:
        yield CallShape(0, 0, chunk)
        if chunk in MIXED_CHUNKS and model.slots > 1:
            yield from (CallShape(rows, width, chunk) for rows, width in product(model.row_counts, MIXED_WIDTHS))


def _tokens(shape: CallShape) -> int:
    return shape.tokens


class _Reference:
    """What a model gives for tokens fed one by one, and for prompts fed in small pieces."""

    def __init__(self, model: PagedModel) -> None:
        rng, vocabulary = np.random.default_rng(0), model.shape.vocabulary
        self._model = model
        self._prompts = rng.integers(0, vocabulary, (model.slots, PAST)).tolist()
        self._tokens = rng.integers(0, vocabulary, (model.slots, KEPT_WIDTH))
        self._text = rng.integers(0, vocabulary, max(CHUNKS)).tolist()
        self._in_pieces: dict[int, list[int]] = {}
        for slot in range(model.slots):
            self._begin(slot)
        self._alone = [
            [digest for token in row for digest in _feed(model, slot, [token])]
            for slot, row in enumerate(self._tokens.tolist())
        ]

    def agrees(self, shape: CallShape) -> bool:
        """Return whether calls of this shape give the same bits: all rows, and all prompts that there can be."""
        if not shape.chunk:
            return self._agrees(shape.rows, shape.width, [])
        slots = self._model.slots
        return all(
            self._agrees(min(shape.rows, slots - prompts), shape.width, self._sizes(shape.chunk, prompts))
            for prompts in {1, min(PROMPTS, slots)}
            if min(shape.rows, slots - prompts) > 0 or not shape.rows
        )

    def _agrees(self, rows: int, width: int, sizes: list[int]) -> bool:
        """Return whether a call with so many rows, and with chunks of these sizes, gives the same bits."""
        chunks = [self._text[:size] for size in sizes]
        expected = [self._of_prompt(size) for size in sizes]
        self._model.lengths[:rows] = PAST
        for slot in range(rows, rows + len(chunks)):
            self._model.truncate(slot, 0)
        of_rows, of_chunks = self._call(self._tokens[:rows, :width], chunks)
        same = of_rows == [digest for row in self._alone[:rows] for digest in row[:width]]
        for slot, digest in enumerate(of_chunks, rows):
            found = [digest, *_feed(self._model, slot, self._text[:LEAST_WIDTH])]
            same = same and found == expected[slot - rows]
            self._begin(slot)
        return same

    def _call(self, tokens: NDArray[np.int64], chunks: list[list[int]]) -> tuple[list[int], list[int]]:
        """Return digests of what one call gives: rows in the first slots, chunks in those after them."""
        rows, width = tokens.shape
        counts = np.full(rows, width, np.int32)
        if not chunks:
            return _digests(self._model.forward(0, tokens, counts)), []
        if not rows:
            return [], _digests(self._model.forward_prompts(0, chunks))
        of_rows, of_chunks = self._model.forward_mixed(tokens, counts, chunks)
        return _digests(of_rows), _digests(of_chunks)

    def _sizes(self, total: int, prompts: int) -> list[int]:
        """Return the sizes of so many prompts' chunks, one of them of one token, that fill a call together."""
        if prompts == 1:
            return [total]
        size, more = divmod(total - LEAST_WIDTH, prompts - 1)
        return [1, *[size + (number < more) for number in range(prompts - 1)]]

    def _of_prompt(self, size: int) -> list[int]:
        """Return the digests after a prompt's last token, and after what follows it, the prompt fed in pieces."""
        if size not in self._in_pieces:
            slot, prompt, last = self._model.slots - 1, self._text[:size], list[int]()
            self._model.truncate(slot, 0)
            for begin in range(0, size, PIECE):
                last = _feed(self._model, slot, prompt[begin : begin + PIECE])[-1:]
            self._in_pieces[size] = [*last, *_feed(self._model, slot, self._text[:LEAST_WIDTH])]
            self._begin(slot)
        return self._in_pieces[size]

    def _begin(self, slot: int) -> None:
        """Have a slot's own tokens in it."""
        self._model.truncate(slot, 0)
        _feed(self._model, slot, self._prompts[slot])


def _feed(model: PagedModel, slot: int, tokens: list[int]) -> list[int]:
    """Feed a few tokens to a slot, and return a digest of the logits after each."""
    return _digests(model.forward(slot, np.array([tokens]), np.array([len(tokens)], np.int32)))


def _digests(logits: PagedLogits) -> list[int]:
    values = logits.raw()
    return [hash(row.tobytes()) for row in values.reshape(-1, values.shape[-1])]
