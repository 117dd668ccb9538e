"""ONNX models behind the real server: types, batches, completed configs, errors, and the embedder."""

import json
import shutil
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http
from numpy.typing import NDArray
from onnx import TensorProto
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from scripts.serving.errors import ServeError
from scripts.serving.server import MODEL_REPOSITORY, TritonServer
from tests import onnx_models

TYPES = {
    "bool": (TensorProto.BOOL, np.bool_),
    "uint8": (TensorProto.UINT8, np.uint8),
    "uint16": (TensorProto.UINT16, np.uint16),
    "uint32": (TensorProto.UINT32, np.uint32),
    "uint64": (TensorProto.UINT64, np.uint64),
    "int8": (TensorProto.INT8, np.int8),
    "int16": (TensorProto.INT16, np.int16),
    "int32": (TensorProto.INT32, np.int32),
    "int64": (TensorProto.INT64, np.int64),
    "fp16": (TensorProto.FLOAT16, np.float16),
    "fp32": (TensorProto.FLOAT, np.float32),
    "fp64": (TensorProto.DOUBLE, np.float64),
    "string": (TensorProto.STRING, np.object_),
}
TENSORS = """
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] } ]
max_batch_size: 8
"""
SLOW_BATCHES = "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 300000 }"
OPENVINO = 'optimization { execution_accelerators { cpu_execution_accelerator: [ { name: "openvino" } ] } }'
ABACUS = OPENVINO.replace("openvino", "abacus")

