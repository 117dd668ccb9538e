"""The techniques, in the order in which they are tried: the most impact for the least risk first."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from scripts.optimization.setup import FP32, Setup
from scripts.optimization.subject import Subject

MOST_PRECISIONS = 2  # measured on a server, of those that keep the quality: the fastest in-process
BATCHES = (8, 16, 32, 64)
DELAYS_US = (500, 2000)
SEQUENCES = (4, 8, 16)
SPECULATION_LENGTH = 8
ROW_INDEPENDENT = "row-int8"  # what verifies drafts fast, and without changing a token

Propose = Callable[[Setup], Sequence[Setup]]


class Technique(NamedTuple):
    """stages: each proposes setups, given the best so far; the next one is asked when these have been measured."""

    name: str
    stages: Callable[[Subject, float], Iterator[Propose]]


def _caching(subject: Subject, most_loss: float) -> Iterator[Propose]:
    yield lambda best: [replace(best, cached=True)]


def _quantization(subject: Subject, most_loss: float) -> Iterator[Propose]:
    made = subject.quantize(most_loss)[:MOST_PRECISIONS]
    yield lambda best: [replace(best, weights=precision) for precision in made]


def _batching(subject: Subject, most_loss: float) -> Iterator[Propose]:
    if subject.kind == "language model":
        yield lambda best: [replace(best, batching=replace(best.batching, max_batch_size=size)) for size in SEQUENCES]
        return
    yield from encoder_batching(BATCHES, DELAYS_US, os.cpu_count() or 1)


def encoder_batching(batches: Sequence[int], delays_us: Sequence[int], cores: int) -> Iterator[Propose]:
    """Yield the stages of a guided search: the batch first, then the delay, then how instances share the cores out.

    That is the order of NVIDIA's advice for dynamic batching; on a CPU the last changes least.
    """

    def vary(best: Setup, **values: int) -> Setup:
        return replace(best, batching=replace(best.batching, **values))

    yield lambda best: [vary(best, max_batch_size=size, max_queue_delay_us=0) for size in batches]
    yield lambda best: [] if best.batching.max_queue_delay_us is None else [
        vary(best, max_queue_delay_us=delay) for delay in delays_us
    ]  # fmt: skip
    yield lambda best: [vary(best, instances=cores, threads=1), vary(best, instances=2, threads=cores)]


def _speculation(subject: Subject, most_loss: float) -> Iterator[Propose]:
    independent = ROW_INDEPENDENT in subject.forms

    def propose(best: Setup) -> list[Setup]:
        drafted = replace(best, speculation=SPECULATION_LENGTH)
        if independent and best.weights not in (FP32, ROW_INDEPENDENT):
            return [drafted, replace(drafted, weights=ROW_INDEPENDENT)]
        return [drafted]

    yield propose


def _kv_reuse(subject: Subject, most_loss: float) -> Iterator[Propose]:
    yield lambda best: [replace(best, keeps_prefixes=True)]


def _distillation(subject: Subject, most_loss: float) -> Iterator[Propose]:
    yield lambda best: [replace(best, weights=subject.distil(best.precision))]


TECHNIQUES = (
    Technique("caching", _caching),
    Technique("quantization", _quantization),
    Technique("batching", _batching),
    Technique("speculative decoding", _speculation),
    Technique("KV reuse", _kv_reuse),
    Technique("distillation", _distillation),
)
