"""Small fp32 models for tests of the quantization tool, and the study of one."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from scripts.quantization.model_file import save_model
from scripts.quantization.precision import Options
from scripts.quantization.study import Study
from scripts.quantization.subject import open_subject
from tests import language_models

Float = NDArray[np.float32]
Sizes = list[str | int]

WIDTH, CLASSES, VOCABULARY = 128, 10, 300
LEFT, RIGHT = "left hand/µ:0", "right.hand"  # input names as exporters write them, and worse


def classifier(opset: int = 18, seed: int = 0) -> onnx.ModelProto:
    """x [batch, 128] -> scores [batch, 10]: three Gemms without node names."""
    weights = _weights(seed, [(WIDTH, WIDTH), (WIDTH, WIDTH), (CLASSES, WIDTH)])
    nodes, x = [], "x"
    for index in range(3):
        y = "scores" if index == 2 else f"y{index}"
        nodes.append(helper.make_node("Gemm", [x, f"w{index}", f"b{index}"], [y], transB=1))
        if index < 2:
            nodes.append(helper.make_node("Relu", [y], [f"{y}/relu"]))
            x = f"{y}/relu"
    return model(nodes, weights, {"x": ["batch", WIDTH]}, {"scores": ["batch", CLASSES]}, opset)


def conv_net(batch: str | int = "batch") -> onnx.ModelProto:
    """image [batch, 3, 16, 16] -> scores [batch, 10]: convolutions with pooling between, and two Gemms."""
    weights = _weights(1, [(32, 3, 3, 3), (64, 32, 3, 3), (256, 64), (CLASSES, 256)])
    nodes = [
        helper.make_node("Conv", ["image", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("MaxPool", ["r0"], ["p0"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p0", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("GlobalAveragePool", ["r1"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r2"]),
        helper.make_node("Gemm", ["r2", "w3", "b3"], ["scores"], transB=1),
    ]
    return model(nodes, weights, {"image": [batch, 3, 16, 16]}, {"scores": [batch, CLASSES]})


def text_encoder(longest: int = 256) -> onnx.ModelProto:
    """input_ids and attention_mask [batch, sequence] -> embedding [batch, 64], of texts up to `longest` tokens."""
    rng = np.random.default_rng(2)
    hidden, wide = 64, 512
    weights = {
        "table": _normal(rng, VOCABULARY, hidden, scale=1.0),
        "places": _normal(rng, longest, hidden, scale=0.1),
        "gain": np.ones(hidden, np.float32),
        "shift": np.zeros(hidden, np.float32),
        "up": _normal(rng, hidden, wide),
        "down": _normal(rng, wide, hidden),
        "start": np.array([0]),
        "axis": np.array([1]),
    }
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["length"], start=1, end=2),
        helper.make_node("Slice", ["places", "start", "length"], ["positions"]),
        helper.make_node("Gather", ["table", "input_ids"], ["words"], name="words"),
        helper.make_node("Add", ["words", "positions"], ["embedded"]),
        helper.make_node("LayerNormalization", ["embedded", "gain", "shift"], ["normed"], name="norm"),
        helper.make_node("MatMul", ["normed", "up"], ["wide"], name="up"),
        helper.make_node("Tanh", ["wide"], ["bent"]),
        helper.make_node("MatMul", ["bent", "down"], ["narrow"], name="down"),
        helper.make_node("Add", ["narrow", "embedded"], ["states"]),
        helper.make_node("Cast", ["attention_mask"], ["ones"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["ones", "axis"], ["row"]),
        helper.make_node("MatMul", ["row", "states"], ["total"]),
        helper.make_node("Squeeze", ["total", "axis"], ["embedding"]),
    ]
    ids: dict[str, Sizes] = {name: ["batch", "sequence"] for name in ("input_ids", "attention_mask")}
    return model(nodes, weights, ids, {"embedding": ["batch", hidden]}, kind=TensorProto.INT64)


def two_inputs() -> onnx.ModelProto:
    """LEFT [batch, 128] and RIGHT [batch, 64] -> both [batch, 128]: a product of each, summed."""
    weights = _weights(3, [(WIDTH, WIDTH), (64, WIDTH)], biases=False)
    nodes = [
        helper.make_node("MatMul", [LEFT, "w0"], ["l"]),
        helper.make_node("MatMul", [RIGHT, "w1"], ["r"]),
        helper.make_node("Add", ["l", "r"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["both"]),
    ]
    return model(nodes, weights, {LEFT: ["batch", WIDTH], RIGHT: ["batch", 64]}, {"both": ["batch", WIDTH]})


def fragile() -> onnx.ModelProto:
    """x [batch, 128] -> y [batch, 128]: three products, of which the one named "fragile" reads outliers.

    A channel a thousand times the others takes all of their INT8 resolution, and its weights of zero throw it away.
    """
    weights = _weights(4, [(WIDTH, WIDTH)] * 3, biases=False)
    outlier = np.ones(WIDTH, np.float32)
    outlier[5] = 3000.0
    weights["w1"][5] = 0
    weights["outlier"] = outlier
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], name="first"),
        helper.make_node("Tanh", ["a"], ["bent"]),
        helper.make_node("Mul", ["bent", "outlier"], ["spiked"]),
        helper.make_node("MatMul", ["spiked", "w1"], ["b"], name="fragile"),
        helper.make_node("Tanh", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w2"], ["y"], name="last"),
    ]
    return model(nodes, weights, {"x": ["batch", WIDTH]}, {"y": ["batch", WIDTH]})


def model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, NDArray],
    inputs: dict[str, Sizes],
    outputs: dict[str, Sizes],
    opset: int = 18,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A graph of `nodes`, from inputs of the type `kind` to fp32 outputs."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def store(model: onnx.ModelProto, folder: Path, one_file_bytes: int = 1 << 30) -> Path:
    """Write `model` to `folder`/model.onnx, with a tokenizer.json where it takes tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder, one_file_bytes)
    if "input_ids" in {value.name for value in model.graph.input}:
        language_models.tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "model.onnx"


def study(
    path: Path,
    work: Path,
    calibration: Path | None = None,
    evaluation: Path | None = None,
    options: Options | None = None,
) -> Study:
    """Open the model at `path` as the command does."""
    work.mkdir(parents=True, exist_ok=True)
    subject = open_subject(path, work, None, upgrade_opset=False)
    source = subject.source(calibration, options or Options())
    return Study(subject, source, work, "cpu", evaluation, lambda message: None)


def _weights(seed: int, shapes: list[tuple[int, ...]], biases: bool = True) -> dict[str, NDArray]:
    """w0, w1, ... and, with `biases`, b0, b1, ... for the first axis of each."""
    rng = np.random.default_rng(seed)
    weights: dict[str, NDArray] = {}
    for index, shape in enumerate(shapes):
        weights[f"w{index}"] = _normal(rng, *shape, scale=float(np.prod(shape[1:])) ** -0.5)
        if biases:
            weights[f"b{index}"] = _normal(rng, shape[0])
    return weights


def _normal(rng: np.random.Generator, *shape: int, scale: float = 0.1) -> Float:
    return (scale * rng.standard_normal(shape)).astype(np.float32)
