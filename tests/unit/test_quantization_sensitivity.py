"""Where quality misses the floor, the nodes that cost most stay in fp32, and are named."""

from collections.abc import Collection
from pathlib import Path

import onnx
import pytest

from scripts.quantization import sensitivity
from scripts.quantization.model_file import recorded
from scripts.quantization.precision import Precision
from scripts.quantization.report import notes
from scripts.quantization.sensitivity import Group
from tests import quantization_models

GROUPS = [Group(name, (f"{name}/0", f"{name}/1")) for name in "abcd"]
COSTS = dict(zip("abcd", (0.001, 0.2, 0.03, 0.0), strict=True))


def additive_loss(exclude: Collection[str]) -> float:
    """A node costs half of what its group does, unless it is left out."""
    return sum(COSTS[node[0]] / 2 for group in GROUPS for node in group.nodes if node not in exclude)


@pytest.mark.parametrize("precision", ["dynamic-int8", "row-int8", "int4"])
def test_the_fragile_layer_is_left_out_and_named(tmp_path: Path, precision: Precision) -> None:
    path = quantization_models.store(quantization_models.fragile(), tmp_path)
    study = quantization_models.study(path, tmp_path / "work")
    result = study.add(precision, 0.01)
    assert result.loss <= 0.01
    assert result.excluded == ["fragile"]
    assert max(result.sensitivity, key=lambda name: result.sensitivity[name]) == "fragile"
    assert result.sensitivity["fragile"] > 0.1 > 10 * result.sensitivity["first"]
    assert f"{precision}: in fp32 for quality: fragile" in notes(study.results)

    model = onnx.load(result.folder / "model.onnx")
    assert recorded(model)["excluded"] == ["fragile"]
    assert [node.op_type for node in model.graph.node if node.name == "fragile"] == ["MatMul"]
    assert result.size_bytes < 0.55 * study.results["fp32"].size_bytes


def test_with_a_floor_that_is_met_nothing_is_left_out(tmp_path: Path) -> None:
    path = quantization_models.store(quantization_models.fragile(), tmp_path)
    result = quantization_models.study(path, tmp_path / "work").add("fp16", 0.01)
    assert (result.excluded, result.sensitivity) == ([], {})


def test_a_model_whose_outputs_collapse_to_zero_is_not_taken_for_a_good_one(tmp_path: Path) -> None:
    def zero(source: Path, destination: Path) -> None:
        model = onnx.load(source)
        for tensor in model.graph.initializer:
            tensor.raw_data = bytes(len(tensor.raw_data))
        onnx.save(model, destination)

    path = quantization_models.store(quantization_models.classifier(), tmp_path)
    study = quantization_models.study(path, tmp_path / "work")
    assert study.include("zeros", zero).loss == pytest.approx(1)


def test_groups_are_ranked_by_what_quantizing_them_alone_costs() -> None:
    ranked = sensitivity.rank(GROUPS, additive_loss)
    assert [group.name for group in ranked] == ["b", "c", "a", "d"]
    assert [group.loss for group in ranked] == pytest.approx([0.2, 0.03, 0.001, 0.0])


@pytest.mark.parametrize(("floor", "names"), [(0.05, "b"), (0.031, "b"), (0.001, "bc"), (0.0001, "bca")])
def test_no_more_is_left_out_than_the_floor_needs(floor: float, names: str) -> None:
    left_out, reached = sensitivity.exclude_until(sensitivity.rank(GROUPS, additive_loss), additive_loss, floor)
    assert "".join(group.name for group in left_out) == names
    assert reached <= floor


def test_something_stays_quantized_even_where_the_floor_cannot_be_met() -> None:
    def constant(exclude: Collection[str]) -> float:
        return 1.0

    left_out, reached = sensitivity.exclude_until(GROUPS, constant, 0.1)
    assert [group.name for group in left_out] == ["a", "b", "c"]
    assert reached == 1.0


def test_nodes_of_the_same_role_in_all_layers_are_one_group() -> None:
    model = quantization_models.two_inputs()
    names = [f"/layer.{layer}/{part}" for layer in range(20) for part in ("up", "down")]
    del model.graph.node[:]
    for name in names:
        model.graph.node.add(op_type="MatMul", name=name, input=["x", "w0"], output=[f"{name}/y"])
    found = sensitivity.groups(model, ("MatMul",))
    assert [group.name for group in found] == ["/layer.N/up", "/layer.N/down"]
    assert sorted(node for group in found for node in group.nodes) == sorted(names)


def test_nodes_without_telling_names_are_grouped_by_place() -> None:
    model = quantization_models.two_inputs()
    del model.graph.node[:]
    for index in range(100):
        model.graph.node.add(op_type="MatMul", name=f"MatMul_{index}", input=["x", "w0"], output=[f"y{index}"])
    found = sensitivity.groups(model, ("MatMul",))
    assert len(found) <= sensitivity.MOST_GROUPS
    assert found[0].name == "MatMul_0 to MatMul_6"
    assert [node for group in found for node in group.nodes] == [f"MatMul_{index}" for index in range(100)]
