"""Load and run one model, and print the MiB that it took at its peak: `speed.peak_memory_mib` starts this.

python -m scripts.quantization.memory FOLDER PROVIDER [INPUTS.npz]
"""

import os
import sys
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np

from scripts.quantization.runner import Decoder, Encoder, Runner

ROWS = 8


def main() -> None:
    """Run the model on the inputs, or as a decoder where there are none."""
    folder, provider, *inputs = sys.argv[1:]
    before = _kib("VmRSS")
    if inputs:
        feeds = dict(np.load(inputs[0]))
        runner: Runner = Encoder(Path(folder), provider, lambda batch: feeds)
    else:
        runner = Decoder(Path(folder), ROWS)
    runner.step(ROWS)()
    print((_kib("VmHWM") - before) / 1024)


def _kib(field: str) -> int:
    """Read this process's memory from the kernel: getrusage counts what the parent had when it forked."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1])


if __name__ == "__main__":
    main()
