"""Measure, when a model is loaded, what its calls cost."""

import time
from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np

from speculative_decoding.decoder import Decoder
from speculative_decoding.drafter import ModelDrafter
from speculative_decoding.paged_call import CallShape
from speculative_decoding.paged_model import PagedModel
from speculative_decoding.speculation import most_copied
from speculative_decoding.step_costs import CostTable, PrefillCost, StepCosts

PAST = 64  # tokens in each slot while measuring
REPEATS = 3
PREFILL_WIDTHS = (16, 64)
WIDTHS = (2, 3, 5)  # measured between one token and the longest draft
LEAST_BUDGET_S = 0.5
BUDGET_STEPS = 40  # a slow model may take so many of its own steps


def measure_costs(target: Decoder, drafter: ModelDrafter | None, longest: int) -> StepCosts:
    """Return what drafting up to `longest` tokens and verifying cost with these models, whose slots are empty.

    It takes a second or so; what a slow model has no time for is taken to lie on straight lines.
    """
    if drafter:
        drafter.warm_up()
    if isinstance(target, PagedModel):
        verify = _measure_captured(target)
    else:
        verify = _measure(target, (1, longest + 1, most_copied(longest) + 1))
    verify = {(rows, width - 1): seconds for (rows, width), seconds in verify.items()}
    few, many = ((width, _timed(target, 1, width)) for width in PREFILL_WIDTHS)
    prefill = PrefillCost.through(few, many)
    draft_steps = _draft_steps(drafter, longest) if drafter else {(1, 0): 0.0}
    return StepCosts(
        CostTable.interpolate(target.slots, draft_steps), CostTable.interpolate(target.slots, verify), prefill
    )


def _draft_steps(drafter: ModelDrafter, longest: int) -> dict[tuple[int, int], float]:
    """Return seconds of drafting by (rows, length)."""
    model = drafter.model
    row_counts = model.row_counts if isinstance(model, PagedModel) else sorted({1, model.slots})
    lengths = sorted({1, 2, longest // 2, longest} - {0})
    seconds = {(rows, 0): 0.0 for rows in row_counts}
    for rows, length in product(row_counts, lengths):
        seconds[rows, length] = _least_seconds(partial(drafter.rehearse, rows, length))
    return seconds


def _measure_captured(model: PagedModel) -> dict[tuple[int, int], float]:
    """Return seconds by (rows, width) of all calls that there may be: those of the captured call that serves each."""
    seconds: dict[CallShape, float] = {}
    measured = {}
    for rows in range(1, model.slots + 1):
        for width in range(1, model.widest(rows) + 1):
            shape = model.call_shape(rows, width)
            if shape not in seconds:
                seconds[shape] = _timed(model, *shape[:2])
            measured[rows, width] = seconds[shape]
    return measured


def _measure(model: Decoder, widths: tuple[int, ...]) -> dict[tuple[int, int], float]:
    """Return seconds of a call by (rows, width): at these widths, then between them for as long as there is time."""
    began = time.perf_counter()
    extremes = sorted(set(widths))
    between = [width for width in WIDTHS if width < extremes[-1]]
    middle_rows = [1 << power for power in range(1, 10) if 1 << power < model.slots]
    measured = {(rows, width): _timed(model, rows, width) for rows in sorted({1, model.slots}) for width in extremes}
    budget_s = max(LEAST_BUDGET_S, BUDGET_STEPS * measured[1, 1])
    for rows, more in [(1, between), *((rows, extremes) for rows in middle_rows), (model.slots, between)]:
        if time.perf_counter() - began < budget_s:
            measured.update({(rows, width): _timed(model, rows, width) for width in more})
    return measured


def _timed(model: Decoder, rows: int, width: int) -> float:
    """Return the seconds of a call."""
    tokens, counts = np.zeros((rows, width), np.int64), np.full(rows, width, np.int32)
    past = min(PAST, model.context_length - width)

    def call() -> None:
        model.lengths[:rows] = past
        model.forward(0, tokens, counts).argmax(-1)

    seconds = _least_seconds(call)
    model.lengths[:] = 0
    return seconds


def _least_seconds(call: Callable[[], None]) -> float:
    """Return the least seconds of a few calls, after one that does not count: what disturbs only ever adds."""
    call()
    return min(_seconds(call) for _ in range(REPEATS))


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
