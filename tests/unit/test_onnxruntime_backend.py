"""The onnxruntime backend without Triton: settings, signatures and sessions."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests import onnx_models

sys.path.append(str(Path(__file__).parents[2] / "python_backends" / "onnxruntime"))

from onnx_session import InvalidInputError, OnnxSession
from onnx_settings import SessionSettings, default_max_batch_size, session_settings
from onnx_signature import GraphTensor, Signature, complete, validate


def settings(kind: str = "CPU", **config: Any) -> SessionSettings:
    return session_settings(config, kind, "3")


def parameters(**values: str) -> dict[str, dict[str, str]]:
    return {key: {"string_value": value} for key, value in values.items()}


def accelerators(kind: str, name: str, **options: str) -> dict[str, Any]:
    return {"execution_accelerators": {f"{kind}_execution_accelerator": [{"name": name, "parameters": options}]}}


def load(tmp_path: Path, model: onnx.ModelProto, **config: Any) -> OnnxSession:
    onnx.save(model, tmp_path / "model.onnx")
    return OnnxSession(tmp_path / "model.onnx", settings(**config))


def config(**fields: Any) -> dict[str, Any]:
    return {"name": "m", "max_batch_size": 0, "input": [], "output": [], **fields}


def entry(name: str, *dims: int, data_type: str = "TYPE_FP32", **fields: Any) -> dict[str, Any]:
    return {"name": name, "data_type": data_type, "dims": list(dims), **fields}


# Settings


def test_defaults_leave_the_choice_to_onnx_runtime() -> None:
    chosen = settings()
    assert (chosen.graph_level, chosen.execution_mode) == ("ORT_ENABLE_ALL", "ORT_SEQUENTIAL")
    assert (chosen.intra_op_threads, chosen.inter_op_threads) == (0, 0)
    assert chosen.memory_arena and chosen.memory_pattern
    assert chosen.providers == ()


@pytest.mark.parametrize(
    ("level", "name"),
    [(-1, "ORT_ENABLE_BASIC"), (0, "ORT_ENABLE_ALL"), (1, "ORT_ENABLE_EXTENDED"), (2, "ORT_DISABLE_ALL")],
)
def test_graph_levels_mean_what_they_mean_to_triton(level: int, name: str) -> None:
    assert settings(optimization={"graph": {"level": level}}).graph_level == name


def test_parameters_reach_the_session(tmp_path: Path) -> None:
    given = parameters(
        intra_op_thread_count="2",
        inter_op_thread_count="3",
        execution_mode="1",
        enable_mem_arena="0",
        enable_mem_pattern="false",
        **{"session.intra_op.allow_spinning": "0", "memory.enable_memory_arena_shrinkage": "cpu:0"},
    )
    options = load(tmp_path, onnx_models.identity(), parameters=given).session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 3)
    assert options.execution_mode.name == "ORT_PARALLEL"
    assert not options.enable_cpu_mem_arena and not options.enable_mem_pattern
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert settings(parameters=given).run_entries == {"memory.enable_memory_arena_shrinkage": "cpu:0"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"parameters": parameters(intra_op_thread_count="two")}, "'intra_op_thread_count' .* got 'two'"),
        ({"parameters": parameters(inter_op_thread_count="-1")}, "'inter_op_thread_count' .* got '-1'"),
        ({"parameters": parameters(execution_mode="2")}, "'execution_mode' must be one of 0, 1, got '2'"),
        ({"parameters": parameters(enable_mem_arena="maybe")}, "'enable_mem_arena' .* got 'maybe'"),
        ({"optimization": {"graph": {"level": 3}}}, r"optimization.graph.level must be one of \[-1, 0, 1, 2\], got 3"),
        ({"optimization": accelerators("cpu", "abacus")}, "unknown Execution Accelerator 'abacus'"),
        ({"kind": "GPU", "optimization": accelerators("gpu", "abacus")}, "unknown Execution Accelerator 'abacus'"),
        ({"kind": "GPU", "optimization": accelerators("gpu", "tensorrt", precision_mode="FP8")}, "'FP8'"),
        ({"kind": "GPU", "optimization": accelerators("gpu", "tensorrt", speed="9")}, "unknown parameter 'speed'"),
        ({"kind": "GPU", "parameters": parameters(arena_extend_strategy="5")}, "'arena_extend_strategy' .* got '5'"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**bad)


def test_gpu_instances_run_on_their_device() -> None:
    assert settings("GPU").providers == (
        (
            "CUDAExecutionProvider",
            {
                "cudnn_conv_algo_search": "EXHAUSTIVE",
                "gpu_mem_limit": "18446744073709551615",
                "arena_extend_strategy": "kNextPowerOfTwo",
                "do_copy_in_default_stream": "1",
                "device_id": "3",
            },
        ),
    )


def test_cuda_options_come_from_the_accelerator_and_four_from_the_parameters() -> None:
    ((_, options),) = settings(
        "GPU",
        parameters=parameters(cudnn_conv_algo_search="1", gpu_mem_limit="1000"),
        optimization=accelerators("gpu", "cuda", gpu_mem_limit="7", cudnn_conv_use_max_workspace="0"),
    ).providers
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert options["gpu_mem_limit"] == "1000"
    assert options["cudnn_conv_use_max_workspace"] == "0"


def test_tensorrt_comes_before_cuda_with_its_options_renamed() -> None:
    options = {"precision_mode": "FP16", "max_workspace_size_bytes": "9", "trt_engine_cache_enable": "1"}
    first, second = settings("GPU", optimization=accelerators("gpu", "tensorrt", **options)).providers
    assert first == (
        "TensorrtExecutionProvider",
        {"trt_fp16_enable": "1", "trt_max_workspace_size": "9", "trt_engine_cache_enable": "1", "device_id": "3"},
    )
    assert second[0] == "CUDAExecutionProvider"


def test_cpu_instances_ignore_gpu_accelerators() -> None:
    assert settings("CPU", optimization=accelerators("gpu", "tensorrt")).providers == ()


@pytest.mark.parametrize(
    ("kind", "optimization", "provider"),
    [
        ("CPU", accelerators("cpu", "openvino"), "OpenVINOExecutionProvider"),
        ("GPU", accelerators("gpu", "tensorrt"), "TensorrtExecutionProvider"),
        ("GPU", {}, "CUDAExecutionProvider"),
    ],
)
def test_a_provider_that_is_not_installed_is_named(
    tmp_path: Path, kind: str, optimization: dict[str, Any], provider: str
) -> None:
    with pytest.raises(ValueError, match=f"needs {provider}, which this ONNX Runtime .* does not have; it has .*CPU"):
        load(tmp_path, onnx_models.identity(), kind=kind, optimization=optimization)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["tritonserver", "--model-repository=/m"], 4),
        (["--backend-config=onnxruntime,default-max-batch-size=9"], 9),
        (["--backend-config", "onnxruntime,default-max-batch-size=0"], 0),
        (["--backend-config=default-max-batch-size=5"], 5),
        (["--backend-config=tensorrt,default-max-batch-size=5"], 4),
    ],
)
def test_the_default_batch_size_is_the_servers(command: list[str], expected: int) -> None:
    assert default_max_batch_size(command) == expected


# Signatures

BATCHED = Signature((GraphTensor("x", "TYPE_FP32", (-1, 3)),), (GraphTensor("y", "TYPE_FP32", (-1, -1)),))
VECTOR = Signature((GraphTensor("x", "TYPE_FP32", (-1,)),), (GraphTensor("y", "TYPE_FP32", (-1,)),))
FIXED = Signature((GraphTensor("x", "TYPE_FP32", (2, 3)),), (GraphTensor("y", "TYPE_FP32", ()),))


def test_an_empty_config_is_completed_from_a_graph_that_batches() -> None:
    given = config()
    complete(given, BATCHED, 4)
    assert given["input"] == [entry("x", 3)]
    assert given["output"] == [entry("y", -1)]
    assert given["max_batch_size"] == 4
    assert given["dynamic_batching"] == {}
    validate(given, BATCHED)


def test_an_empty_config_is_completed_from_a_graph_that_does_not_batch() -> None:
    given = config()
    complete(given, FIXED, 4)
    assert given["input"] == [entry("x", 2, 3)]
    assert given["output"] == [entry("y", 1)]
    assert given["max_batch_size"] == 0
    assert "dynamic_batching" not in given
    validate(given, FIXED)


def test_a_default_batch_size_of_zero_completes_without_batches() -> None:
    given = config()
    complete(given, BATCHED, 0)
    assert (given["max_batch_size"], given["input"]) == (0, [entry("x", -1, 3)])


def test_elements_without_dims_are_reshaped() -> None:
    given = config()
    complete(given, VECTOR, 4)
    assert given["input"] == [entry("x", 1, reshape={"shape": []})]
    validate(given, VECTOR)


def test_what_the_config_says_is_kept() -> None:
    given = config(input=[entry("x", 3)], max_batch_size=16)
    complete(given, BATCHED, 4)
    assert (given["input"], given["max_batch_size"]) == ([entry("x", 3)], 16)
    assert given["output"] == [entry("y", -1)]


def test_a_config_with_inputs_and_outputs_is_left_alone() -> None:
    given = config(input=[entry("x", -1, 3)], output=[entry("y", -1, -1)])
    complete(given, BATCHED, 4)
    assert given == config(input=[entry("x", -1, 3)], output=[entry("y", -1, -1)])


def test_batches_of_a_graph_without_a_batch_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match="'m': model does not support batching"):
        complete(config(max_batch_size=8), FIXED, 4)


X, Y = entry("x", 3), entry("y", -1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": [X, entry("z", 3)]}, "configuration expects 2 inputs, model provides 1"),
        ({"input": [entry("z", 3)]}, "unexpected inference input 'z', allowed inputs are: x"),
        ({"output": [entry("z", 3)]}, "unexpected inference output 'z', allowed outputs are: y"),
        ({"input": [entry("x", 3, data_type="TYPE_INT64")]}, "datatype TYPE_INT64 for input 'x', .* TYPE_FP32"),
        ({"output": [entry("y", -1, data_type="TYPE_BF16")]}, "datatype TYPE_BF16 for output 'y', .* TYPE_FP32"),
        ({"input": [entry("x", 4)]}, r"'x': the model expects 2 dimensions \(shape \[-1, 3\]\) .* \[-1, 4"),
        ({"output": [entry("y", 4)]}, r"'y': .* \(shape \[-1, -1\]\) .* \[-1, 4"),
        ({"input": [entry("x", 3, allow_ragged_batch=True)]}, "input 'x': allow_ragged_batch"),
        ({"input": [X, entry("o", 3, optional=True)]}, "optional input 'o'"),
        ({"batch_input": [{"kind": "BATCH_ELEMENT_COUNT"}]}, "batch_input"),
    ],
)
def test_a_config_that_does_not_fit_the_graph_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(config(**{"input": [X], "output": [Y], "max_batch_size": 8, **fields}), BATCHED)


def test_batching_a_fixed_first_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'x': the model expects 2 dimensions \(shape \[2, 3\]\)"):
        validate(config(input=[entry("x", 3)], output=[], max_batch_size=8), FIXED)


def test_types_that_triton_does_not_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unsupported datatype tensor\(bfloat16\) for tensor 'x'"):
        load(tmp_path, onnx_models.identity(TensorProto.BFLOAT16))


# Sessions


def test_several_requests_run_as_one(tmp_path: Path) -> None:
    session = load(tmp_path, onnx_models.batch_size())
    requests = [{"x": np.zeros((rows, 1), np.int64)} for rows in (1, 3, 2)]
    results = session.run_batch(["y"], requests)
    assert [result["y"].tolist() for result in results] == [[[6]], [[6]] * 3, [[6]] * 2]


def test_each_request_gets_its_own_rows(tmp_path: Path) -> None:
    session = load(tmp_path, onnx_models.identity(TensorProto.STRING))
    requests = [np.array([["é", ""]], object), np.array([["日本", "b"], ["c", "d"]], object)]
    encoded = [{"x": np.array([[text.encode() for text in row] for row in rows], object)} for rows in requests]
    results = session.run_batch(["y"], encoded)
    assert [result["y"].tolist() for result in results] == [rows.tolist() for rows in requests]


def test_strings_must_be_utf_8(tmp_path: Path) -> None:
    session = load(tmp_path, onnx_models.identity(TensorProto.STRING))
    with pytest.raises(InvalidInputError, match="input 'x' must be UTF-8"):
        session.run_batch(["y"], [{"x": np.array([[b"\xff"]], object)}])


def test_an_output_that_cannot_be_split_is_an_error(tmp_path: Path) -> None:
    session = load(tmp_path, onnx_models.total())
    with pytest.raises(ValueError, match=r"output 'y' has shape \[1, 2\] for a batch of 3"):
        session.run_batch(["y"], [{"x": np.ones((1, 2), np.float32)}, {"x": np.ones((2, 2), np.float32)}])


def test_scalars_lose_the_dims_that_triton_gives_them(tmp_path: Path) -> None:
    session = load(tmp_path, onnx_models.identity(shape=()))
    assert session.run(["y"], {"x": np.array([2.5], np.float32)})["y"].shape == ()
