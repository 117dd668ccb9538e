"""A student made of its teacher: evenly picked layers, and in them the channels, heads and units that are used most.

Narrowing selects rather than projects, as in Minitron (Muralidharan et al. 2024): a student's channels are some of the
teacher's, so that hidden states can be compared. How much a channel, head or feed-forward unit is used is the mean
size of its activations on some of the texts; hidden channels are the same in every layer, heads and units are not.
"""

import copy
import re
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from scripts.distillation.errors import DistillationError
from scripts.distillation.kept import Kept
from scripts.distillation.model_folder import ModelFolder
from scripts.distillation.samples import Batch
from scripts.distillation.shape import Shape, changes, head_size, picked_layers, student_heads

Axis = Literal["hidden", "query", "key", "units", "all"]
LAYER = re.compile(r"^(.*?\blayers?\.)(\d+)(\..*)$")
# The axes of a weight, by the end of its name; vectors have the first of them. Llama's and BERT's names.
AXES: tuple[tuple[str, tuple[Axis, ...]], ...] = (
    (r"(q_proj)\.\w+", ("query", "hidden")),
    (r"([kv]_proj)\.\w+", ("key", "hidden")),
    (r"o_proj\.\w+", ("hidden", "query")),
    (r"(gate|up)_proj\.\w+", ("units", "hidden")),
    (r"down_proj\.\w+", ("hidden", "units")),
    (r"[qk]_norm\.weight", ("all",)),
    (r"(embed_tokens|lm_head)\.weight", ("all", "hidden")),
    (r"(layernorm|\bnorm)\.weight", ("hidden",)),
    (r"self\.(query|key|value)\.\w+", ("query", "hidden")),
    (r"attention\.output\.dense\.\w+", ("hidden", "query")),
    (r"intermediate\.dense\.\w+", ("units", "hidden")),
    (r"output\.dense\.\w+", ("hidden", "units")),
    (r"(word|position|token_type)_embeddings\.weight", ("all", "hidden")),
    (r"LayerNorm\.\w+", ("hidden",)),
    (r"pooler\.dense\.\w+", ("hidden", "hidden")),
)
ATTENTION_OUT = re.compile(r"(o_proj|attention\.output\.dense)$")
FEED_FORWARD_OUT = re.compile(r"(down_proj|(?<!attention\.)output\.dense)$")


def make_student(teacher: ModelFolder, shape: Shape, batches: Iterable[Batch]) -> tuple[PreTrainedModel, Kept]:
    """Return a student of that shape and what of the teacher it is made of.

    `batches` are texts to measure activations on; they are read only where something is narrower. Raises
    DistillationError for an architecture whose layers or axes are not known.
    """
    config = copy.deepcopy(teacher.model.config)
    for name, value in changes(config, shape).items():
        setattr(config, name, value)
    loader = AutoModel if teacher.kind == "encoder" else AutoModelForCausalLM
    student: PreTrainedModel = loader.from_config(config, dtype=torch.float32)
    if teacher.kind == "language model":
        student.generation_config = copy.deepcopy(teacher.model.generation_config)
    layers = picked_layers(teacher.model.config.num_hidden_layers, shape.layers)
    selection = _Selection(teacher.model, shape, batches)
    weights = teacher.model.state_dict()
    with torch.no_grad():
        for name, parameter in student.state_dict().items():
            source, layer = _source_name(name, layers)
            if source not in weights:
                raise DistillationError(f"{teacher.folder}: cannot tell which weights become the student's {name}")
            parameter.copy_(selection.of(source, layer, weights[source], parameter.shape))
    return student.eval(), Kept(layers, selection.hidden)


def _source_name(name: str, layers: list[int]) -> tuple[str, int]:
    """Return the name of the teacher's weight that becomes the student's `name`, and its layer, -1 outside of them."""
    found = LAYER.match(name)
    if not found:
        return name, -1
    layer = layers[int(found[2])]
    return f"{found[1]}{layer}{found[3]}", layer


class _Selection:
    """Which indices of each axis are kept."""

    def __init__(self, teacher: PreTrainedModel, shape: Shape, batches: Iterable[Batch]) -> None:
        config = teacher.config
        self._layers = config.num_hidden_layers
        self._narrower = (shape.width, shape.feed_forward) != (config.hidden_size, config.intermediate_size)
        self.hidden = torch.arange(config.hidden_size)
        if not self._narrower:
            return
        size, (heads, groups) = head_size(config), student_heads(config, shape.width)
        use = _Use(teacher, batches)
        self.hidden = _most(use.hidden, shape.width)
        self._units = [_most(used, shape.feed_forward) for used in use.units]
        shared = config.num_attention_heads // (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        self._query, self._key = [], []
        for used in use.attention:
            kept = _most(used.view(-1, shared * size).mean(1), groups)
            self._key.append(_spans(kept, size))
            self._query.append(_spans(kept, shared * size))
        assert heads == groups * shared

    def of(self, name: str, layer: int, weight: Tensor, shape: torch.Size) -> Tensor:
        """Return the kept part of a weight."""
        if not self._narrower:
            return weight
        axes = next((axes for pattern, axes in AXES if re.search(f"{pattern}$", name)), None)
        if axes is None:
            raise DistillationError(
                f"a student cannot be narrower here: the axes of {name} are not known; use --layers"
            )
        for dimension, axis in enumerate(axes[: weight.dim()]):
            kept = self._indices(axis, layer)
            weight = weight if kept is None else weight.index_select(dimension, kept)
        if weight.shape != shape:
            raise DistillationError(
                f"{name} would be {list(weight.shape)}, the student needs {list(shape)}; use --layers"
            )
        return weight

    def _indices(self, axis: Axis, layer: int) -> Tensor | None:
        if axis == "all":
            return None
        if axis == "hidden":
            return self.hidden
        return {"query": self._query, "key": self._key, "units": self._units}[axis][layer]


class _Use:
    """The mean size of activations: of hidden channels, and by layer of feed-forward units and heads' outputs."""

    def __init__(self, model: PreTrainedModel, batches: Iterable[Batch]) -> None:
        layers = model.config.num_hidden_layers
        self.units, self.attention = ([torch.zeros(0)] * layers for _ in range(2))
        self.hidden = torch.zeros(0)
        self._read: Tensor = torch.zeros(0)
        hooks = [
            module.register_forward_pre_hook(self._listener(kinds, int(found[2])))
            for name, module in model.named_modules()
            if (found := LAYER.match(f"{name}"))
            for pattern, kinds in ((FEED_FORWARD_OUT, self.units), (ATTENTION_OUT, self.attention))
            if pattern.search(name)
        ]
        if len(hooks) != 2 * layers:
            raise DistillationError(f"{model.config.model_type} models can only be made shorter: use --layers")
        with torch.no_grad():
            for batch in batches:
                self._read = batch.mask.bool()
                states = model(input_ids=batch.tokens, attention_mask=batch.mask, output_hidden_states=True)
                for state in states.hidden_states:
                    used = state[self._read].abs().mean(0)
                    self.hidden = _added(self.hidden, used / used.mean())
        for hook in hooks:
            hook.remove()

    def _listener(self, kinds: list[Tensor], layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            kinds[layer] = _added(kinds[layer], inputs[0][self._read].abs().mean(0))

        return listen


def _added(total: Tensor, more: Tensor) -> Tensor:
    return total + more.cpu() if len(total) else more.cpu()


def _most(used: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest, in order."""
    return used.topk(count).indices.sort().values


def _spans(kept: Tensor, size: int) -> Tensor:
    """Return the indices of whole spans of `size`."""
    return (kept[:, None] * size + torch.arange(size)).flatten()
