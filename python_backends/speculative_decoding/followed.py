"""Tokens that a model chose and fed itself, which stay on its device until the host looks."""

import time
from collections.abc import Callable

import numpy as np

from speculative_decoding.device import Array, Device, Mark
from speculative_decoding.language_model import Tokens

ON_DEVICE = -1  # stands, among tokens on the host, for one that is not there yet


class Followed:
    """Tokens [rows, steps] that a device has been asked for; another device's work can wait for them by itself."""

    def __init__(
        self,
        device: Device,
        began: Mark,
        began_at: float,
        proposals: Array,
        rows: int,
        waited: Callable[[float], None],
    ) -> None:
        """proposals: int32 [steps, at least `rows`]. began: a mark before the work, set at `began_at` on the host.

        `waited` is told the seconds spent waiting for the device.
        """
        self.proposals = proposals
        self.shape = rows, len(proposals)
        self.ended = device.mark()
        self._device, self._began, self._began_at, self._waited = device, began, began_at, waited

    def tokens(self) -> Tokens:
        """Return them, int64 [rows, steps], once they are there."""
        rows, _ = self.shape
        started = time.perf_counter()
        tokens = self._device.download(self.proposals)[:, :rows].T.astype(np.int64)
        self._waited(time.perf_counter() - started)
        return tokens

    def complete(self, tokens: Tokens) -> Tokens:
        """Return tokens [at least rows, at least steps] with those that are ON_DEVICE filled in."""
        completed, (rows, steps) = tokens.copy(), self.shape
        known = completed[:rows, :steps]
        missing = known == ON_DEVICE
        known[missing] = self.tokens()[missing]
        return completed

    def ready_at(self) -> float:
        """Return when they were there, on time.perf_counter()'s clock, now that they are."""
        return self._began_at + self._device.seconds(self._began, self.ended)
