"""What is found out when a model is loaded: whether its rows are independent, what its calls cost, where it can run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from speculative_decoding.drafter import ModelDrafter
from speculative_decoding.execution_provider import CPU, execution_provider
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.row_independence import rows_are_independent
from speculative_decoding.warm_up import measure_costs

from tests.language_models import perturb
from tests.unit.conftest import TINY, Export

SLOTS = 4


def load(folder: Path, slots: int = SLOTS) -> LanguageModel:
    return LanguageModel(folder, slots, threads=1, spinning=False)


@pytest.mark.parametrize("name", [name for name in TINY if name.endswith("row-int8")])
@pytest.mark.parametrize("slots", [1, SLOTS])
def test_row_wise_models_pass_and_their_slots_are_empty_afterwards(
    exported: Callable[[str], Export], name: str, slots: int
) -> None:
    model = load(exported(name).folder, slots)
    assert rows_are_independent(model)
    assert model.lengths.tolist() == [0] * slots


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "tokens"])
def test_a_model_whose_logits_depend_on_what_is_fed_with_them_fails(
    exported: Callable[[str], Export], tmp_path: Path, axis: int
) -> None:
    """One scale for a whole tensor, as dynamic quantization has it, does that; here it is the mean over an axis."""
    folder = perturb(exported("llama-row-int8").folder, tmp_path / "dependent", noise=0.0)
    model = onnx.load(folder / "model.onnx")
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[list(last.output).index("logits")] = "own_logits"
    model.graph.initializer.append(numpy_helper.from_array(np.array([axis]), "axis"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(1e-4, np.float32), "little"))
    model.graph.node.extend(
        [
            helper.make_node("ReduceMean", ["own_logits", "axis"], ["mean"], keepdims=1),
            helper.make_node("Mul", ["mean", "little"], ["less"]),
            helper.make_node("Add", ["own_logits", "less"], ["logits"]),
        ]
    )
    onnx.save(model, folder / "model.onnx")
    assert not rows_are_independent(load(folder))


def test_measured_costs_grow_with_rows_and_length_and_leave_the_slots_empty(
    exported: Callable[[str], Export],
) -> None:
    target, draft = load(exported("llama-fp32").folder), load(exported("llama-fp32").folder)
    costs = measure_costs(target, ModelDrafter(draft, loops=[4, 8]), 8)
    assert target.lengths.tolist() == draft.lengths.tolist() == [0] * SLOTS
    assert costs.draft.row(1)[0] == costs.draft.row(SLOTS)[0] == 0
    assert 0 < costs.draft.row(1)[1] < costs.draft.row(1)[16]
    assert 0 < costs.verify.row(1)[0] < costs.verify.row(SLOTS)[16]
    assert costs.prefill.seconds(1) > 0
    assert not measure_costs(target, None, 8).draft.row(1).any()


def test_a_gpu_that_this_onnx_runtime_cannot_use_is_refused_with_the_remedy() -> None:
    assert execution_provider("CPU", 0) == CPU
    with pytest.raises(ValueError, match=r"KIND_GPU.*CUDAExecutionProvider.*install onnxruntime-gpu, or set"):
        execution_provider("GPU", 0)
