"""How many tokens a GPU may be fed at once before a token's logits depend on what is fed with it.

Its kernels differ by how many rows a matrix product has. Those of few rows keep a row's bits; with more, a row at the
end may be summed in another order, and a near tie be decided otherwise.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from speculative_decoding.decoder import Logits
from speculative_decoding.paged_call import KEPT_WIDTH
from speculative_decoding.paged_model import CHUNKS, LEAST_WIDTH, WIDTHS, PagedModel

PAST = 12  # tokens in a slot before the comparison


def limit_tokens(model: PagedModel) -> bool:
    """Have a model feed no more tokens in one call than keep their bits; return whether all slots can decode so.

    Every number of rows and every width that is used is compared with tokens fed one by one, all slots of it, and every
    chunk of a prompt with the same in small pieces. All slots are empty before and after.
    """
    try:
        model.most_tokens = _most_tokens(model)
    finally:
        for slot in range(model.slots):
            model.truncate(slot, 0)
    return model.most_tokens >= LEAST_WIDTH * model.slots


def _most_tokens(model: PagedModel) -> int:
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.shape.vocabulary, (model.slots, PAST))
    tokens = rng.integers(0, model.shape.vocabulary, (model.slots, KEPT_WIDTH))
    for slot, prompt in enumerate(prompts):
        _feed(model, slot, prompt[None])
    alone = [_one_by_one(model, slot, row) for slot, row in enumerate(tokens)]
    good = 0
    for size, rows, width in sorted(_shapes(model)):
        if rows:
            model.lengths[:rows] = PAST
            found = _digests(_feed(model, 0, tokens[:rows, :width]))
            same = found == [digest for row in alone[:rows] for digest in row[:width]]
        else:
            same = _chunk_is_independent(model, rng.integers(0, model.shape.vocabulary, width))
            model.truncate(0, 0)
            _feed(model, 0, prompts[:1])  # what was in the slot that the chunk was fed to
        if not same:
            return good
        good = size
    return good


def _shapes(model: PagedModel) -> Iterator[tuple[int, int, int]]:
    """Yield tokens, rows and width of what a model is fed; of a chunk of a prompt, rows is 0."""
    for width in WIDTHS:
        for rows in {min(1 << power, model.slots) for power in range(model.slots.bit_length() + 1)}:
            yield rows * width, rows, width
    for width in CHUNKS:
        if width + KEPT_WIDTH <= model.context_length:
            yield width, 0, width


def _one_by_one(model: PagedModel, slot: int, tokens: NDArray[np.int64]) -> list[int]:
    return [digest for token in tokens for digest in _digests(_feed(model, slot, token.reshape(1, 1)))]


def _chunk_is_independent(model: PagedModel, prompt: NDArray[np.int64]) -> bool:
    """Return whether a prompt's last token and what follows have the same bits, fed at once or in pieces."""
    found = []
    for piece in (len(prompt), KEPT_WIDTH - 1):
        model.truncate(0, 0)
        for begin in range(0, len(prompt), piece):
            last = _digests(_feed(model, 0, prompt[None, begin : begin + piece])[:, -1:])
        found.append([*last, *_digests(_feed(model, 0, prompt[None, :LEAST_WIDTH]))])
    return found[0] == found[1]


def _feed(model: PagedModel, first: int, tokens: NDArray[np.int64]) -> Logits:
    return model.forward(first, tokens, np.full(len(tokens), tokens.shape[1], np.int32))


def _digests(logits: Logits) -> list[int]:
    values = logits.copy()
    return [hash(row.tobytes()) for row in values.reshape(-1, values.shape[-1])]
