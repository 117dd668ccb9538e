"""Exact search on an NVIDIA GPU: every vector of a partition is compared, in half precision."""

import importlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from semantic_cache.partition_index import PartitionIndex
from semantic_cache.records import Vector, Vectors
from semantic_cache.store import StoreError

FIRST_ROWS = 4096
GROUP = 1024  # rows whose greatest similarity is looked at before any of theirs

# Similarities are summed in single precision; a warp takes a row, for the memory's sake.
SIMILARITIES = r"""
#include <cuda_fp16.h>
extern "C" __global__ void similarities(
    const __half* matrix, const float* vector, float* found, float* greatest, int rows, int dimensions
) {
    __shared__ float best[32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float most = -2;
    for (int place = warp; place < GROUP; place += 32) {
        long long row = (long long)blockIdx.x * GROUP + place;
        float sum = 0;
        if (row < rows) {
            const __half* values = matrix + row * dimensions;
            for (int column = 2 * lane; column < dimensions; column += 64) {
                float2 pair = __half22float2(*(const __half2*)(values + column));
                sum += pair.x * vector[column] + pair.y * vector[column + 1];
            }
            for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        } else {
            sum = -2;
        }
        if (lane == 0) found[row] = sum;
        most = fmaxf(most, sum);
    }
    if (lane == 0) best[warp] = most;
    __syncthreads();
    if (warp == 0) {
        most = best[lane];
        for (int step = 16; step; step >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
        if (lane == 0) greatest[blockIdx.x] = most;
    }
}
"""


class ExactIndex(PartitionIndex):
    """A matrix of vectors on a GPU, a row each, without gaps. Made anew from the store at every start."""

    def __init__(self, dimensions: int, device: int = 0) -> None:
        """Raises ValueError where CuPy is missing, or for an odd number of dimensions."""
        super().__init__(dimensions)
        if dimensions % 2:
            raise ValueError(f"vectors have {dimensions} dimensions; the search on a GPU takes an even number")
        try:
            self._cupy = importlib.import_module("cupy")
        except ModuleNotFoundError as error:
            raise ValueError("instance_group asks for KIND_GPU, which needs CuPy: install cupy-cuda13x") from error
        self._device = self._cupy.cuda.Device(device)
        self._ids = np.zeros(0, np.int64)
        self._rows: dict[int, int] = {}
        with self._device:
            self._kernel = self._cupy.RawKernel(SIMILARITIES, "similarities", options=(f"-DGROUP={GROUP}",))
            self._vector = self._cupy.zeros(dimensions, np.float32)
        self._matrix: Any = None

    @property
    def size(self) -> int:
        return len(self._rows)

    def nearest(self, vector: Vector, count: int) -> list[int]:
        if not self.size:
            return []
        cupy, count = self._cupy, min(count, self.size)
        with self._device:
            self._vector.set(np.ascontiguousarray(vector, np.float32))
            groups = -(-self.size // GROUP)
            sizes = np.int32(self.size), np.int32(self.dimensions)
            self._kernel((groups,), (1024,), (self._matrix, self._vector, self._found, self._greatest, *sizes))
            # A row among the nearest is in a group whose greatest is among the greatest.
            chosen = cupy.argsort(self._greatest[:groups])[::-1][:count]
            found = self._found.reshape(-1, GROUP)[chosen].reshape(-1)
            places = cupy.argsort(found)[::-1][:count]
            rows = (chosen[places // GROUP] * GROUP + places % GROUP).get()
        return [int(id_) for id_ in self._ids[rows]]

    def remove(self, ids: Iterable[int]) -> None:
        for id_ in ids:
            row = self._rows.pop(id_, None)
            if row is None:
                continue
            last = self.size
            if row != last:  # the last row fills the gap
                with self._device:
                    self._matrix[row] = self._matrix[last]
                self._ids[row] = moved = self._ids[last]
                self._rows[int(moved)] = row

    def _add(self, vectors: Vectors) -> None:
        begin, end = self.size, self.size + len(vectors.ids)
        if end > len(self._ids):
            self._grow(max(2 * len(self._ids), -(-end // FIRST_ROWS) * FIRST_ROWS))
        with self._device:
            self._matrix[begin:end] = self._cupy.asarray(np.asarray(vectors.matrix, np.float16))
        self._ids[begin:end] = vectors.ids
        self._rows.update(zip(vectors.ids.tolist(), range(begin, end), strict=True))

    def _grow(self, rows: int) -> None:
        """Have room for so many rows, a multiple of GROUP. Raises StoreError where the GPU has none."""
        cupy, size = self._cupy, self.size
        try:
            with self._device:
                matrix = cupy.zeros((rows, self.dimensions), np.float16)
                self._found, self._greatest = cupy.zeros(rows, np.float32), cupy.zeros(rows // GROUP, np.float32)
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise StoreError(f"{rows} vectors of {self.dimensions} do not fit on the GPU: {error}") from error
        if size:
            with self._device:
                matrix[:size] = self._matrix[:size]
        self._matrix = matrix
        self._ids = np.concatenate([self._ids, np.zeros(rows - len(self._ids), np.int64)])
