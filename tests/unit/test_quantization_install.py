"""Into the repository: a config.pbtxt that fits the graph, what is there kept or replaced in one step."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from scripts.quantization import model_file
from scripts.quantization.errors import QuantizationError
from scripts.quantization.install import encoder_config, install_decoder, install_encoder, require_writable
from scripts.quantization.precision import Provider
from tests import onnx_models, quantization_models
from tests.quantization_models import LEFT, RIGHT, WIDTH
from tests.unit.conftest import Export


def config(model: onnx.ModelProto, provider: Provider = "cpu") -> ModelConfig:
    return text_format.Parse(encoder_config(model, provider), ModelConfig())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_config_describes_all_tensors_without_their_batch_dimension() -> None:
    made = config(quantization_models.two_inputs())
    assert made.backend == "onnxruntime"
    assert made.max_batch_size > 1 and made.HasField("dynamic_batching")
    described = [(tensor.name, DataType.Name(tensor.data_type), list(tensor.dims)) for tensor in made.input]
    assert described == [(LEFT, "TYPE_FP32", [WIDTH]), (RIGHT, "TYPE_FP32", [64])]
    assert [(tensor.name, list(tensor.dims)) for tensor in made.output] == [("both", [WIDTH])]


def test_free_dimensions_are_free_in_the_config() -> None:
    made = config(quantization_models.text_encoder())
    assert [(tensor.name, list(tensor.dims)) for tensor in made.input] == [
        ("input_ids", [-1]),
        ("attention_mask", [-1]),
    ]


def test_a_fixed_batch_dimension_is_not_batched() -> None:
    made = config(quantization_models.conv_net(batch=4))
    assert made.max_batch_size == 0 and not made.HasField("dynamic_batching")
    assert list(made.input[0].dims) == [4, 3, 16, 16]


def test_a_vector_a_row_is_reshaped() -> None:
    (tensor,) = config(onnx_models.identity(shape=("batch",))).input
    assert list(tensor.dims) == [1] and tensor.HasField("reshape") and list(tensor.reshape.shape) == []


def test_names_with_quotes_and_backslashes_arrive_whole() -> None:
    model = quantization_models.two_inputs()
    model.graph.input[0].name = 'a "quoted" \\ name'
    assert config(model).input[0].name == 'a "quoted" \\ name'


def test_the_config_names_the_providers_device() -> None:
    model = quantization_models.classifier()
    assert config(model).instance_group[0].kind == ModelConfig().instance_group.add().KIND_CPU
    assert config(model, "cuda").instance_group[0].kind == ModelConfig().instance_group.add().KIND_GPU
    accelerators = config(model, "tensorrt").optimization.execution_accelerators.gpu_execution_accelerator
    assert [accelerator.name for accelerator in accelerators] == ["tensorrt"]


def test_a_config_that_is_there_is_kept(tmp_path: Path) -> None:
    quantization_models.store(quantization_models.classifier(), tmp_path / "made")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.pbtxt").write_text("max_batch_size: 3\n")
    install_encoder(tmp_path / "made", tmp_path / "model", "cpu")
    assert (tmp_path / "model" / "config.pbtxt").read_text() == "max_batch_size: 3\n"
    assert tree(tmp_path / "model").keys() == {"config.pbtxt", "1/model.onnx"}


def test_a_model_that_is_there_is_replaced_in_one_step(tmp_path: Path) -> None:
    """Whoever reads the file meanwhile gets the old model or the new one, whole."""
    for seed in (0, 1):
        quantization_models.store(quantization_models.classifier(seed=seed), tmp_path / str(seed))
    wholes = {(tmp_path / str(seed) / "model.onnx").read_bytes() for seed in (0, 1)}
    destination = tmp_path / "model"
    install_encoder(tmp_path / "0", destination, "cpu")
    seen: set[bytes] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add((destination / "1" / "model.onnx").read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(100):
        install_encoder(tmp_path / str((turn + 1) % 2), destination, "cpu")
    done.set()
    reader.join()
    assert seen == wholes
    assert tree(destination).keys() == {"config.pbtxt", "1/model.onnx"}


def test_external_data_is_replaced_with_its_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_file.save_model, "__defaults__", (1000,))
    destination = tmp_path / "model"
    for seed in (0, 1):
        quantization_models.store(quantization_models.classifier(seed=seed), tmp_path / str(seed), 1000)
        install_encoder(tmp_path / str(seed), destination, "cpu")
    assert sorted(file.suffix for file in (destination / "1").iterdir()) == [".data", ".onnx"]
    model = onnx.load(destination / "1" / "model.onnx")
    expected = onnx.load(tmp_path / "1" / "model.onnx")
    np.testing.assert_array_equal(
        onnx.numpy_helper.to_array(model.graph.initializer[0]),
        onnx.numpy_helper.to_array(expected.graph.initializer[0]),
    )


def test_a_language_model_takes_its_role_and_leaves_the_other(
    exported: Callable[[str], Export], tmp_path: Path
) -> None:
    folder = exported("llama-row-int8").folder
    (tmp_path / "1" / "draft").mkdir(parents=True)
    (tmp_path / "1" / "draft" / "model.onnx").write_text("the draft")
    (tmp_path / "1" / "target").mkdir()
    (tmp_path / "1" / "target" / "stale").write_text("old")
    install_decoder(folder, tmp_path, "target")
    assert tree(tmp_path / "1" / "target") == tree(folder)
    assert (tmp_path / "1" / "draft" / "model.onnx").read_text() == "the draft"
    assert {file.name for file in (tmp_path / "1").iterdir()} == {"draft", "target"}
    assert text_format.Parse((tmp_path / "config.pbtxt").read_text(), ModelConfig()).backend


def test_asking_whether_a_folder_can_be_written_leaves_no_trace(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.pbtxt").write_text("kept")
    require_writable(tmp_path / "model")
    assert tree(tmp_path) == {"model/config.pbtxt": b"kept"}
    require_writable(tmp_path / "model" / "1")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["config.pbtxt"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    for destination in (tmp_path / "model", tmp_path / "model" / "deeper"):
        with pytest.raises(QuantizationError, match=f"cannot write to {destination}: "):
            require_writable(destination)
