"""Where a model's arrays are: NumPy's on the CPU, CuPy's on an NVIDIA GPU, bound to ONNX Runtime by address."""

import importlib
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import DTypeLike, NDArray

from speculative_decoding.execution_provider import Provider

Array = Any  # numpy.ndarray or cupy.ndarray
SPARE_BYTES = 1 << 30  # of a GPU's memory, left to ONNX Runtime's activations and the kernels

# One thread block for each row; the lowest index among equals, as NumPy's argmax.
ARGMAX = r"""
#include <cuda_fp16.h>
extern "C" __global__ void argmax(const T* logits, int* best, long long columns) {
    __shared__ float values[256];
    __shared__ int places[256];
    const T* row = logits + (long long)blockIdx.x * columns;
    float value = __int_as_float(0xff800000);
    int place = 0x7fffffff;
    for (int column = threadIdx.x; column < columns; column += 256) {
        float here = (float)row[column];
        if (here > value || place == 0x7fffffff) { value = here; place = column; }
    }
    values[threadIdx.x] = value;
    places[threadIdx.x] = place;
    for (int half = 128; half; half >>= 1) {
        __syncthreads();
        if (threadIdx.x < half) {
            float other = values[threadIdx.x + half];
            int there = places[threadIdx.x + half];
            if (other > values[threadIdx.x] || (other == values[threadIdx.x] && there < places[threadIdx.x])) {
                values[threadIdx.x] = other;
                places[threadIdx.x] = there;
            }
        }
    }
    if (threadIdx.x == 0) best[blockIdx.x] = places[0];
}
"""


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
    def copy(self, array: Array, source: int, destination: int) -> None:
        """Copy array[:, source] to array[:, destination]."""

    @abstractmethod
    def argmax(self, logits: Array, best: Array) -> None:
        """Write each row's likeliest column to `best` int32 [rows], the lowest of equals."""

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

    def copy(self, array: Array, source: int, destination: int) -> None:
        array[:, destination] = array[:, source]

    def argmax(self, logits: Array, best: Array) -> None:
        best[...] = logits.argmax(-1)

    def free_bytes(self) -> int | None:
        return None

    def run_options(self, graph: int | None) -> Any:
        return onnxruntime.RunOptions()


class CudaDevice(Device):
    """A GPU: everything is queued on one stream, which ONNX Runtime shares, and waited for only in `download`."""

    name = "cuda"

    def __init__(self, provider: Provider) -> None:
        self._cupy = importlib.import_module("cupy")
        onnxruntime.preload_dlls()  # CUDA's, where Python packages brought them
        kind, options = provider
        self.number = int(options["device_id"])
        self._device = self._cupy.cuda.Device(self.number)
        with self._device:
            self._stream = self._cupy.cuda.Stream(non_blocking=True)
        self.provider = kind, {**options, "enable_cuda_graph": "1", "user_compute_stream": str(self._stream.ptr)}

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        needed, free = int(np.prod(shape)) * np.dtype(dtype).itemsize, self.free_bytes()
        if needed > free:
            raise OutOfDeviceMemoryError(f"{needed} bytes are needed on GPU {self.number}, which has {free} free")
        with self._device, self._stream:
            return self._cupy.zeros(shape, dtype)

    def address(self, array: Array) -> int:
        return int(array.data.ptr)

    def upload(self, array: Array, values: NDArray[Any]) -> None:
        with self._device:
            array.set(np.ascontiguousarray(values, array.dtype), stream=self._stream)

    def download(self, array: Array) -> NDArray[Any]:
        with self._device, self._stream:
            values: NDArray[Any] = array.get(stream=self._stream, blocking=True)
            return values

    def synchronize(self) -> None:
        self._stream.synchronize()

    def copy(self, array: Array, source: int, destination: int) -> None:
        with self._device, self._stream:
            array[:, destination] = array[:, source]

    def argmax(self, logits: Array, best: Array) -> None:
        with self._device, self._stream:
            kernel = self._argmax_half if logits.dtype == np.float16 else self._argmax_float
            kernel((logits.shape[0],), (256,), (logits, best, np.int64(logits.shape[1])))

    def free_bytes(self) -> int:
        with self._device:
            free: int = self._cupy.cuda.runtime.memGetInfo()[0] + self._cupy.get_default_memory_pool().free_bytes()
            return max(0, free - SPARE_BYTES)

    def run_options(self, graph: int | None) -> Any:
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", "-1" if graph is None else str(graph))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    @cached_property
    def _argmax_half(self) -> Any:
        return self._cupy.RawKernel(ARGMAX.replace("const T*", "const __half*"), "argmax")

    @cached_property
    def _argmax_float(self) -> Any:
        return self._cupy.RawKernel(ARGMAX.replace("const T*", "const float*"), "argmax")


def device_of(provider: Provider) -> Device:
    """Return the device that an execution provider works on. Raises ValueError where CuPy is missing."""
    if provider[0] != "CUDAExecutionProvider":
        return HostDevice(provider)
    try:
        return CudaDevice(provider)
    except ModuleNotFoundError as error:
        raise ValueError("instance_group asks for KIND_GPU, which needs CuPy: install cupy-cuda13x") from error