# Name -> (config, what the load error says)
UNLOADABLE = {
    "openvino_missing": (TENSORS + OPENVINO, "needs OpenVINOExecutionProvider"),
    "accelerator_unknown": (TENSORS + ABACUS, "unknown Execution Accelerator 'abacus'"),
    "threads_bad": (
        TENSORS + 'parameters { key: "intra_op_thread_count" value: { string_value: "two" } }',
        "'intra_op_thread_count' must be an integer of 0 or more, got 'two'",
    ),
    "input_misnamed": (TENSORS.replace('"x"', '"z"'), "unexpected inference input 'z', allowed inputs are: x"),
    "type_wrong": (
        TENSORS.replace("FP32", "INT64"),
        "expects datatype TYPE_INT64 for input 'x', model provides TYPE_FP32",
    ),
    "dims_wrong": (TENSORS.replace("[ -1 ]", "[ -1, 3 ]"), "tensor 'x': the model expects 2 dimensions"),
    "file_missing": (TENSORS + 'default_model_filename: "other.onnx"', "other.onnx' for model instance"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("repository")
    for name, (data_type, _) in TYPES.items():
        onnx_models.place(repository, name, onnx_models.identity(data_type))
    onnx_models.place(repository, "batch_size", onnx_models.batch_size(), SLOW_BATCHES)
    onnx_models.place(repository, "add", onnx_models.add())
    onnx_models.place(repository, "fixed", onnx_models.identity(shape=(2, 3)))
    onnx_models.place(repository, "scalar", onnx_models.identity(shape=()))
    onnx_models.place(repository, "vector", onnx_models.identity(shape=("batch",)))
    onnx_models.place(repository, "without_config", onnx_models.identity(), config=None)
    onnx_models.place(
        repository, "renamed", onnx_models.identity(), 'default_model_filename: "graph.onnx"', filename="graph.onnx"
    )
    shutil.copytree(MODEL_REPOSITORY / "embedder", repository / "embedder")
    with TritonServer(repository, state_dir=tmp_path_factory.mktemp("state")) as server:
        yield server


@pytest.fixture
def client(server: TritonServer) -> Iterator[grpc.InferenceServerClient]:
    with grpc.InferenceServerClient(server.grpc_url) as client:
        yield client


def grpc_input(name: str, value: NDArray[Any]) -> grpc.InferInput:
    tensor = grpc.InferInput(name, value.shape, np_to_triton_dtype(value.dtype))
    tensor.set_data_from_numpy(value)
    return tensor


def infer(client: grpc.InferenceServerClient, model: str, output: str = "y", **inputs: NDArray[Any]) -> NDArray[Any]:
    return client.infer(model, [grpc_input(name, value) for name, value in inputs.items()]).as_numpy(output)


def config_of(server: TritonServer, model: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/{model}/config") as answer:
        return json.load(answer)


@pytest.mark.parametrize("name", [name for name in TYPES if name != "string"])
def test_every_shared_type_goes_through_unchanged(client: grpc.InferenceServerClient, name: str) -> None:
    kind = np.dtype(TYPES[name][1])
    if kind == np.bool_:
        limits = [False, True]
    else:
        information = np.iinfo(kind) if kind.kind in "iu" else np.finfo(kind)
        limits = [information.min, information.max]
    value = np.array([limits, limits[::-1]], kind)
    answer = infer(client, name, x=value)
    assert answer.dtype == kind
    np.testing.assert_array_equal(answer, value)


def test_strings_go_through_unchanged(client: grpc.InferenceServerClient) -> None:
    texts = [["naïve", "", "日本語"], ["🎉", "line\nbreak", "x" * 100_000]]
    answer = infer(client, "string", x=np.array([[text.encode() for text in row] for row in texts], object))
    assert [[text.decode() for text in row] for row in answer] == texts


def test_strings_go_through_json(server: TritonServer) -> None:
    with http.InferenceServerClient(server.http_url) as client:
        tensor = http.InferInput("x", [1, 2], "BYTES")
        tensor.set_data_from_numpy(np.array([["é", "b"]], object), binary_data=False)
        wanted = http.InferRequestedOutput("y", binary_data=False)
        assert client.infer("string", [tensor], outputs=[wanted]).as_numpy("y").tolist() == [["é", "b"]]


def test_one_run_serves_several_requests(client: grpc.InferenceServerClient) -> None:
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: infer(client, "batch_size", x=np.zeros((1, 1), np.int64)), range(8)))
    assert all(answer.shape == (1, 1) for answer in answers)
    assert max(answer.item() for answer in answers) >= 4


@pytest.mark.parametrize("model", ["fp32", "without_config", "renamed"])
def test_a_config_without_tensors_is_completed(server: TritonServer, model: str) -> None:
    config = config_of(server, model)
    assert [(x["name"], x["data_type"], x["dims"]) for x in config["input"]] == [("x", "TYPE_FP32", [-1])]
    assert [(y["name"], y["data_type"], y["dims"]) for y in config["output"]] == [("y", "TYPE_FP32", [-1])]
    assert config["max_batch_size"] == 4
    assert "dynamic_batching" in config


@pytest.mark.parametrize(("model", "dims"), [("fixed", [2, 3]), ("scalar", [1])])
def test_a_graph_without_a_batch_dimension_is_served_without_batches(
    server: TritonServer, client: grpc.InferenceServerClient, model: str, dims: list[int]
) -> None:
    config = config_of(server, model)
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (0, dims)
    value = np.arange(np.prod(dims), dtype=np.float32).reshape(dims)
    np.testing.assert_array_equal(infer(client, model, x=value), value)


def test_elements_without_dims_are_served_in_batches(client: grpc.InferenceServerClient) -> None:
    value = np.array([[1], [2], [3]], np.float32)
    np.testing.assert_array_equal(infer(client, "vector", x=value), value)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (
            "fixed",
            {"x": np.zeros((3, 3), np.float32)},
            r"unexpected shape for input 'x' .* Expected \[2,3\], got \[3,3\]",
        ),
        ("fp32", {"x": np.zeros(3, np.float32)}, "unexpected shape for input 'x'"),
        ("fp32", {"x": np.zeros((5, 3), np.float32)}, "batch-size must be <= 4"),
        ("fp32", {"x": np.zeros((1, 3), np.int64)}, "input 'x' data-type is 'INT64', but model 'fp32' expects 'FP32'"),
        ("fp32", {"z": np.zeros((1, 3), np.float32)}, "unexpected inference input 'z'"),
        ("add", {"a": np.zeros((1, 3), np.float32)}, r"expected 2 inputs but got 1|missing.*'b'"),
        (
            "add",
            {"a": np.zeros((1, 3), np.float32), "b": np.zeros((1, 4), np.float32)},
            "onnx runtime error .*Add",
        ),
        ("string", {"x": np.array([[b"\xff"]], object)}, "input 'x' must be UTF-8"),
    ],
)
def test_a_bad_request_is_refused_and_the_next_is_served(
    client: grpc.InferenceServerClient, model: str, inputs: dict[str, NDArray[Any]], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message):
        infer(client, model, **inputs)
    good = np.ones((1, 3), np.float32)
    np.testing.assert_array_equal(infer(client, "add", a=good, b=good), 2 * good)


def test_a_bad_config_is_refused_by_field(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for name, (config, _) in UNLOADABLE.items():
        onnx_models.place(repository, name, onnx_models.identity(), config)
    onnx_models.place(repository, "bfloat16", onnx_models.identity(TensorProto.BFLOAT16))
    server = TritonServer(repository, state_dir=tmp_path / "state")
    with pytest.raises(ServeError, match="failed to load"):
        server.start()
    failures = [line for line in server.log.read_text().splitlines() if "failed to load" in line]
    expected = {name: message for name, (_, message) in UNLOADABLE.items()}
    expected["bfloat16"] = "unsupported datatype tensor(bfloat16) for tensor 'x'"
    for name, message in expected.items():
        assert any(f"'{name}'" in line and message in line for line in failures), name


def test_the_embedder_gives_a_sentence_the_same_vector_whoever_calls_beside_it(
    client: grpc.InferenceServerClient,
) -> None:
    sentences = np.random.default_rng(0).integers(1000, 30000, (32, 16))
    mask = np.ones((1, 16), np.int64)

    def embed(ids: NDArray[Any]) -> NDArray[Any]:
        return infer(client, "embedder", "embedding", input_ids=ids[None], attention_mask=mask)[0]

    alone = [embed(ids) for ids in sentences]
    with ThreadPoolExecutor(16) as clients:
        together = list(clients.map(embed, sentences))
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)
