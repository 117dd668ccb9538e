"""Where bf16 arithmetic is faster than fp32."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def resolve(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type to compute in; `auto` is bf16 where the hardware multiplies it faster than fp32."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" or _cpu_multiplies_bf16() else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Compute in `dtype` where that is safe, and keep weights and sums in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def _cpu_multiplies_bf16() -> bool:
    with Path("/proc/cpuinfo").open() as described:
        return any(BF16_FLAGS & set(line.split()) for line in described if line.startswith("flags"))
