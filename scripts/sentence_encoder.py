"""A BERT sentence encoder as an ONNX graph: mean pooling and L2 normalisation on top of the layers."""

import json
from pathlib import Path

import onnx
from onnx import TensorProto
from safetensors.numpy import load_file

from scripts.bert_graph import BertGraph


def sentence_encoder(folder: Path) -> onnx.ModelProto:
    """Build the fp32 encoder of a Hugging Face BERT `folder` (config.json, model.safetensors).

    Inputs: input_ids and attention_mask, INT64 [batch, sequence], padded on the right. Output: embedding, FP32 [batch,
    hidden], of length 1. A sentence that is all padding gives zeros.
    """
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    graph = BertGraph(config, weights)
    x = graph.embeddings()
    for layer in range(config["num_hidden_layers"]):
        x = graph.layer(layer, x)
    _pool(graph, x)
    return graph.model("sentence_encoder", ("input_ids", "attention_mask"), "embedding", config["hidden_size"])


def _pool(graph: BertGraph, x: str) -> None:
    """The mean over a sentence's tokens, scaled to length 1: the sum does as well."""
    weights = graph.add("Cast", ["attention_mask"], "token_weights", to=TensorProto.FLOAT)
    total = graph.add("MatMul", [graph.add("Unsqueeze", [weights, "ones"], "row"), graph.padded(x)], "total")
    graph.add("LpNormalization", [graph.add("Squeeze", [total, "ones"], "pooled")], "embedding", axis=-1, p=2)
