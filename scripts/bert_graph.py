"""A BERT encoder as an ONNX graph: embeddings, layers, and what a model puts on top of them.

The graph is written down operator by operator, with ONNX Runtime's fused operators, rather than exported and then
searched for patterns to fuse: it is short, it does not change with an exporter, and it is made in a second.

Padding lets texts of unequal lengths share a batch, and costs nothing but in attention: all else runs on the texts'
tokens, one after the other without gaps (ByteTransformer, Zhai et al. 2022, arXiv 2210.03052).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

Float = NDArray[np.float32]

FUSED = "com.microsoft"
OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid(FUSED, 1)]
IR_VERSION = 10  # older ONNX Runtimes refuse the versions that newer onnx packages write


class BertGraph:
    """Builds the graph from front to back; a method adds nodes and returns the name of their output."""

    def __init__(self, config: Mapping[str, int], weights: Mapping[str, Float]) -> None:
        self.config = config
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.mask = self.add("Cast", ["attention_mask"], "mask", to=TensorProto.INT32)
        self._find_tokens()

    def model(self, name: str, inputs: Sequence[str], output: str, width: int) -> onnx.ModelProto:
        """Return the finished graph: INT64 `inputs` [batch, sequence] to the FP32 `output` [batch, width]."""
        given = [_tensor(text, TensorProto.INT64, "batch", "sequence") for text in inputs]
        result = _tensor(output, TensorProto.FLOAT, "batch", width)
        graph = helper.make_graph(self.nodes, name, given, [result], self.constants)
        return helper.make_model(graph, opset_imports=OPSETS, ir_version=IR_VERSION)

    def _find_tokens(self) -> None:
        """Where the tokens are in the padded batch (`places` [tokens]), and back (`rows` [batch, sequence]).

        A row without tokens, as Triton's warmup sends, counts as full of them: nothing of it reaches the pooled vector.
        """
        for name, number in (("zero", 0), ("one", 1)):
            self.constant(name, np.array(number))
            self.constant(f"{name}s", np.array([number]))
        self.constant("flat", np.array([-1]))
        self.constant("flat_rows", np.array([-1, self.config["hidden_size"]]))
        is_token = self.add("Cast", ["attention_mask"], "is_token", to=TensorProto.BOOL)
        first = self.add("Slice", [is_token, "zeros", "ones", "ones"], "first")
        kept = self.add("Or", [is_token, self.add("Not", [first], "is_empty")], "kept")
        kept = self.add("Reshape", [kept, "flat"], "kept_flat")
        self.add("Squeeze", [self.add("NonZero", [kept], "kept_places"), "zeros"], "places")
        numbers = self.add("CumSum", [self.add("Cast", [kept], "kept_ones", to=TensorProto.INT64), "zero"], "numbers")
        numbers = self.add("Sub", [numbers, "one"], "numbers_from_zero")
        self.add("Reshape", [numbers, self.add("Shape", ["input_ids"], "shape")], "rows")

    def packed(self, x: str) -> str:
        """[batch, sequence, hidden] -> [tokens, hidden]."""
        return self.add("Gather", [self.add("Reshape", [x, "flat_rows"], f"{x}/flat"), "places"], f"{x}/packed", axis=0)

    def padded(self, x: str) -> str:
        """[tokens, width] -> [batch, sequence, width]; padding repeats a token before it, and attention ignores it."""
        return self.add("Gather", [x, "rows"], f"{x}/padded", axis=0)

    def embeddings(self, types: str | None = None) -> str:
        """Words, positions and types [tokens, hidden]; without an input `types`, all tokens are of type 0."""
        positions, kinds = (self.weights[f"embeddings.{name}_embeddings.weight"] for name in ("position", "token_type"))
        table = self.constant("positions", positions if types else positions + kinds[0])
        length = self.add("Shape", ["input_ids"], "length", start=1, end=2)
        places = self.add("Slice", [table, "zeros", length], "position_vectors")
        words = self.add("Gather", [self.weight("embeddings.word_embeddings.weight"), "input_ids"], "words")
        total = self.add("Add", [words, places], "sum")
        if types:
            total = self.add("Add", [total, self.add("Gather", [self.constant("types", kinds), types], "kinds")], "all")
        name, epsilon = "embeddings.LayerNorm", self.config["layer_norm_eps"]
        return self.add("LayerNormalization", [self.packed(total), *self.norm(name)], name, epsilon=epsilon)

    def layer(self, number: int, x: str) -> str:
        """A transformer layer, [tokens, hidden] to the same."""
        name = f"encoder.layer.{number}"
        attention = f"{name}.attention"
        parts = [f"{attention}.self.{part}" for part in ("query", "key", "value")]
        matrix = np.concatenate([self.weights[f"{part}.weight"] for part in parts]).T
        bias = self.constant(f"{attention}.bias", np.concatenate([self.weights[f"{part}.bias"] for part in parts]))
        product = self.add("MatMul", [x, self.constant(f"{attention}.matrix", matrix)], f"{attention}.self")
        split = helper.make_node(
            "Split", [self.padded(product)], parts, name=f"{attention}.split", axis=-1, num_outputs=3
        )
        self.nodes.append(split)
        context = self.add(
            "MultiHeadAttention",
            [*parts, bias, self.mask],
            f"{attention}.context",
            domain=FUSED,
            num_heads=self.config["num_attention_heads"],
        )
        x = self.residual(f"{attention}.output", self.packed(context), x)
        dense = f"{name}.intermediate.dense"
        wide = self.product(dense, x)
        wide = self.add("BiasGelu", [wide, self.weight(f"{dense}.bias")], f"{dense}.gelu", domain=FUSED)
        return self.residual(f"{name}.output", wide, x)

    def residual(self, name: str, x: str, skip: str) -> str:
        """LayerNorm(dense(x) + skip).

        In single steps: ONNX Runtime's SkipLayerNormalization takes 2.5 times as long on a CPU.
        """
        biased = self.add(
            "Add", [self.product(f"{name}.dense", x), self.weight(f"{name}.dense.bias")], f"{name}.biased"
        )
        total = self.add("Add", [biased, skip], f"{name}.sum")
        norm, epsilon = f"{name}.LayerNorm", self.config["layer_norm_eps"]
        return self.add("LayerNormalization", [total, *self.norm(norm)], norm, epsilon=epsilon)

    def product(self, name: str, x: str) -> str:
        return self.add("MatMul", [x, self.constant(f"{name}.matrix", self.weights[f"{name}.weight"].T)], name)

    def norm(self, name: str) -> list[str]:
        return [self.weight(f"{name}.weight"), self.weight(f"{name}.bias")]

    def weight(self, name: str) -> str:
        return self.constant(name, self.weights[name])

    def constant(self, name: str, value: ArrayLike) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, operator: str, inputs: list[str], output: str, **attributes: int | float | str) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output


def _tensor(name: str, data_type: int, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, data_type, shape)
