"""Which nodes cost most quality, and leaving them in fp32 one group at a time."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import onnx

from scripts.quantization.graph import role, weighted_nodes

MOST_GROUPS = 16

Loss = Callable[[Collection[str]], float]


@dataclass(frozen=True)
class Group:
    """Nodes that are kept or left out together; loss is that of quantizing them alone."""

    name: str
    nodes: tuple[str, ...]
    loss: float = 0.0


def groups(model: onnx.ModelProto, operators: Collection[str]) -> list[Group]:
    """Split the nodes of these operators that have weights into groups: by role, the same in every layer, or else by
    place in the graph."""
    names = [node.name for node in weighted_nodes(model) if node.op_type in operators]
    by_role: dict[str, list[str]] = {}
    for name in names:
        by_role.setdefault(role(name), []).append(name)
    if 1 < len(by_role) <= MOST_GROUPS:
        return [Group(name, tuple(nodes)) for name, nodes in by_role.items()]
    size = -(-len(names) // MOST_GROUPS)
    chunks = [names[start : start + size] for start in range(0, len(names), size)]
    return [Group(nodes[0] if len(nodes) == 1 else f"{nodes[0]} to {nodes[-1]}", tuple(nodes)) for nodes in chunks]


def rank(found: list[Group], loss: Loss) -> list[Group]:
    """Return the groups, the costliest first; `loss` measures a model with the given nodes left in fp32."""
    everything = {node for group in found for node in group.nodes}
    measured = [Group(group.name, group.nodes, loss(everything - set(group.nodes))) for group in found]
    return sorted(measured, key=lambda group: -group.loss)


def exclude_until(ranked: list[Group], loss: Loss, floor: float) -> tuple[list[Group], float]:
    """Leave out the costliest groups, one after the other, until the loss is at most `floor`.

    Returns the groups left out and the loss then; one group at least stays quantized, so the floor may not be met.
    """
    left_out: list[Group] = []
    reached = float("inf")
    for group in ranked[:-1]:
        left_out.append(group)
        reached = loss({node for excluded in left_out for node in excluded.nodes})
        if reached <= floor:
            break
    return left_out, reached
