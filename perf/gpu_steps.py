"""Steps on a GPU as the engine takes them, and as cheap as they could be: `python -m perf.gpu_steps FOLDER`, JSON out.

The engine's rows have two tokens at least, in calls of few shapes, and cuBLAS may not split sums: so their bits do not
depend on what is beside them. FOLDER's steps are timed bare and without all that, to see what it costs.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from scripts.serving.installation import PYTHON_BACKENDS

sys.path.append(str(PYTHON_BACKENDS))
if __name__ == "__main__":
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":32768:1"  # KiB: what cuBLAS takes on Hopper unless it is told otherwise

from speculative_decoding.execution_provider import execution_provider
from speculative_decoding.paged_call import CallShape
from speculative_decoding.paged_model import PagedModel

STEPS = tuple((batch, width) for batch in (1, 8, 32, 64) for width in (1, 4, 8))
PAST, REPEATS, WARM_UPS = 512, 40, 4


class AsTheyCome(PagedModel):
    """A model that pads no rows, and that gives whoever has one token the kernel for that."""

    def call_shape(self, rows: int, width: int, longest: int = 0) -> CallShape:
        return CallShape(rows, width)


def measure_steps(folder: Path) -> dict[str, dict[str, float]]:
    """Return milliseconds of a step by batch x width: everything included, and of the bare call."""
    model, engine_ms, bare_ms = _load(PagedModel, folder), {}, {}
    for batch, width in STEPS:
        times = median_ms(_step(model, batch, width), model.rehearsal(batch, width))
        engine_ms[f"{batch}x{width}"], bare_ms[f"{batch}x{width}"] = times
    return {"step_ms": engine_ms, "bare_ms": bare_ms}


def median_ms(*calls: Callable[[], None]) -> list[float]:
    """Return the median time of each of some calls, made in turn, after a few turns that do not count."""
    times: list[list[float]] = [[] for _ in calls]
    for number, (call, taken) in product(range(WARM_UPS + REPEATS), zip(calls, times, strict=True)):
        began = time.perf_counter()
        call()
        if number >= WARM_UPS:
            taken.append(time.perf_counter() - began)
    return [round(1e3 * statistics.median(taken), 3) for taken in times]


def _load(kind: type[PagedModel], folder: Path) -> PagedModel:
    return kind(folder, max(batch for batch, _ in STEPS), 0, False, execution_provider("GPU", 0))


def _step(model: PagedModel, batch: int, width: int) -> Callable[[], None]:
    """Return what feeds so many rows of tokens after PAST others and waits for the likeliest that follow."""
    tokens, counts = np.ones((batch, width), np.int64), np.full(batch, width, np.int32)

    def step() -> None:
        model.lengths[:batch] = PAST
        model.forward(0, tokens, counts).argmax(-1)

    return step


def main() -> None:
    """Measure, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    model = _load(AsTheyCome, parser.parse_args().folder)
    found: dict[str, Any] = {}
    for batch, width in STEPS:
        _step(model, batch, width)()  # fills the call's inputs
        [found[f"{batch}x{width}"]] = median_ms(model.rehearsal(batch, width))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
