"""LanguageModel on exported Llama, Qwen2 and Qwen3: its logits are those of transformers, whatever shares the call."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from speculative_decoding.attention_inputs import use_explicit_lengths
from speculative_decoding.language_model import DecoderShape, LanguageModel

from tests.language_models import CONTEXT, END, VOCABULARY
from tests.onnx_models import identity
from tests.unit.conftest import TINY, Export

SLOTS = 4
Float = NDArray[np.float32]
ROW_INT8 = [name for name in TINY if name.endswith("row-int8")]


class Bench:
    """A language model, beside what each of its slots has been fed."""

    def __init__(self, export: Export) -> None:
        self.source = export.source
        self.model = LanguageModel(export.folder, SLOTS, threads=1, spinning=False)
        self.history: list[list[int]] = [[] for _ in range(SLOTS)]
        self.rng = np.random.default_rng(0)

    def tokens(self, count: int) -> list[int]:
        return self.rng.integers(0, VOCABULARY, count).tolist()

    def feed(self, first: int, rows: list[list[int]]) -> list[Float]:
        """Feed rows to the slots from `first` on; return the logits of each row's tokens, [count, vocabulary]."""
        counts = np.array([len(row) for row in rows], np.int32)
        padded = np.zeros((len(rows), counts.max()), np.int64)
        for row, tokens in enumerate(rows):
            padded[row, : len(tokens)] = tokens
            self.history[first + row] += tokens
        logits = self.model.forward(first, padded, counts)
        assert self.model.lengths.tolist() == [len(tokens) for tokens in self.history]
        return [logits[row, :count].copy() for row, count in enumerate(counts)]

    def expected(self, slot: int, count: int) -> Float:
        """The logits of transformers for the last `count` tokens of a slot, computed from nothing."""
        with torch.no_grad():
            logits = self.source(input_ids=torch.tensor([self.history[slot]])).logits
        return logits[0, len(self.history[slot]) - count :].numpy()

    def truncate(self, slot: int, length: int) -> None:
        self.model.truncate(slot, length)
        del self.history[slot][length:]

    def check(self, first: int, rows: list[list[int]]) -> None:
        """Feed rows, and compare what comes back with transformers."""
        for row, logits in enumerate(self.feed(first, rows)):
            expected = self.expected(first + row, len(rows[row]))
            assert logits.shape == expected.shape
            if expected.size:
                self.compare(logits, expected)

    def compare(self, logits: Float, expected: Float) -> None:
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


class Int8Bench(Bench):
    """The same within what INT8 costs: on these models the worst cosine is 0.9975, against 1 - 1e-6."""

    def compare(self, logits: Float, expected: Float) -> None:
        norms = np.linalg.norm(logits, axis=-1) * np.linalg.norm(expected, axis=-1)
        assert ((logits * expected).sum(-1) / norms).min() > 0.995


@pytest.fixture(params=TINY)
def bench(request: pytest.FixtureRequest, exported: Callable[[str], Export]) -> Bench:
    made = Int8Bench if request.param in ROW_INT8 else Bench
    return made(exported(request.param))


def test_logits_are_those_of_transformers_through_prefill_ragged_batch_rollback_and_move(bench: Bench) -> None:
    for slot, length in enumerate((12, 5, 30, 1)):
        bench.check(slot, [bench.tokens(length)])
    bench.check(1, [bench.tokens(5)])  # several tokens with a past
    bench.check(0, [bench.tokens(count) for count in (3, 5, 0, 1)])  # different pasts and counts
    bench.check(1, [bench.tokens(count) for count in (1, 1, 1)])  # not from the first slot on

    bench.truncate(0, 13)  # rejected drafts, and a sequence begun anew
    bench.truncate(2, 0)
    bench.check(0, [bench.tokens(count) for count in (4, 2, 9, 2)])

    bench.model.move(3, 1)
    bench.history[1], bench.history[3] = bench.history[3], []
    bench.check(0, [bench.tokens(count) for count in (1, 3, 2)])
    bench.check(3, [bench.tokens(7)])

    bench.truncate(2, 3)
    bench.check(2, [bench.tokens(bench.model.context_length - 3)])  # all that fits


