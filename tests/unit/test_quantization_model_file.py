"""Model files: what is refused, external data, and writing in one step."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from scripts.quantization import model_file
from scripts.quantization.errors import QuantizationError
from scripts.quantization.graph import random_feeds
from scripts.quantization.model_file import load_model, record, recorded, save_model, size_on_disk
from scripts.quantization.precision import PRECISIONS, Precision
from tests import quantization_models

X = np.random.default_rng(0).standard_normal((4, quantization_models.WIDTH)).astype(np.float32)


def run(path: Path) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(None, {"x": X})[0]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def data_files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix != ".onnx"]


@contextmanager
def full_disk(largest_file: int) -> Iterator[None]:
    """No file may grow beyond that many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_recorded_is_read_back_and_other_metadata_stays(tmp_path: Path) -> None:
    model = quantization_models.classifier()
    helper.set_model_props(model, {"author": "someone"})
    assert recorded(model) == {}
    record(model, {"precision": "int4", "excluded": ["a"]})
    record(model, {"precision": "fp16", "excluded": []})
    save_model(model, tmp_path)
    read = onnx.load(tmp_path / "model.onnx")
    assert recorded(read) == {"precision": "fp16", "excluded": []}
    assert {entry.key: entry.value for entry in read.metadata_props}["author"] == "someone"


def test_large_weights_go_beside_the_graph_and_come_back(tmp_path: Path) -> None:
    model = quantization_models.classifier()
    path = quantization_models.store(model, tmp_path, one_file_bytes=1000)
    assert path.stat().st_size < 5000
    assert len(data_files(tmp_path)) == 1
    assert size_on_disk(tmp_path) == sum(file.stat().st_size for file in tmp_path.iterdir()) > 100_000
    whole = quantization_models.store(model, tmp_path / "whole")
    np.testing.assert_array_equal(run(path), run(whole))
    assert load_model(path).graph.node == load_model(whole).graph.node


def test_a_new_model_takes_the_place_of_the_old_one_and_of_its_data(tmp_path: Path) -> None:
    path = quantization_models.store(quantization_models.classifier(seed=0), tmp_path, one_file_bytes=1000)
    (old,) = data_files(tmp_path)
    expected = run(quantization_models.store(quantization_models.classifier(seed=1), tmp_path / "other"))
    quantization_models.store(quantization_models.classifier(seed=1), tmp_path, one_file_bytes=1000)
    assert not old.exists()
    np.testing.assert_array_equal(run(path), expected)
    for _ in range(2):  # the same again: data is not appended
        quantization_models.store(quantization_models.classifier(seed=1), tmp_path, one_file_bytes=1000)
        assert len([file for file in data_files(tmp_path) if file.is_file()]) == 1
        np.testing.assert_array_equal(run(path), expected)
    quantization_models.store(quantization_models.classifier(seed=1), tmp_path)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["model.onnx"]
    np.testing.assert_array_equal(run(path), expected)


@pytest.mark.parametrize("one_file_bytes", [1 << 30, 1000])
@pytest.mark.parametrize("largest_file", [100, 50_000])
def test_what_was_there_stays_when_the_disk_is_full(tmp_path: Path, one_file_bytes: int, largest_file: int) -> None:
    quantization_models.store(quantization_models.classifier(seed=0), tmp_path, one_file_bytes)
    before = tree(tmp_path)
    with full_disk(largest_file), pytest.raises(OSError, match="File too large"):
        save_model(quantization_models.classifier(seed=1), tmp_path, one_file_bytes)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_external_data_is_quantized_in_every_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    monkeypatch.setattr(model_file.save_model, "__defaults__", (1000,))  # ONE_FILE_BYTES, everywhere
    path = quantization_models.store(quantization_models.classifier(), tmp_path, one_file_bytes=1000)
    before = tree(tmp_path)
    np.savez(tmp_path / "x.npz", x=X)
    study = quantization_models.study(path, tmp_path / "work", tmp_path / "x.npz")
    result = study.add(precision, 0.05)
    assert tree(tmp_path).items() >= before.items()
    assert len(data_files(result.folder)) == 1
    assert result.size_bytes < 0.55 * study.results["fp32"].size_bytes
    onnx.load(result.folder / "model.onnx")


