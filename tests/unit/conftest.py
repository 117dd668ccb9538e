"""Tiny models, exported once for all unit tests: the exporter takes seconds to start."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from scripts.export_model import export_model
from tests import language_models

# Each architecture with tied and with untied embeddings, and in both precisions.
TINY = {
    "llama-fp32": ("llama", False),
    "llama-row-int8": ("llama", True),
    "qwen2-fp32": ("qwen2", True),
    "qwen2-row-int8": ("qwen2", False),
    "qwen3-fp32": ("qwen3", False),
    "qwen3-row-int8": ("qwen3", True),
}
LONG_CONTEXT = 2304
LONG = {"llama2k-row-int8": ("llama", False, LONG_CONTEXT)}


class Export(NamedTuple):
    """A model of transformers, and the folder it was exported to."""

    source: PreTrainedModel
    folder: Path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Export]]:
    """Return the export of that name in TINY or LONG; two are made at a time."""
    torch.set_num_threads(1)  # waking threads takes longer than such models do
    folder = tmp_path_factory.mktemp("exported")
    sources = {
        name: language_models.save_random(folder / f"{name}-source", *described)
        for name, described in {**TINY, **LONG}.items()
    }
    with ThreadPoolExecutor(2) as pool:
        finished: dict[str, Future[None]] = {
            name: pool.submit(export_model, folder / f"{name}-source", folder / name, name.split("-", 1)[1])
            for name in {**TINY, **LONG}
        }

        def get(name: str) -> Export:
            finished[name].result()
            return Export(sources[name], folder / name)

        yield get
        pool.shutdown(cancel_futures=True)
