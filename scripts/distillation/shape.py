"""How large a student is."""

import math
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from scripts.distillation.errors import DistillationError

FEED_FORWARD_MULTIPLE = 16


@dataclass(frozen=True)
class Shape:
    """Layers, hidden width and feed-forward width. Heads keep their size, so their number follows the width."""

    layers: int
    width: int
    feed_forward: int

    @staticmethod
    def of(config: PretrainedConfig) -> "Shape":
        """Return a model's own shape. Raises DistillationError for a model that does not say it in these terms."""
        try:
            return Shape(config.num_hidden_layers, config.hidden_size, config.intermediate_size)
        except AttributeError as error:
            raise DistillationError(f"{config.model_type} models cannot be made smaller: {error}") from error


def student_shape(
    teacher: PretrainedConfig,
    layers: int | None = None,
    ratio: float | None = None,
    width: int | None = None,
    feed_forward: int | None = None,
) -> Shape:
    """Return the shape of a student of so many layers, or of the share `ratio` of the teacher's.

    The feed-forward width keeps its proportion to the hidden width where it is not given. Raises DistillationError for
    what contradicts itself, is larger than the teacher, or is no whole number of heads.
    """
    own = Shape.of(teacher)
    if layers is not None and ratio is not None:
        raise DistillationError("--layers and --ratio contradict: give one of them")
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise DistillationError(f"--ratio is {ratio}: it must be above 0 and at most 1")
        layers = max(1, math.floor(own.layers * ratio + 0.5))
    layers = own.layers if layers is None else layers
    width = own.width if width is None else width
    if feed_forward is None:
        scaled = own.feed_forward * width / own.width
        multiple = FEED_FORWARD_MULTIPLE if width < own.width else 1
        feed_forward = max(multiple, round(scaled / multiple) * multiple)
    shape = Shape(layers, width, feed_forward)
    for name in ("layers", "width", "feed_forward"):
        value, most = getattr(shape, name), getattr(own, name)
        if not 1 <= value <= most:
            option = name.replace("_", "-")
            raise DistillationError(f"--{option} is {value}: the teacher has {most}, so it must be from 1 to {most}")
    if shape == own:
        raise DistillationError("the student would be as large as the teacher: give --layers, --ratio or --width")
    student_heads(teacher, width)
    return shape


def student_heads(teacher: PretrainedConfig, width: int) -> tuple[int, int]:
    """Return how many query heads and key-value heads a student of that hidden width has. Raises DistillationError."""
    heads = teacher.num_attention_heads
    groups = getattr(teacher, "num_key_value_heads", None) or heads
    kept, rest = divmod(groups * width, teacher.hidden_size)
    if rest or not kept:
        step = teacher.hidden_size // math.gcd(groups, teacher.hidden_size)
        raise DistillationError(f"--width is {width}: for whole heads it must be a multiple of {step}")
    return heads // groups * kept, kept


def picked_layers(teacher: int, student: int) -> list[int]:
    """Return which of the teacher's layers the student begins with: evenly spread, first and last among them."""
    if student == 1:
        return [teacher - 1]
    return [round(index * (teacher - 1) / (student - 1)) for index in range(student)]


def changes(teacher: PretrainedConfig, shape: Shape) -> dict[str, Any]:
    """Return what differs in the configuration of a student of that shape."""
    heads, groups = student_heads(teacher, shape.width)
    made: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "intermediate_size": shape.feed_forward,
        "num_attention_heads": heads,
    }
    if getattr(teacher, "num_key_value_heads", None) is not None:
        made |= {"num_key_value_heads": groups, "head_dim": head_size(teacher)}
    layer_types = getattr(teacher, "layer_types", None)
    if layer_types is not None:
        made["layer_types"] = [layer_types[layer] for layer in picked_layers(len(layer_types), shape.layers)]
    return made


def head_size(config: PretrainedConfig) -> int:
    """Return the width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
