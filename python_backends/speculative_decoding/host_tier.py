"""Blocks of a paged key/value cache in memory of the host, for those that the device has no room for."""

from typing import Any

from numpy.typing import NDArray

from speculative_decoding.device import Array, Device


class HostTier:
    """Places 0 to `blocks` - 1 in page-locked memory. Not thread-safe.

    Copies are queued behind what the device was asked before, and what it is asked later comes after them.
    """

    def __init__(self, device: Device, memory: Array, blocks: int) -> None:
        """`memory`: the device's, [planes, its blocks, tokens of a block, ...]. Raises OutOfDeviceMemoryError."""
        self.blocks = blocks
        self._device = device
        self._memory = memory
        self._host = device.page_locked((blocks, memory[:, 0].size), memory.dtype)
        self._free = list(reversed(range(blocks)))

    def take(self) -> int | None:
        """Return a place that is free, None when there is none."""
        return self._free.pop() if self._free else None

    def give(self, place: int) -> None:
        """Take back a place."""
        self._free.append(place)

    def taken(self) -> set[int]:
        """Return the places that are not free."""
        return set(range(self.blocks)) - set(self._free)

    def save(self, block: int, place: int, tokens: int) -> None:
        """Copy the first so many tokens of a block of the device to a place."""
        self._device.save(*self._parts(block, place, tokens))

    def load(self, place: int, block: int, tokens: int) -> None:
        """Copy the first so many tokens of what is at a place to a block of the device."""
        self._device.load(*self._parts(block, place, tokens))

    def _parts(self, block: int, place: int, tokens: int) -> tuple[Array, NDArray[Any]]:
        """Return where the first so many tokens are on the device, and on the host, where they lie together."""
        there = self._memory[:, block, :tokens]
        return there, self._host[place, : there.size].reshape(there.shape)
