"""Logits that stay on the device: what leaves it are choices, and the rows that somebody looks into."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from speculative_decoding.adjustments import Adjustments
from speculative_decoding.device import Device
from speculative_decoding.paged_call import PagedCall


class Choices(NamedTuple):
    """tokens: what was chosen, int64 [rows, width]. standing: how many of each row's drafts stand, [rows]."""

    tokens: NDArray[np.int64]
    standing: NDArray[np.int64]


class PagedLogits:
    """Logits [rows, width, vocabulary] of one call, valid until the next; indexed as NumPy's, but for the vocabulary.

    Where `places` is -1 there are none: only the last token of a long chunk has logits.
    """

    def __init__(
        self, device: Device, call: PagedCall, places: NDArray[np.int64], waited: Callable[[float], None]
    ) -> None:
        """`places`: which of the call's logits is where. `waited` is told the seconds spent waiting for the device."""
        self._device = device
        self._call = call
        self._places = places
        self._waited = waited

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, vocabulary included."""
        return (*self._places.shape, int(self._call.logits.shape[1]))

    def last(self) -> "PagedLogits":
        """Return those after each row's last token, [rows, 1, vocabulary]."""
        return PagedLogits(self._device, self._call, self._places[:, -1:], self._waited)

    def alone_in_row(self, width: int, place: int) -> "PagedLogits":
        """Return these, which are of one token, as those of a row of `width` tokens that has no others."""
        places = np.full((1, width), -1)
        places[0, place] = self._places.item()
        return PagedLogits(self._device, self._call, places, self._waited)

    def argmax(self, axis: int = -1) -> NDArray[np.int64]:
        """Return the likeliest tokens, computed on the device."""
        assert axis == -1
        return self.choose(None).tokens

    def choose(self, wishes: NDArray[np.void] | None, adjustments: Adjustments | None = None) -> Choices:
        """Return the tokens that `wishes`, WISH of the shape without the vocabulary, choose; None for the likeliest.

        The places of `adjustments` are of the same shape. All is computed on the device.
        """
        if wishes is not None:
            wishes = self._spread(wishes)
        if adjustments is not None:
            adjustments = adjustments._replace(places=self._spread(adjustments.places))
        started = time.perf_counter()
        chosen, standing = self._call.choose(wishes, adjustments).astype(np.int64)
        self._waited(time.perf_counter() - started)
        return Choices(chosen[self._places], standing[self._places[..., 0]])

    def _spread(self, values: NDArray[np.void]) -> NDArray[np.void]:
        """Return values, of the shape without the vocabulary, in the order of the call's logits, zero elsewhere."""
        every = np.zeros(len(self._call.logits), values.dtype)
        there = self._places >= 0
        every[self._places[there]] = values[there]
        return every

    def __getitem__(self, key: Any) -> Any:
        """Return the logits float32 [vocabulary] of one token, or a view of several tokens'."""
        places = self._places[key]
        if np.ndim(places):
            return PagedLogits(self._device, self._call, places, self._waited)
        assert places >= 0, "only the last token of a long chunk has logits"
        return self._device.download(self._call.logits[int(places)]).astype(np.float32)

    def raw(self) -> NDArray[Any]:
        """Return all of them from the device, of the type that they have there."""
        values: NDArray[Any] = self._device.download(self._call.logits)[self._places]
        return values

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> NDArray[Any]:
        """Return all of them from the device."""
        values = self.raw().astype(np.float32)
        return values if dtype is None else values.astype(dtype)

    def copy(self) -> NDArray[np.float32]:
        """Return them as they are now."""
        return np.asarray(self)
