"""The pair model: the served graph is what was trained; pairs come from the groups as they are meant to."""

import random
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from semantic_cache.pair_model import LENGTHS, PairModel

from perf.prompt_pairs import load_pairs
from scripts.build_repository import ENCODER
from scripts.pair_model.graph import pair_model
from scripts.pair_model.groups import ALIKE, APART, epoch, load_groups, split
from scripts.pair_model.network import PairNetwork

TOKENIZER = ENCODER / "tokenizer.json"
PAIRS = [
    ("How do I undo a commit?", "undo my last git commit"),
    ("Sort a list in Python", "Sort a dictionary in Python by its values, largest first, and return the first three"),
    ("a", "b"),
]


def test_the_graph_computes_what_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = PairNetwork(ENCODER, rank=4).eval()
    with torch.no_grad():
        for parameter in network.trained():  # as if training had changed everything
            parameter += 0.02 * torch.randn_like(parameter)
            parameter.copy_(parameter.half())
        expected = network(PAIRS).numpy()
    network.save(tmp_path / "adapters.safetensors")
    graph = pair_model(ENCODER, tmp_path / "adapters.safetensors")
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    score = PairModel(TOKENIZER, lambda **inputs: session.run(None, inputs)[0])
    np.testing.assert_allclose([score(*pair) for pair in PAIRS], expected, atol=1e-4)


def test_a_pair_is_padded_to_one_of_few_lengths_and_no_longer_pair_is_read() -> None:
    shapes = []

    def infer(**inputs: np.ndarray) -> np.ndarray:
        shapes.append({name: values.shape for name, values in inputs.items()})
        assert inputs["token_type_ids"].sum() < inputs["attention_mask"].sum()
        return np.ones((1, 1), np.float32)

    score = PairModel(TOKENIZER, infer)
    assert score("one", "two") == score("word " * 30, "word " * 20) == 1.0
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert shapes == [dict.fromkeys(names, (1, length)) for length in (LENGTHS[0], 64)]
    assert score("word " * 300, "word " * 300) is None
    assert len(shapes) == 2


def test_what_the_model_cannot_read_has_no_score() -> None:
    score = PairModel(TOKENIZER, lambda **_: pytest.fail("asked"))
    assert score(f"decode {'ab' * 60}", "decode it") is None  # a word too long for its vocabulary
    assert score("what does it mean", "what does \U0001f9ff mean") is None


@pytest.mark.parametrize("logits", [np.array([[np.nan]]), np.zeros((1, 2)), np.zeros(1)])
def test_nonsense_from_the_model_is_an_error(logits: np.ndarray) -> None:
    with pytest.raises(ValueError, match="no finite logit"):
        PairModel(TOKENIZER, lambda **_: logits)("one", "two")


def test_an_epoch_has_pairs_of_every_group_of_both_kinds() -> None:
    groups = load_groups()
    pairs = epoch(groups[:50], random.Random(0))
    assert sum(pair.same for pair in pairs) == 50 * ALIKE
    assert sum(not pair.same for pair in pairs) == 50 * (APART + 1)
    for group in groups[:50]:
        assert not {frozenset(pair[:2]) for pair in group.alike()} & {frozenset(pair[:2]) for pair in group.apart()}


def test_no_pair_of_the_test_splits_is_learned_and_what_is_held_out_is_not_either() -> None:
    groups = load_groups()
    learned, held = split(groups)
    assert len(learned) + len(held) == len(groups)
    assert not {group.same for group in learned} & {group.same for group in held}
    made = {frozenset((pair.first, pair.second)) for group in groups for pair in (*group.alike(), *group.apart())}
    tested = {frozenset((pair.first, pair.second)) for name in ("test", "blind") for pair in load_pairs(name)}
    assert not made & tested
