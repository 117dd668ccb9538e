"""Llama shapes with random weights, in half precision and with PagedAttention, for the cost of a step."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

POOL = 1 << 24  # random numbers that all weights are cut from: a product's cost does not depend on their values
DEVIATION = 0.02
ROPE_BASE = 10000.0
Half = NDArray[np.float16]


class Llama(NamedTuple):
    """A decoder's shape."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int

    @property
    def weight_bytes(self) -> int:
        """Bytes that a step reads at least: all weights but the embedding, in half precision."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size
        return 2 * (self.layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocabulary)


SHAPES = {
    "1.1B": Llama(2048, 22, 32, 4, 64, 5632, 32000),
    "3B": Llama(3072, 28, 24, 8, 128, 8192, 32000),
    "8B": Llama(4096, 32, 32, 8, 128, 14336, 128256),
}


def write_llama(shape: Llama, folder: Path, context: int, seed: int = 0) -> Path:
    """Write a graph as ONNX Runtime GenAI's builder makes it (use_paged_attention, prune_lm_head); return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    graph = _Graph(folder / "model.onnx.data", np.random.default_rng(seed))
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    for name, table in zip(("cos_cache", "sin_cache"), _rotations(shape.head_size, context), strict=True):
        graph.weight(name, table)
    graph.random("embedding", shape.vocabulary, hidden)
    residual = graph.node("Gather", ["embedding", "input_ids"])
    normed = graph.node("SimplifiedLayerNormalization", [residual, graph.ones("norm", hidden)], **NORM)
    for layer in range(shape.layers):
        packed = graph.product(normed, f"qkv.{layer}", hidden, queries + 2 * keys)
        attended = graph.attention(packed, layer, shape)
        out = graph.product(attended, f"o.{layer}", queries, hidden)
        if layer == shape.layers - 1:  # only some tokens' logits are wanted
            out, residual = (graph.node("Gather", [value, "logits_indices"]) for value in (out, residual))
        normed, residual = graph.skip_norm(residual, out, f"middle.{layer}", hidden)
        gate = graph.product(normed, f"gate.{layer}", hidden, shape.intermediate)
        up = graph.product(normed, f"up.{layer}", hidden, shape.intermediate)
        active = graph.node("Mul", [graph.node("Mul", [gate, graph.node("Sigmoid", [gate])]), up])
        down = graph.product(active, f"down.{layer}", shape.intermediate, hidden)
        normed, residual = graph.skip_norm(residual, down, f"end.{layer}", hidden)
    graph.product(normed, "head", hidden, shape.vocabulary, output="logits")
    graph.save(folder / "model.onnx", shape)
    (folder / "genai_config.json").write_text(json.dumps(_config(shape, context)))
    return folder / "model.onnx"


NORM = {"epsilon": 1e-5, "axis": -1, "stash_type": 1}


class _Graph:
    """Nodes and weights on their way to disk."""

    def __init__(self, data: Path, rng: np.random.Generator) -> None:
        self._data = data.open("wb")
        self._pool = (DEVIATION * rng.standard_normal(POOL, np.float32)).astype(np.float16)
        self._initializers: list[onnx.TensorProto] = []
        self._nodes: list[onnx.NodeProto] = []

    def weight(self, name: str, values: Half) -> str:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=values.shape)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": Path(self._data.name).name, "offset": self._data.tell(), "length": values.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(values.tobytes())
        self._initializers.append(tensor)
        return name

    def random(self, name: str, *shape: int) -> str:
        return self.weight(name, np.resize(self._pool, shape))

    def ones(self, name: str, size: int) -> str:
        return self.weight(name, np.ones(size, np.float16))

    def node(self, kind: str, inputs: list[str], domain: str = "", **attributes: object) -> str:
        output = f"{kind}/{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output

    def product(self, value: str, name: str, rows: int, columns: int, output: str = "") -> str:
        product = output or f"{name}/product"
        self._nodes.append(helper.make_node("MatMul", [value, self.random(name, rows, columns)], [product]))
        return product

    def skip_norm(self, residual: str, value: str, name: str, size: int) -> tuple[str, str]:
        outputs = [f"{name}/normed", "", "", f"{name}/sum"]
        inputs = [residual, value, self.ones(name, size)]
        node = helper.make_node(
            "SkipSimplifiedLayerNormalization", inputs, outputs, domain="com.microsoft", epsilon=NORM["epsilon"]
        )
        self._nodes.append(node)
        return outputs[0], outputs[3]

    def attention(self, packed: str, layer: int, shape: Llama) -> str:
        caches = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        lengths = ["cumulative_sequence_lengths", "past_sequence_lengths", "block_table"]
        inputs = [packed, "", "", *caches, *lengths, "cos_cache", "sin_cache", *[""] * 6, "attention_metadata"]
        outputs = [f"attention/{layer}", *(f"present.{layer}.{kind}" for kind in ("key", "value"))]
        node = helper.make_node(
            "PagedAttention",
            inputs,
            outputs,
            domain="com.microsoft",
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=1,
        )
        self._nodes.append(node)
        return outputs[0]

    def save(self, path: Path, shape: Llama) -> None:
        self._data.close()
        cache = ["blocks", "block_size", shape.kv_heads, shape.head_size]
        integers: dict[str, list[str | int]] = {
            "block_table": ["rows", "columns"],
            "cumulative_sequence_lengths": ["bounds"],
            "past_sequence_lengths": ["rows"],
            "attention_metadata": [3],
            "logits_indices": ["logits"],
        }
        inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["tokens"])]
        inputs += [helper.make_tensor_value_info(name, TensorProto.INT32, dims) for name, dims in integers.items()]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["logits", shape.vocabulary])]
        for layer in range(shape.layers):
            for kind in ("key", "value"):
                inputs.append(
                    helper.make_tensor_value_info(f"past_key_values.{layer}.{kind}", TensorProto.FLOAT16, cache)
                )
                outputs.append(helper.make_tensor_value_info(f"present.{layer}.{kind}", TensorProto.FLOAT16, cache))
        graph = helper.make_graph(self._nodes, "llama", inputs, outputs, self._initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def _config(shape: Llama, context: int) -> dict[str, object]:
    decoder = {
        "filename": "model.onnx",
        "head_size": shape.head_size,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
    }
    sizes = {"vocab_size": shape.vocabulary, "context_length": context, "eos_token_id": 0}
    return {"model": {"decoder": decoder, **sizes}}


def _rotations(head_size: int, context: int) -> tuple[Half, Half]:
    frequencies = ROPE_BASE ** (-np.arange(0, head_size, 2) / head_size)
    angles = np.arange(context)[:, None] * frequencies
    return np.cos(angles).astype(np.float16), np.sin(angles).astype(np.float16)
