"""An NVIDIA GPU's memory and kernels, through CuPy."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import DTypeLike, NDArray

from speculative_decoding.device import Array, Device, HostDevice, Mark, OutOfDeviceMemoryError
from speculative_decoding.execution_provider import Provider
from speculative_decoding.noise import MAX_GUMBEL

SPARE_BYTES = 1 << 30  # of a GPU's memory, left to ONNX Runtime's activations and the kernels
KERNELS = ("argmax", "choose", "adjust", "advance", "complete", "accept")
THREADS = 512  # of kernels.cu, on each row of logits
SMALL = 64  # threads of a block, each of which has a row or a token


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
        code = (Path(__file__).parent / "kernels.cu").read_text(encoding="utf-8")
        limits = f"-DMAX_GUMBEL={MAX_GUMBEL!r}"
        self._kernels: dict[tuple[str, Any], Any] = {}
        for dtype, name in ((np.float16, "__half"), (np.float32, "float")):
            module = self._cupy.RawModule(code=code, options=(f"-DLOGIT={name}", limits))
            with self._device:  # compiled now: a request would wait for it
                self._kernels |= {(kernel, np.dtype(dtype)): module.get_function(kernel) for kernel in KERNELS}
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

    def mark(self) -> Mark:
        with self._device:
            event = self._cupy.cuda.Event()
            event.record(self._stream)
        return event

    def wait_for(self, mark: Mark) -> None:
        self._stream.wait_event(mark)

    def seconds(self, begin: Mark, end: Mark) -> float:
        return float(self._cupy.cuda.get_elapsed_time(begin, end)) / 1e3

    def copy(self, array: Array, source: int, destination: int) -> None:
        with self._device, self._stream:
            array[:, destination] = array[:, source]

    def page_locked(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            memory = self._cupy.cuda.alloc_pinned_memory(size)
        except (MemoryError, self._cupy.cuda.runtime.CUDARuntimeError) as error:
            raise OutOfDeviceMemoryError(f"{size} bytes of the host's memory cannot be page-locked: {error}") from error
        return np.frombuffer(memory, dtype, int(np.prod(shape))).reshape(shape)

    def save(self, array: Array, host: NDArray[Any]) -> None:
        with self._device, self._stream:  # gathered first: one copy for each part would take longer to queue than to do
            gathered = self._cupy.ascontiguousarray(array)
            self._move(host.ctypes.data, self.address(gathered), host.nbytes, "memcpyDeviceToHost")

    def load(self, array: Array, host: NDArray[Any]) -> None:
        with self._device, self._stream:
            gathered = self._cupy.empty(host.shape, host.dtype)
            self._move(self.address(gathered), host.ctypes.data, host.nbytes, "memcpyHostToDevice")
            array[...] = gathered

    def argmax(self, logits: Array, chosen: Array) -> None:
        self._launch("argmax", logits, len(logits), THREADS, (logits, chosen, np.int32(logits.shape[1])))

    def choose(self, logits: Array, wishes: Array, chosen: Array) -> None:
        self._launch("choose", logits, len(logits), THREADS, (logits, wishes, chosen, np.int32(logits.shape[1])))

    def adjust(self, logits: Array, entries: Array, places: Array, adjusted: Array) -> None:
        columns = np.int32(logits.shape[1])
        self._launch("adjust", logits, len(logits), THREADS, (logits, entries, places, adjusted, columns))

    def advance(self, chosen: Array, tokens: Array, past: Array, counts: Array, proposals: Array) -> None:
        rows = len(counts)
        sizes = np.int32(rows), np.int32(len(chosen) // rows)
        self._launch_small("advance", rows, (chosen, tokens, past, counts, proposals, *sizes))

    def complete(self, tokens: Array, width: int, proposals: Array) -> None:
        stride = proposals.strides[0] // proposals.itemsize
        sizes = np.int32(len(tokens)), np.int32(width), np.int32(stride)
        self._launch_small("complete", len(tokens), (tokens, proposals, *sizes))

    def accept(self, chosen: Array, tokens: Array, counts: Array, standing: Array) -> None:
        rows = len(counts)
        sizes = np.int32(rows), np.int32(len(tokens) // max(1, rows)), np.int32(len(chosen))
        self._launch_small("accept", len(chosen), (chosen, tokens, counts, standing, *sizes))

    def free_bytes(self) -> int:
        with self._device:
            free: int = self._cupy.cuda.runtime.memGetInfo()[0] + self._cupy.get_default_memory_pool().free_bytes()
            return max(0, free - SPARE_BYTES)

    def run_options(self, graph: int | None) -> Any:
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", "-1" if graph is None else str(graph))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _move(self, destination: int, source: int, size: int, kind: str) -> None:
        runtime = self._cupy.cuda.runtime
        runtime.memcpyAsync(destination, source, size, getattr(runtime, kind), self._stream.ptr)

    def _launch_small(self, name: str, threads: int, arguments: tuple[Any, ...]) -> None:
        self._launch(name, None, -(-threads // SMALL), SMALL, arguments)

    def _launch(self, name: str, logits: Array | None, blocks: int, threads: int, arguments: tuple[Any, ...]) -> None:
        """Queue a kernel, made for the type that the logits have."""
        kernel = self._kernels[name, np.dtype(np.float16) if logits is None else logits.dtype]
        with self._device, self._stream:
            kernel((blocks,), (threads,), arguments)


def device_of(provider: Provider) -> Device:
    """Return the device that an execution provider works on. Raises ValueError where CuPy is missing."""
    if provider[0] != "CUDAExecutionProvider":
        return HostDevice(provider)
    try:
        return CudaDevice(provider)
    except ModuleNotFoundError as error:
        raise ValueError("instance_group asks for KIND_GPU, which needs CuPy: install cupy-cuda13x") from error
