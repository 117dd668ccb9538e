"""Logits that stay on the device: what leaves it are choices, and the rows that somebody looks into."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from speculative_decoding.device import Array, Device


class PagedLogits:
    """Logits [rows, width, vocabulary] of one call, valid until the next; indexed as NumPy's, but for the vocabulary.

    Where `places` is -1 there are none: only the last token of a long chunk has logits.
    """

    def __init__(self, device: Device, logits: Array, best: NDArray[np.int32], places: NDArray[np.int64]) -> None:
        """`logits` [n, vocabulary] on the device, `best` their likeliest columns, `places` which of the n is where."""
        self._device = device
        self._logits = logits
        self._best = best
        self._places = places

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, vocabulary included."""
        return (*self._places.shape, int(self._logits.shape[1]))

    def argmax(self, axis: int = -1) -> NDArray[np.int64]:
        """Return the likeliest tokens, computed on the device."""
        assert axis == -1
        return self._best[self._places].astype(np.int64)

    def __getitem__(self, key: Any) -> Any:
        """Return the logits float32 [vocabulary] of one token, or a view of several tokens'."""
        places = self._places[key]
        if np.ndim(places):
            return PagedLogits(self._device, self._logits, self._best, places)
        assert places >= 0, "only the last token of a long chunk has logits"
        return self._device.download(self._logits[int(places)]).astype(np.float32)

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> NDArray[Any]:
        """Return all of them from the device."""
        values = self._device.download(self._logits).astype(np.float32)[self._places]
        return values if dtype is None else values.astype(dtype)

    def copy(self) -> NDArray[np.float32]:
        """Return them as they are now."""
        return np.asarray(self)
