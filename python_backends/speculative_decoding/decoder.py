"""What decodes: slots on the CPU, pages on a GPU, behind one interface."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx

from speculative_decoding.execution_provider import Provider
from speculative_decoding.language_model import Counts, DecoderShape, LanguageModel, Tokens
from speculative_decoding.language_model import Logits as HostLogits
from speculative_decoding.paged_logits import PagedLogits
from speculative_decoding.paged_model import PagedModel

Logits = HostLogits | PagedLogits


class Decoder(Protocol):
    """A model and one slot per sequence; slot r has the keys and values of `lengths[r]` tokens."""

    shape: DecoderShape
    lengths: Counts
    ran_s: float

    @property
    def slots(self) -> int:
        """How many sequences fit."""

    @property
    def context_length(self) -> int:
        """Tokens that a slot can hold."""

    @property
    def weight_bytes(self) -> int:
        """Size of the model's files."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes."""

    def forward(self, first: int, tokens: Tokens, counts: Counts) -> Logits:
        """Feed row r's first counts[r] of `tokens` to slot first + r; return logits, valid until the next call."""

    def forward_prompts(self, first: int, chunks: Sequence[Sequence[int]]) -> Logits:
        """Feed a chunk of its prompt to each of the slots first, first + 1, ...: `prompts_at_once` at most.

        Returns the logits [chunks, 1, vocabulary] after each chunk, valid until the next call.
        """

    @property
    def prompts_at_once(self) -> int:
        """How many prompts `forward_prompts` may be given."""

    @property
    def longest_chunk(self) -> int:
        """Tokens of prompts that may be fed in one call."""

    def widest(self, rows: int) -> int:
        """Return how many tokens each of so many rows may have in one call."""

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot."""

    def move(self, source: int, destination: int) -> None:
        """Move the sequence in one slot to another, and empty the first."""


@dataclass(frozen=True)
class DecoderSettings:
    """Sequences at once, the processor's threads and whether they spin, and bytes for prefixes kept on the GPU and,
    pushed out of it, in the host's memory.
    """

    slots: int
    threads: int
    spinning: bool
    cached_bytes: int = 0
    tier_bytes: int = 0


def shares(budget: int, folders: list[Path]) -> list[int]:
    """Return how many of `budget` bytes each model's kept prefixes may take, so that all keep as many tokens."""
    floats = [DecoderShape.load(folder).key_values.floats_per_token for folder in folders]
    return [budget * own // sum(floats) for own in floats]


def load_decoder(folder: Path, settings: DecoderSettings, provider: Provider) -> Decoder:
    """Load `folder` as its graph's attention and the provider want it. Raises ValueError when they do not agree."""
    shape = DecoderShape.load(folder)
    graph = onnx.load(folder / shape.filename, load_external_data=False).graph
    is_paged = any(value.name == "block_table" for value in graph.input)
    if is_paged and provider[0] != "CUDAExecutionProvider":
        raise ValueError(f"{folder} has PagedAttention, for GPUs: export it without --device cuda, or set KIND_GPU")
    if not is_paged and provider[0] == "CUDAExecutionProvider":
        raise ValueError(f"{folder} is for CPUs: export it with --device cuda, or set instance_group to KIND_CPU")
    given = folder, settings.slots, settings.threads, settings.spinning, provider
    return PagedModel(*given, settings.cached_bytes, settings.tier_bytes) if is_paged else LanguageModel(*given)