def test_truncating_never_lengthens(bench: Bench) -> None:
    bench.feed(0, [bench.tokens(5)])
    bench.model.truncate(0, 9)
    assert bench.model.lengths[0] == 5


@pytest.mark.parametrize("name", ROW_INT8)
def test_a_row_has_the_same_bits_alone_and_among_neighbours(exported: Callable[[str], Export], name: str) -> None:
    pasts, neighbours = (20, 7, 33, 1), (4, 0, 6)
    alone, together = Bench(exported(name)), Bench(exported(name))
    for slot, past in enumerate(pasts):
        prompt = alone.tokens(past)
        alone.feed(slot, [list(prompt)])
        together.feed(slot, [list(prompt)])
    for count in (1, 2, 5):
        row = alone.tokens(count)
        for slot, past in enumerate(pasts):
            [logits] = alone.feed(slot, [row])
            rows = [alone.tokens(neighbour) for neighbour in neighbours]
            batch = together.feed(0, [*rows[:slot], row, *rows[slot:]])
            assert np.array_equal(batch[slot], logits)
            alone.truncate(slot, past)
            for other, length in enumerate(pasts):
                together.truncate(other, length)


@pytest.mark.parametrize("name", ROW_INT8)
def test_a_token_has_the_same_bits_fed_alone_and_after_others(exported: Callable[[str], Export], name: str) -> None:
    one_by_one, at_once = Bench(exported(name)), Bench(exported(name))
    tokens = at_once.tokens(60)
    expected = np.concatenate([one_by_one.feed(0, [[token]])[0] for token in tokens])
    for width in (60, 2, 9, 17):
        at_once.truncate(0, 0)
        fed = [at_once.feed(0, [tokens[begin : begin + width]])[0] for begin in range(0, 60, width)]
        assert np.array_equal(np.concatenate(fed), expected)


def test_a_slot_has_the_bytes_it_says(exported: Callable[[str], Export]) -> None:
    model = LanguageModel(exported("llama-fp32").folder, SLOTS, threads=1, spinning=False)
    assert model.slots == SLOTS
    assert model.bytes_per_token == 2 * 4 * 2 * 2 * 16  # keys and values, fp32, layers, heads, head size
    assert (model.shape.context_length, model.context_length) == (CONTEXT, CONTEXT - 1)  # one for attention's padding
    assert model.shape.end_tokens == {END}


def test_a_folder_of_another_form_is_refused_with_what_is_missing(
    exported: Callable[[str], Export], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"genai_config.json does not exist: make the folder with scripts.export_model"
    ):
        DecoderShape.load(tmp_path)
    config = (exported("llama-fp32").folder / "genai_config.json").read_text()
    (tmp_path / "genai_config.json").write_text(config.replace('"num_key_value_heads"', '"heads"'))
    with pytest.raises(ValueError, match=r"genai_config.json has no field 'num_key_value_heads'"):
        DecoderShape.load(tmp_path)


def test_a_graph_without_grouped_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no GroupQueryAttention: export it with scripts\.export_model"):
        use_explicit_lengths(identity())


def test_lengths_replace_the_mask_and_all_that_was_computed_from_it(exported: Callable[[str], Export]) -> None:
    model = onnx.load(exported("llama-fp32").folder / "model.onnx")
    assert "attention_mask" in {value.name for value in model.graph.input}
    nodes = len(model.graph.node)
    use_explicit_lengths(model)
    inputs = [value.name for value in model.graph.input]
    assert inputs[-3:] == ["seqlens_k", "total_sequence_length", "query_seqlens"] and "attention_mask" not in inputs
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    assert len(model.graph.node) < nodes
    assert all(not read.isdisjoint(node.output) for node in model.graph.node)
