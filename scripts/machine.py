"""The machine that a figure was measured on."""

import os
import platform
from pathlib import Path

import onnxruntime


def describe_machine() -> dict[str, str | int]:
    """Return processor, cores, memory and the versions that matter."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(memory / 2**30),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }
