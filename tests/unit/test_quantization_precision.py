"""Every precision on every kind of model: it loads, is smaller and close to fp32, and says how it was made."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from scripts.quantization.errors import QuantizationError
from scripts.quantization.graph import weighted_nodes
from scripts.quantization.model_file import recorded
from scripts.quantization.precision import (
    PRECISIONS,
    PROVIDERS,
    Options,
    Precision,
    candidates,
    require_runs,
    slower_there,
)
from scripts.quantization.study import Study
from tests import quantization_models
from tests.quantization_models import LEFT, RIGHT, WIDTH
from tests.unit.conftest import Export

# Model -> how to build it, and the largest size by precision, as a fraction of fp32.
SMALL = {"dynamic-int8": 0.3, "static-int8": 0.31, "fp16": 0.52, "int4": 0.2, "row-int8": 0.3}
MODELS = {
    "classifier": (quantization_models.classifier, SMALL),
    "conv_net": (quantization_models.conv_net, SMALL | {"int4": 0.65, "row-int8": 0.66}),  # convolutions stay fp32
    "two_inputs": (quantization_models.two_inputs, SMALL),
    # Its table of positions stays fp32, and its table of words is in INT8 at best.
    "text_encoder": (quantization_models.text_encoder, dict.fromkeys(PRECISIONS, 0.4) | {"fp16": 0.52}),
}
DECODER = {"dynamic-int8": 0.4, "static-int8": 0.4, "fp16": 0.6, "int4": 0.35, "row-int8": 0.4}
TEXTS = ["Is it far?", "The quick brown fox jumps over the lazy dog.", "Mind the gap", "2 + 2 = 4"]
NO_FLOOR = 0.05  # far above what any of these loses: nothing is left out


def calibration(name: str, folder: Path) -> Path:
    """Write 24 samples for the model of that name."""
    rng = np.random.default_rng(0)
    shapes = {
        "classifier": {"x": [WIDTH]},
        "conv_net": {"image": [3, 16, 16]},
        "two_inputs": {LEFT: [WIDTH], RIGHT: [64]},
    }
    if name in shapes:
        arrays = {key: rng.standard_normal((24, *shape)).astype(np.float32) for key, shape in shapes[name].items()}
        np.savez(folder / "calibration.npz", **arrays)
        return folder / "calibration.npz"
    path = folder / "calibration.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 6))
    return path


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Study]:
    """Return the study of the model of that name; `folder`/model.onnx is its source."""
    made: dict[str, Study] = {}

    def get(name: str) -> Study:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            path = quantization_models.store(MODELS[name][0](), folder)
            made[name] = quantization_models.study(path, folder / "work", calibration(name, folder))
        return made[name]

    return get


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_becomes_smaller_and_stays_close(
    studies: Callable[[str], Study], name: str, precision: Precision
) -> None:
    study = studies(name)
    source = study.subject.folder / "model.onnx"
    before = source.read_bytes()
    result = study.add(precision, NO_FLOOR)
    assert result.size_bytes <= MODELS[name][1][precision] * study.results["fp32"].size_bytes
    assert result.quality["cosine_mean"] >= {"fp16": 0.99999, "int4": 0.98}.get(precision, 0.999)
    assert not result.excluded
    assert source.read_bytes() == before

    made, original = (onnx.load(path) for path in (result.folder / "model.onnx", source))
    onnx.checker.check_model(original)
    assert made.graph.input == original.graph.input  # names, types and free dimensions
    assert [value.name for value in made.graph.output] == [value.name for value in original.graph.output]
    how = recorded(made)
    assert how["precision"] == precision
    assert how["excluded"] == []
    assert how["options"]["calibration_method"] == "minmax"
    # The digest of digests of the files that the model consists of.
    assert how["source_sha256"] == hashlib.sha256(hashlib.sha256(before).digest()).hexdigest()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_decoder_becomes_smaller_and_stays_close(
    exported: Callable[[str], Export], tmp_path: Path, precision: Precision
) -> None:
    folder = exported("llama-fp32").folder
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    study = quantization_models.study(folder, tmp_path / "work", calibration=data, evaluation=data)
    result = study.add(precision, most_loss=0.2)
    assert result.size_bytes <= DECODER[precision] * study.results["fp32"].size_bytes
    assert result.quality["perplexity_ratio"] < (1.1 if precision == "int4" else 1.02)
    assert result.quality["greedy_agreement"] > (0.4 if precision == "int4" else 0.9)  # random logits are near ties
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert recorded(onnx.load(result.folder / "model.onnx"))["precision"] == precision
    assert {file.name for file in result.folder.iterdir()} == set(before)  # a folder that the backend can serve
    if precision in ("row-int8", "int4"):
        assert result.rows_independent
    if precision == "dynamic-int8":
        assert not result.rows_independent


@pytest.mark.parametrize("name", ["classifier", "two_inputs", "text_encoder"])
def test_rows_are_independent_in_row_int8_and_not_in_dynamic_int8(studies: Callable[[str], Study], name: str) -> None:
    study = studies(name)
    assert study.results["fp32"].rows_independent
    assert study.add("row-int8", NO_FLOOR).rows_independent
    assert not study.add("dynamic-int8", NO_FLOOR).rows_independent


def test_dynamic_int8_has_a_scale_for_each_channel(studies: Callable[[str], Study]) -> None:
    made = onnx.load(studies("classifier").add("dynamic-int8", NO_FLOOR).folder / "model.onnx")
    scales = [list(tensor.dims) for tensor in made.graph.initializer if tensor.name.endswith("_scale")]
    assert [WIDTH] in scales


@pytest.mark.parametrize("name", ["classifier", "conv_net", "two_inputs", "text_encoder"])
def test_static_int8_quantizes_every_product_with_weights(studies: Callable[[str], Study], name: str) -> None:
    study = studies(name)
    made = onnx.load(study.add("static-int8", NO_FLOOR).folder / "model.onnx")
    weighted = {"MatMul", "Conv", "Gemm"}
    total = len(weighted_nodes(study.subject.model))
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in made.graph.node}
    dequantized = {node.output[0] for node in made.graph.node if node.op_type == "DequantizeLinear"}
    inner = [node for node in made.graph.node if node.op_type in weighted and dequantized.issuperset(node.input[:2])]
    assert len(inner) == total > 0


def test_a_graph_of_a_fixed_batch_is_quantized(tmp_path: Path) -> None:
    path = quantization_models.store(quantization_models.conv_net(batch=2), tmp_path)
    study = quantization_models.study(path, tmp_path / "work", calibration("conv_net", tmp_path))
    assert study.add("static-int8", NO_FLOOR).quality["cosine_mean"] >= 0.999


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_takes_its_block_size_and_symmetry(tmp_path: Path, block_size: int, symmetric: bool) -> None:
    path = quantization_models.store(quantization_models.classifier(), tmp_path)
    options = Options(block_size=block_size, symmetric=symmetric)
    made = quantization_models.study(path, tmp_path / "work", options=options)._source.make("int4")
    nodes = [node for node in made.graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 3
    for node in nodes:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        assert attributes["block_size"] == block_size
        assert attributes["bits"] == 4
        assert attributes["accuracy_level"] == 4
        assert (len([name for name in node.input if name]) == 3) == symmetric  # a fourth: zero points
    onnxruntime.InferenceSession(made.SerializeToString())


def test_the_prepared_graph_holds_each_weight_once(tmp_path: Path) -> None:
    model = quantization_models.classifier()
    path = quantization_models.store(model, tmp_path)
    prepared = quantization_models.study(path, tmp_path / "work")._source.prepared
    weights = [tensor for tensor in prepared.graph.initializer if len(tensor.dims) == 2]
    assert len(weights) == 3
    assert len({node.name for node in prepared.graph.node}) == len(prepared.graph.node)


def test_a_graph_whose_shapes_cannot_be_inferred_leaves_nothing_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = quantization_models.store(quantization_models.text_encoder(), tmp_path / "source")
    study = quantization_models.study(path, tmp_path / "work")
    monkeypatch.chdir(elsewhere)
    study.add("dynamic-int8", NO_FLOOR)
    assert list(elsewhere.iterdir()) == []


def test_calibration_of_a_plain_model_does_not_hinder_any_precision(tmp_path: Path) -> None:
    """There is no normalisation here, so there are no channels to smooth."""
    path = quantization_models.store(quantization_models.classifier(), tmp_path)
    study = quantization_models.study(path, tmp_path / "work", calibration("classifier", tmp_path))
    made = study._source.make("dynamic-int8")
    plain = quantization_models.study(path, tmp_path / "plain")._source.make("dynamic-int8")
    assert [node.op_type for node in made.graph.node] == [node.op_type for node in plain.graph.node]


def test_the_best_is_the_fastest_within_the_floor(tmp_path: Path) -> None:
    path = quantization_models.store(quantization_models.classifier(), tmp_path)
    study = quantization_models.study(path, tmp_path / "work")
    for precision in ("fp16", "int4", "row-int8"):
        study.add(precision, NO_FLOOR)
    study.measure_speed()
    results = study.results.values()
    assert all(result.latency.keys() == {1, 8, 32} for result in results)
    assert all(latency.p50_ms <= latency.p95_ms for result in results for latency in result.latency.values())
    assert all(0 < result.peak_memory_mib < 2000 for result in results)
    for floor in (0.0, 1e-6, 0.002, 0.05):
        kept = [result for result in results if result.loss <= floor]
        assert study.best(floor) is min(kept, key=lambda result: result.latency[8].p50_ms)
    assert study.best(0.0).precision == "fp32"


def test_static_int8_without_calibration_data_is_refused(tmp_path: Path) -> None:
    path = quantization_models.store(quantization_models.classifier(), tmp_path)
    study = quantization_models.study(path, tmp_path / "work")
    with pytest.raises(QuantizationError, match="static-int8 needs calibration data: give --calibration"):
        study.add("static-int8", NO_FLOOR)


def test_auto_tries_what_the_hardware_is_fast_in() -> None:
    assert candidates("cpu", calibrated=True) == ["dynamic-int8", "static-int8", "int4", "row-int8"]
    assert "static-int8" not in candidates("cpu", calibrated=False)
    assert candidates("cuda", calibrated=True) == ["fp16", "int4"]
    assert candidates("tensorrt", calibrated=True) == ["fp16", "static-int8"]


@pytest.mark.parametrize(
    ("precision", "provider", "complaint"),
    [
        ("row-int8", "tensorrt", "tensorrt has no kernels for row-int8; it runs static-int8, fp16, fastest fp16"),
        ("dynamic-int8", "cuda", "cuda has no kernels for dynamic-int8"),
        ("int4", "tensorrt", "tensorrt has no kernels for int4"),
        ("fp16", "cuda", "this onnxruntime has no CUDAExecutionProvider: install onnxruntime-gpu to use cuda"),
    ],
)
def test_what_a_provider_lacks_is_refused(precision: Precision, provider: str, complaint: str) -> None:
    if PROVIDERS[provider] in onnxruntime.get_available_providers() and "this onnxruntime" in complaint:
        pytest.skip(f"this onnxruntime has {provider}")
    with pytest.raises(QuantizationError, match=complaint):
        require_runs(precision, provider)


def test_a_precision_that_is_no_faster_there_brings_a_warning(studies: Callable[[str], Study]) -> None:
    assert slower_there("int4", "cpu") is None
    assert slower_there("static-int8", "cuda") is not None
    warning = studies("classifier").add("fp16", NO_FLOOR).warning
    assert warning is not None and warning.startswith("fp16 saves memory but no time on cpu")


def test_a_stored_model_is_complete_without_its_source(studies: Callable[[str], Study], tmp_path: Path) -> None:
    folder = studies("two_inputs").add("row-int8", NO_FLOOR).folder
    shutil.copy(folder / "model.onnx", tmp_path)
    feeds = {LEFT: np.ones((2, WIDTH), np.float32), RIGHT: np.ones((2, 64), np.float32)}
    assert np.isfinite(onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, feeds)[0]).all()
