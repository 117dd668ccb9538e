"""The pair model as an ONNX graph: are two texts the same request? A cross-encoder on the sentence encoder's layers.

Both texts are read at once, so that each word can look for its partner in the other (Nogueira & Cho 2019, arXiv
1901.04085). scripts.train_pair_model makes it as low-rank changes to the encoder's weights (LoRA, Hu et al. 2021, arXiv
2106.09685), which is what `adapters.safetensors` holds.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from safetensors.numpy import load_file

from scripts.bert_graph import FUSED, BertGraph
from scripts.serving.installation import MODEL_REPOSITORY

ADAPTERS = MODEL_REPOSITORY / "pair_model" / "adapters.safetensors"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
DOWN, UP = ".down", ".up"  # of a matrix W [out, in]: W + up [out, rank] @ down [rank, in]

Weights = dict[str, NDArray[np.float32]]


def pair_model(encoder: Path, adapters: Path = ADAPTERS) -> onnx.ModelProto:
    """Build the fp32 model from a Hugging Face BERT folder and what was trained on top of it.

    Inputs, INT64 [batch, sequence], padded on the right: input_ids ([CLS] first [SEP] second [SEP]), attention_mask,
    token_type_ids (1 in the second text). Output: logit, FP32 [batch, 1], above 0 where the two are rather the same
    request.
    """
    config = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
    graph = BertGraph(config, merged(load_file(encoder / "model.safetensors"), load_file(adapters)))
    x = graph.embeddings("token_type_ids")
    for layer in range(config["num_hidden_layers"]):
        x = graph.layer(layer, x)
    wide = graph.add(
        "BiasGelu", [graph.product("dense", _compared(graph, x)), graph.weight("dense.bias")], "gelu", domain=FUSED
    )
    graph.add("Add", [graph.product("out", wide), graph.weight("out.bias")], "logit")
    return graph.model("pair_model", INPUTS, "logit", 1)


def _compared(graph: BertGraph, x: str) -> str:
    """[CLS], and the means over both texts' tokens: their product, difference and sum [batch, 4 hidden]."""
    mask, second = (graph.add("Cast", [name], f"{name}/float", to=TensorProto.FLOAT) for name in INPUTS[1:])
    one = graph.add("Sub", [mask, second], "one/mask")  # padding is of type 0
    padded = graph.padded(x)
    means = [_mean(graph, padded, name, row) for name, row in (("one", one), ("other", second))]
    first_token = graph.add("Slice", [padded, "zeros", "ones", "ones"], "first_token")
    product, total = graph.add("Mul", means, "product"), graph.add("Add", means, "total")
    apart = graph.add("Abs", [graph.add("Sub", means, "difference")], "apart")
    return graph.add(
        "Concat", [graph.add("Squeeze", [first_token, "ones"], "cls"), product, apart, total], "compared", axis=-1
    )


def _mean(graph: BertGraph, padded: str, name: str, mask: str) -> str:
    row = graph.add("Unsqueeze", [mask, "ones"], f"{name}/row")
    total = graph.add("Squeeze", [graph.add("MatMul", [row, padded], f"{name}/sums"), "ones"], f"{name}/sum")
    return graph.add(
        "Div", [total, graph.add("ReduceSum", [mask, "ones"], f"{name}/tokens", keepdims=1)], f"{name}/mean"
    )


def merged(base: Weights, learned: Weights) -> Weights:
    """Return the encoder's weights as learned."""
    weights = dict(base)
    for name, value in learned.items():
        if name.endswith(DOWN):
            module = name.removesuffix(DOWN)
            change = learned[module + UP].astype(np.float32) @ value.astype(np.float32)
            weights[f"{module}.weight"] = base[f"{module}.weight"] + change
        elif not name.endswith(UP):
            weights[name] = value.astype(np.float32)
    return weights