def test_the_ir_version_is_one_that_older_runtimes_read(tmp_path: Path) -> None:
    model = quantization_models.classifier()
    model.ir_version = 13
    save_model(model, tmp_path)
    assert onnx.load(tmp_path / "model.onnx").ir_version == 10


def half_precision() -> onnx.ModelProto:
    model = quantization_models.classifier()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    return model


def with_bytes(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "model.onnx").write_bytes(content)
        return folder / "model.onnx"

    return write


def without_its_data(folder: Path) -> Path:
    path = quantization_models.store(quantization_models.classifier(), folder, one_file_bytes=1000)
    data_files(folder)[0].unlink()
    return path


def with_data_elsewhere(folder: Path) -> Path:
    """A graph that asks for a file outside of its folder."""
    path = quantization_models.store(quantization_models.classifier(), folder, one_file_bytes=1000)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../../../../../../../etc/passwd"
    path.write_bytes(model.SerializeToString())
    return path


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "model.onnx", r"model\.onnx does not exist"),
    "text": (with_bytes(b"this is not a model at all"), r"model\.onnx is not an ONNX"),
    "empty": (with_bytes(b""), r"model\.onnx is not an ONNX model: it has no graph"),
    "an archive": (with_bytes(b"PK\x03\x04" + bytes(200)), r"model\.onnx is not an ONNX"),
    "cut off": (with_bytes(quantization_models.classifier().SerializeToString()[:5000]), r"is not an ONNX"),
    "a folder": (lambda folder: folder, "is not an ONNX"),
    "without its data": (without_its_data, r"model\.[0-9a-f]+\.data"),
    "with data elsewhere": (with_data_elsewhere, r"model\.onnx is not an ONNX file that can be read"),
    "an old opset": (
        lambda folder: quantization_models.store(quantization_models.classifier(opset=11), folder),
        r"has opset 11, the oldest that can be quantized is 13: --upgrade-opset converts it to 18",
    ),
    "16-bit weights": (
        lambda folder: quantization_models.store(half_precision(), folder),
        "has 16-bit weights already; give the fp32 model",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_quantized_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write, complaint = BAD[name]
    with pytest.raises(QuantizationError, match=complaint) as refusal:
        load_model(write(tmp_path))
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_quantized_model_is_refused(tmp_path: Path, precision: Precision) -> None:
    path = quantization_models.store(quantization_models.classifier(), tmp_path)
    np.savez(tmp_path / "x.npz", x=X)
    made = quantization_models.study(path, tmp_path / "work", tmp_path / "x.npz").add(precision, 0.05)
    complaint = "16-bit weights already" if precision == "fp16" else "is quantized already: it has .*; give the fp32"
    with pytest.raises(QuantizationError, match=complaint):
        load_model(made.folder / "model.onnx")


@pytest.mark.parametrize("opset", [11, 13])
def test_upgrade_opset_converts_an_old_model(tmp_path: Path, opset: int) -> None:
    path = quantization_models.store(quantization_models.classifier(opset=opset), tmp_path)
    upgraded = load_model(path, upgrade_opset=True)
    assert model_file.opset(upgraded) == 18
    np.testing.assert_allclose(
        onnxruntime.InferenceSession(upgraded.SerializeToString()).run(None, {"x": X})[0], run(path), atol=1e-6
    )


def test_a_newer_opset_is_left_as_it_is(tmp_path: Path) -> None:
    path = quantization_models.store(quantization_models.classifier(opset=20), tmp_path)
    assert model_file.opset(load_model(path, upgrade_opset=True)) == 20


def test_random_inputs_fit_any_graph() -> None:
    feeds = random_feeds(quantization_models.text_encoder(), 3, 7)
    assert {name: values.shape for name, values in feeds.items()} == dict.fromkeys(feeds, (3, 7))
    assert feeds["input_ids"].max() > 2
    assert (feeds["attention_mask"] == 1).all()
    assert random_feeds(quantization_models.conv_net(batch=2), 8, 9)["image"].shape == (2, 3, 16, 16)
