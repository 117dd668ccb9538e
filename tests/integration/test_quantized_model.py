"""A quantized model behind the real server, with the config.pbtxt that the tool wrote."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import np_to_triton_dtype

from scripts.quantization.graph import random_feeds
from scripts.quantization.install import install_encoder
from scripts.serving.server import TritonServer
from tests import quantization_models

MODELS = {
    "classifier": (quantization_models.classifier(), "dynamic-int8", "scores"),
    "text_encoder": (quantization_models.text_encoder(), "row-int8", "embedding"),
    "two_inputs": (quantization_models.two_inputs(), "int4", "both"),
    "fixed_batch": (quantization_models.conv_net(batch=1), "fp16", "scores"),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("repository")
    for name, (model, precision, _) in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        path = quantization_models.store(model, folder)
        made = quantization_models.study(path, folder / "work").add(precision, 0.05)
        install_encoder(made.folder, repository / name, "cpu")
    return repository


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with TritonServer(repository, state_dir=tmp_path_factory.mktemp("state")) as server:
        yield server


@pytest.mark.parametrize("name", MODELS)
def test_what_the_tool_installed_answers_as_the_file_does(server: TritonServer, repository: Path, name: str) -> None:
    model, _, output = MODELS[name]
    feeds = random_feeds(model, 3, 9)
    inputs = []
    for key, value in feeds.items():
        inputs.append(grpc.InferInput(key, value.shape, np_to_triton_dtype(value.dtype)))
        inputs[-1].set_data_from_numpy(value)
    with grpc.InferenceServerClient(server.grpc_url) as client:
        answer = client.infer(name, inputs).as_numpy(output)
    expected = onnxruntime.InferenceSession(repository / name / "1" / "model.onnx").run([output], feeds)[0]
    np.testing.assert_allclose(answer, expected, atol=1e-5)
