"""DraftLoop: in one call the tokens, and the keys and values, of as many single steps."""

from collections.abc import Callable

import numpy as np
import pytest
from speculative_decoding.draft_loop import DraftLoop
from speculative_decoding.drafter import ModelDrafter
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.options import GenerationOptions
from speculative_decoding.sequence import Sequence

from tests.language_models import VOCABULARY
from tests.unit.conftest import TINY, Export

SLOTS, STEPS = 4, 5


def load(export: Export) -> LanguageModel:
    return LanguageModel(export.folder, SLOTS, threads=1, spinning=False)


def sequences(rng: np.random.Generator) -> list[Sequence]:
    prompts = [rng.integers(5, VOCABULARY, length).tolist() for length in (12, 5, 30, 9)]
    return [Sequence(prompt, GenerationOptions(), lambda *event: None, frozenset()) for prompt in prompts]


@pytest.mark.parametrize("name", TINY)
def test_it_proposes_what_single_steps_propose_round_after_round(exported: Callable[[str], Export], name: str) -> None:
    stepwise, looped = load(exported(name)), load(exported(name))
    drafters = ModelDrafter(stepwise), ModelDrafter(looped, loops=[STEPS])
    rng = np.random.default_rng(0)
    running = sequences(rng)
    for drafter in drafters:
        drafter.fill({slot: sequence.tokens for slot, sequence in enumerate(running)})
    for lengths in ([5, 4, 3, 5], [5, 0, 5, 4], [4, 5, 0, 0], [5, 5, 5, 5], [0, 0, 0, 4]):
        asked = np.array(lengths, np.int32)
        expected, proposed = (drafter.propose(running, asked).tokens for drafter in drafters)
        for row, length in enumerate(lengths[: len(expected)]):
            assert proposed[row, :length].tolist() == expected[row, :length].tolist()
        for row, sequence in enumerate(running):  # some is accepted, or all, and one more follows
            accepted = int(rng.integers(0, lengths[row] + 1)) if row else lengths[row]
            sequence.tokens += [
                *(expected[row, :accepted].tolist() if accepted else []),
                int(rng.integers(5, VOCABULARY)),
            ]
            for drafter in drafters:
                drafter.commit(row, len(sequence.tokens))
                drafter.fill({row: sequence.tokens})


def test_a_loop_is_one_call_and_only_where_its_steps_are_wanted_and_have_room(
    exported: Callable[[str], Export],
) -> None:
    model = load(exported("llama-fp32"))
    loop = DraftLoop(model, STEPS)
    model.lengths[:] = 3
    before = model.ran_s
    proposals = loop.run(np.array([[7, 8], [9, 0]]), np.array([2, 1], np.int32))
    assert proposals.shape == (2, STEPS) and model.ran_s > before
    assert model.lengths.tolist() == [3 + 2 + STEPS - 1, 3 + 1 + STEPS - 1, 3, 3]
    assert loop.run(np.array([[7], [9]]), np.array([0, 1], np.int32)).shape == (2, STEPS)
    assert model.lengths.tolist() == [9, 8 + STEPS, 3, 3]
    assert loop.fits(2)
    model.lengths[1] = model.context_length - STEPS - 1
    assert loop.fits(1) and not loop.fits(2)
