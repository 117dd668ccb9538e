"""How the keys and values of a block of tokens lie in memory, and how they get there and back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LARGEST_CODE = 127  # int8, symmetric: -128 is not used
FLOAT_BYTES = 4
CHUNK_FLOATS = 1 << 14  # quantized at once: little memory beside the pool, few calls, and the processor's cache

# One sequence's keys and values in a model's working memory: [planes, kv_heads, context, head_size], where the planes
# are layer 0's keys, layer 0's values, layer 1's keys, and so on. A view with strides is as good as any.
SlotMemory = NDArray[np.float32]
Values = NDArray[np.float32]  # a block of one model: [planes, kv_heads, block_tokens, head_size]
Codes = NDArray[np.int8]  # the same, quantized
Scales = NDArray[np.float32]  # what a head's codes are multiplied by: [planes, kv_heads]


@dataclass(frozen=True)
class KeyValueShape:
    """What one token adds to a model's keys and values."""

    layers: int
    kv_heads: int
    head_size: int

    @property
    def planes(self) -> int:
        """Arrays of keys or of values: two per layer."""
        return 2 * self.layers

    @property
    def floats_per_token(self) -> int:
        """Numbers that one token takes."""
        return self.planes * self.kv_heads * self.head_size

    def require_slot(self, name: str, slot: SlotMemory) -> None:
        """Raise ValueError when a slot is not one of this model's; NumPy would broadcast some of them."""
        planes, heads, _, size = slot.shape
        if (planes, heads, size) != (self.planes, self.kv_heads, self.head_size) or slot.dtype != np.float32:
            wanted = f"float32 [{self.planes}, {self.kv_heads}, context, {self.head_size}]"
            raise ValueError(f"the {name}'s slot is {slot.dtype} {list(slot.shape)}; it must be {wanted}")


@dataclass(frozen=True)
class BlockLayout:
    """A block of `block_tokens` tokens: all layers of the target, then all of the draft if there is one."""

    target: KeyValueShape
    draft: KeyValueShape | None = None
    block_tokens: int = 16

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise ValueError(f"block_tokens is {self.block_tokens}; it must be at least 1")

    @property
    def models(self) -> tuple[KeyValueShape, ...]:
        """The target, and the draft if there is one."""
        return (self.target, self.draft) if self.draft else (self.target,)

    @property
    def floats(self) -> int:
        """Numbers in a block."""
        return self.block_tokens * sum(model.floats_per_token for model in self.models)

    @property
    def bytes(self) -> int:
        """Bytes of a block in fp32."""
        return self.floats * FLOAT_BYTES

    @property
    def scales(self) -> int:
        """Scales of a block in int8: one for each head of each layer's keys and values."""
        return sum(model.planes * model.kv_heads for model in self.models)

    def split_values(self, blocks: NDArray[np.generic]) -> list[NDArray[np.generic]]:
        """Return views [n, planes, kv_heads, block_tokens, head_size] of [n, floats], one for each model."""
        shapes = [(model.planes, model.kv_heads, self.block_tokens, model.head_size) for model in self.models]
        return _split(blocks, shapes)

    def split_scales(self, scales: NDArray[np.generic]) -> list[NDArray[np.generic]]:
        """Return views [n, planes, kv_heads] of [n, scales], one for each model."""
        return _split(scales, [(model.planes, model.kv_heads) for model in self.models])


def _split(rows: NDArray[np.generic], shapes: Sequence[tuple[int, ...]]) -> list[NDArray[np.generic]]:
    views, begin = [], 0
    for shape in shapes:
        end = begin + int(np.prod(shape))
        views.append(rows[:, begin:end].reshape(len(rows), *shape))
        begin = end
    return views


def quantize(values: Values, codes: Codes, scales: Scales) -> None:
    """Write `values` to `codes` and `scales`: symmetric, one scale per head, off by half a scale at most."""
    planes = max(1, CHUNK_FLOATS // values[0].size)
    for begin in range(0, len(values), planes):
        chunk = values[begin : begin + planes]
        scale = np.abs(chunk).max(axis=(2, 3)) / np.float32(LARGEST_CODE)
        scales[begin : begin + planes] = scale
        scale[scale == 0] = 1  # a head of zeros has codes of zero
        np.rint(chunk / scale[:, :, None, None], out=codes[begin : begin + planes], casting="unsafe")


def dequantize(codes: Codes, scales: Scales, values: Values) -> None:
    """Write what `codes` and `scales` stand for to `values`."""
    np.multiply(codes, scales[:, :, None, None], out=values)
