"""Several greedy steps of a draft model in one ONNX Runtime call: for a small model the calls are what costs."""

import time
from copy import deepcopy
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from speculative_decoding.language_model import PADDING, Counts, LanguageModel, Tokens

LARGEST_BYTES = 64 << 20  # of weights; a larger draft spends its time in arithmetic, and each loop has a copy of them

Nodes = list[onnx.NodeProto]


class DraftLoop:
    """A draft model's graph, repeated for each of `steps` tokens, working on that model's own slots."""

    def __init__(self, model: LanguageModel, steps: int) -> None:
        self.steps = steps
        self._model = model
        self._session = model.open_session(unroll(model.graph(), list(model.caches), steps))
        self._calls: dict[tuple[int, int], _BoundLoop] = {}

    def fits(self, rows: int) -> bool:
        """Return whether slots 0 to rows - 1 have room for the two tokens that may be fed, and all steps."""
        return int(self._model.lengths[:rows].max()) + 2 + self.steps <= self._model.context_length

    def run(self, tokens: Tokens, counts: Counts) -> Tokens:
        """Feed row r its first counts[r] of `tokens` [rows, width], and return what follows, [rows, steps].

        A slot then holds all but the last of what follows; one that was fed nothing stays as it is.
        """
        rows, width = tokens.shape
        call = self._calls.get((rows, width)) or self._bind(rows, width)
        lengths = self._model.lengths[:rows]
        call.tokens[:] = tokens
        np.add(counts, PADDING, out=call.counts)
        np.add(lengths, counts, out=call.last_positions)
        call.last_positions += PADDING - 1
        call.total[...] = call.last_positions.max() + 1
        started = time.perf_counter()
        self._session.run_with_iobinding(call.binding)
        self._model.ran_s += time.perf_counter() - started
        lengths += np.where(counts > 0, counts + self.steps - 1, 0).astype(np.int32)
        return call.proposals

    def _bind(self, rows: int, width: int) -> "_BoundLoop":
        call = self._calls[rows, width] = _BoundLoop(self._session, self._model, self.steps, rows, width)
        return call


class _BoundLoop:
    """Inputs and outputs of one number of rows and width, at fixed addresses; every step's keys and values in place."""

    def __init__(self, session: Any, model: LanguageModel, steps: int, rows: int, width: int) -> None:
        self.binding = session.io_binding()
        self.tokens = np.zeros((rows, width), np.int64)
        self.counts = np.zeros(rows, np.int32)
        self.last_positions = np.zeros(rows, np.int32)
        self.total = np.zeros((), np.int32)
        self.proposals = np.zeros((rows, steps), np.int64)
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": self.tokens,
            "query_seqlens": self.counts,
            "seqlens_k": self.last_positions,
            "total_sequence_length": self.total,
            **{f"past_key_values.{name}": cache[:rows] for name, cache in model.caches.items()},
        }
        outputs: dict[str, NDArray[Any]] = {"proposals": self.proposals}
        for step in range(steps):
            outputs |= {_of(step, f"present.{name}"): cache[:rows] for name, cache in model.caches.items()}
        for name, array in inputs.items():
            self.binding.bind_input(_of(0, name), "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            self.binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def unroll(model: onnx.ModelProto, caches: list[str], steps: int) -> onnx.ModelProto:
    """Return a decoder (with explicit lengths and attention's padding) repeated `steps` times, each fed its argmax.

    Its inputs are the first step's; its outputs are `proposals` int64 [batch, steps] and every step's keys and values,
    which the caller binds to one place, so that each step finds what the one before left there.
    """
    graph = model.graph
    constants: dict[str, NDArray[Any]] = {
        "loop/one": np.array(1, np.int32),
        "loop/fed": np.array([1 + PADDING], np.int32),
        "loop/past": np.array(1 + PADDING, np.int64),
        "loop/axis": np.array([1], np.int64),
    }
    shared = {tensor.name for tensor in graph.initializer} | {""}
    nodes = _copy(graph, 0, shared, {}) + _last_choices()
    for step in range(1, steps):
        before = {f"past_key_values.{name}": _of(step - 1, f"present.{name}") for name in caches}
        nodes += _advance(step)
        nodes += _copy(graph, step, shared, {**before, "query_seqlens": "loop/counts"})
        nodes.append(helper.make_node("ArgMax", [_of(step, "logits")], [_of(step, "choice")], axis=2, keepdims=0))
    choices = [_of(step, "choice") for step in range(steps)]
    nodes.append(helper.make_node("Concat", choices, ["proposals"], axis=1))
    inputs = [_renamed(value, 0) for value in graph.input]
    outputs = [helper.make_tensor_value_info("proposals", TensorProto.INT64, ["batch_size", steps])]
    presents = [value for value in graph.output if value.name != "logits"]
    outputs += [_renamed(value, step) for step in range(steps) for value in presents]
    initializers = [*graph.initializer, *(numpy_helper.from_array(value, name) for name, value in constants.items())]
    unrolled = helper.make_graph(nodes, "draft_loop", inputs, outputs, initializers)
    return helper.make_model(unrolled, opset_imports=model.opset_import, ir_version=model.ir_version)


def _of(step: int, name: str) -> str:
    return f"{step}/{name}"


def _copy(graph: onnx.GraphProto, step: int, shared: set[str], given: dict[str, str]) -> Nodes:
    """Return the graph's nodes for one step; `given` names what other nodes provide."""
    copies = []
    for node in graph.node:
        copy = deepcopy(node)
        copy.name = _of(step, node.name or node.output[0])
        for names in (copy.input, copy.output):
            for place, name in enumerate(names):
                names[place] = name if name in shared else given.get(name, _of(step, name))
        copies.append(copy)
    return copies


def _last_choices() -> Nodes:
    """Return the nodes that choose each row's next token after the first step, where rows were fed one or two."""
    return [
        helper.make_node("Cast", [_of(0, "query_seqlens")], ["loop/ends"], to=TensorProto.INT64),
        helper.make_node("Sub", ["loop/ends", "loop/past"], ["loop/lasts"]),
        helper.make_node("Unsqueeze", ["loop/lasts", "loop/axis"], ["loop/places"]),
        helper.make_node("ArgMax", [_of(0, "logits")], ["loop/choices"], axis=2, keepdims=0),
        helper.make_node("GatherElements", ["loop/choices", "loop/places"], [_of(0, "choice")], axis=1),
        helper.make_node("Shape", [_of(0, "query_seqlens")], ["loop/rows"]),
        helper.make_node("Expand", ["loop/fed", "loop/rows"], ["loop/counts"]),
    ]


def _advance(step: int) -> Nodes:
    """Return the nodes that make a step's inputs: the token chosen before, and lengths one greater."""
    nodes = [helper.make_node("Identity", [_of(step - 1, "choice")], [_of(step, "input_ids")])]
    for name in ("seqlens_k", "total_sequence_length"):
        nodes.append(helper.make_node("Add", [_of(step - 1, name), "loop/one"], [_of(step, name)]))
    return nodes


def _renamed(value: onnx.ValueInfoProto, step: int) -> onnx.ValueInfoProto:
    renamed = deepcopy(value)
    renamed.name = _of(step, value.name)
    return renamed
