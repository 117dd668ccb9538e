"""Where a model's arrays are: NumPy's on the CPU, CuPy's on an NVIDIA GPU, bound to ONNX Runtime by address."""

import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import DTypeLike, NDArray

from speculative_decoding.adjustments import ENTRY, PLACE, adjust
from speculative_decoding.execution_provider import Provider
from speculative_decoding.sampling import WISH, Filters, choose

Array = Any  # numpy.ndarray or cupy.ndarray
Mark = Any  # a time on the host, an event of a GPU


class OutOfDeviceMemoryError(ValueError):
    """What a model needs does not fit on the device; the message has the numbers."""


class Device(ABC):
    """Memory, copies and the few operations that are done where the logits are."""

    name: str  # ONNX Runtime's, for bindings
    number: int
    provider: Provider

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Return an array of zeros. Raises OutOfDeviceMemoryError."""

    @abstractmethod
    def address(self, array: Array) -> int:
        """Return where an array begins."""

    @abstractmethod
    def upload(self, array: Array, values: NDArray[Any]) -> None:
        """Write values to an array of the same shape; what is started later sees them."""

    @abstractmethod
    def download(self, array: Array) -> NDArray[Any]:
        """Return an array's values, once all that was started before is done."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all that was started."""

    @abstractmethod
    def mark(self) -> Mark:
        """Return a mark that is passed when all that was started before is done."""

    @abstractmethod
    def wait_for(self, mark: Mark) -> None:
        """Have what is started later wait for a mark, which may be another device object's; the host goes on."""

    @abstractmethod
    def seconds(self, begin: Mark, end: Mark) -> float:
        """Return the time between two marks that have been passed."""

    @abstractmethod
    def copy(self, array: Array, source: int, destination: int) -> None:
        """Copy array[:, source] to array[:, destination]."""

    @abstractmethod
    def page_locked(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return memory of the host for `save` and `load`. Raises OutOfDeviceMemoryError."""

    @abstractmethod
    def save(self, array: Array, host: NDArray[Any]) -> None:
        """Queue a copy to `host`, which is page-locked, contiguous and of the same shape."""

    @abstractmethod
    def load(self, array: Array, host: NDArray[Any]) -> None:
        """Queue a copy the other way."""

    @abstractmethod
    def argmax(self, logits: Array, chosen: Array) -> None:
        """Write each row's likeliest column to `chosen` int32 [rows], the lowest of equals."""

    @abstractmethod
    def choose(self, logits: Array, wishes: Array, chosen: Array) -> None:
        """Write what is chosen of each row to `chosen` int32 [rows], as `wishes` WISH [rows], given as bytes, say."""

    @abstractmethod
    def adjust(self, logits: Array, entries: Array, places: Array, adjusted: Array) -> None:
        """Write logits, of any type, to `adjusted` float32 of the same shape, changed as adjustments.adjust says.

        entries, places: ENTRY, and PLACE [rows], given as bytes.
        """

    @abstractmethod
    def advance(self, chosen: Array, tokens: Array, past: Array, counts: Array, proposals: Array) -> None:
        """Make a call's inputs those of the next token of each row: what was `chosen` after its last fed token.

        chosen int32 [rows * width]; tokens int64 [rows * width], past, counts (fed tokens), proposals int32 [rows].
        What was chosen is written to `proposals`; a row that was fed nothing stays as it is.
        """

    @abstractmethod
    def complete(self, tokens: Array, width: int, proposals: Array) -> None:
        """Fill in what is negative of `tokens` int64 [rows * width], of which the first of each row is known.

        proposals: int32 [steps, at least rows], what comes after it.
        """

    @abstractmethod
    def accept(self, chosen: Array, tokens: Array, counts: Array, standing: Array) -> None:
        """Write to `standing` [logits], at each row's first, how many of its drafts were chosen, and 0 elsewhere.

        chosen int32 [logits]; tokens int64 [rows * width], of which each row was fed its first `counts` int32 [rows].
        """

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Return how much memory is free, None where there is no telling."""

    @abstractmethod
    def run_options(self, graph: int | None) -> Any:
        """Return options for a call that is captured once and replayed as CUDA graph number `graph`, or is not."""


class HostDevice(Device):
    """The CPU: all is done when a call returns."""

    name, number = "cpu", 0

    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return np.zeros(shape, dtype)

    def address(self, array: Array) -> int:
        return int(array.ctypes.data)

    def upload(self, array: Array, values: NDArray[Any]) -> None:
        array[...] = values

    def download(self, array: Array) -> NDArray[Any]:
        return np.array(array)

    def synchronize(self) -> None:
        pass

    def mark(self) -> Mark:
        return time.perf_counter()

    def wait_for(self, mark: Mark) -> None:
        pass

    def seconds(self, begin: Mark, end: Mark) -> float:
        return float(end - begin)

    def copy(self, array: Array, source: int, destination: int) -> None:
        array[:, destination] = array[:, source]

    def page_locked(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        return np.zeros(shape, dtype)

    def save(self, array: Array, host: NDArray[Any]) -> None:
        host[...] = array

    def load(self, array: Array, host: NDArray[Any]) -> None:
        array[...] = host

    def argmax(self, logits: Array, chosen: Array) -> None:
        chosen[...] = logits.argmax(-1)

    def choose(self, logits: Array, wishes: Array, chosen: Array) -> None:
        for row, (key, temperature, top_p, least, top_k) in enumerate(wishes.view(WISH).tolist()):
            chosen[row] = choose(logits[row].astype(np.float32), Filters(temperature, top_k, top_p, least), key)

    def adjust(self, logits: Array, entries: Array, places: Array, adjusted: Array) -> None:
        adjusted[...] = logits
        for row, place in zip(adjusted, places.view(PLACE), strict=True):
            adjust(row, entries.view(ENTRY), place)

    def advance(self, chosen: Array, tokens: Array, past: Array, counts: Array, proposals: Array) -> None:
        first = np.arange(len(counts)) * (len(chosen) // len(counts))
        proposals[...] = tokens[first] = np.where(counts, chosen[first + np.maximum(counts, 1) - 1], 0)
        past += counts
        counts[...] = counts > 0

    def complete(self, tokens: Array, width: int, proposals: Array) -> None:
        fed = tokens.reshape(-1, width)
        rows, places = np.nonzero(fed < 0)
        fed[rows, places] = proposals[places - 1, rows]

    def accept(self, chosen: Array, tokens: Array, counts: Array, standing: Array) -> None:
        standing[...] = 0
        if not len(counts):
            return
        fed = tokens.reshape(len(counts), -1)
        width = fed.shape[1]
        stands = (fed[:, 1:] == chosen[: fed.size].reshape(fed.shape)[:, :-1]) & (np.arange(1, width) < counts[:, None])
        standing[: fed.size : width] = np.cumprod(stands, axis=1).sum(1)

    def free_bytes(self) -> int | None:
        return None

    def run_options(self, graph: int | None) -> Any:
        return onnxruntime.RunOptions()
