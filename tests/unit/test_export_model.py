"""scripts.export_model: a folder that loads, whole or not at all."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.tokenizer import Tokenizer

from scripts.export_model import ExportError, export_model
from tests import language_models
from tests.unit.conftest import TINY, Export


@pytest.fixture
def source(tmp_path: Path) -> Path:
    language_models.save_random(tmp_path / "source", "llama", tied=True)
    return tmp_path / "source"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", TINY)
def test_an_export_is_a_folder_in_onnx_runtime_genais_layout_with_the_tokenizer(
    exported: Callable[[str], Export], name: str
) -> None:
    folder = exported(name).folder
    assert {"genai_config.json", "model.onnx", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert not (folder / "model.onnx.data").exists()  # it fits into one file
    assert Tokenizer(folder, "raw").decode(Tokenizer(folder, "raw").encode_prompt("ab")) == "ab"


def test_row_int8_stores_matrices_in_one_byte_a_weight(exported: Callable[[str], Export]) -> None:
    graph = onnx.load(exported("llama-row-int8").folder / "model.onnx").graph
    matrices = [tensor for tensor in graph.initializer if len(tensor.dims) == 2 and "cache" not in tensor.name]
    large = [tensor.data_type for tensor in matrices if min(tensor.dims) > 1]
    assert large and set(large) == {onnx.TensorProto.INT8}


def test_the_command_puts_a_model_into_its_role_and_replaces_what_was_there(source: Path, tmp_path: Path) -> None:
    draft = tmp_path / "language_model" / "1" / "draft"
    draft.mkdir(parents=True)
    (draft / "stale").write_text("old")
    command = [sys.executable, "-m", "scripts.export_model", str(source), "--into", str(tmp_path / "language_model")]
    done = subprocess.run([*command, "--role", "draft"], capture_output=True, text=True, check=True)
    assert f"{draft}: row-int8, " in done.stdout
    assert not (draft / "stale").exists()
    assert [folder.name for folder in draft.parent.iterdir()] == ["draft"]  # no scratch is left
    LanguageModel(draft, slots=1, threads=1, spinning=False)


@pytest.mark.parametrize(
    ("break_source", "complaint"),
    [
        (
            lambda source: (source / "config.json").unlink(),
            "has no config.json: it must be a local Hugging Face folder",
        ),
        (lambda source: (source / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (
            lambda source: [file.unlink() for file in source.glob("*.safetensors")],
            "model builder refused .*safetensors",
        ),
        (lambda source: rename_architecture(source), "model builder refused .*not.*supported"),
    ],
    ids=["no config", "no tokenizer", "no weights", "unknown architecture"],
)
def test_a_bad_source_is_refused_clearly_and_what_is_there_stays(
    source: Path, tmp_path: Path, break_source: Callable[[Path], None], complaint: str
) -> None:
    break_source(source)
    destination = tmp_path / "language_model" / "1" / "target"
    destination.mkdir(parents=True)
    (destination / "model.onnx").write_text("what served until now")
    before = tree(tmp_path)
    with pytest.raises(ExportError, match=complaint):
        export_model(source, destination, "row-int8")
    assert tree(tmp_path) == before
    assert [folder.name for folder in destination.parent.iterdir()] == ["target"]


def rename_architecture(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["AbacusForCausalLM"]}))


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.export_model", str(tmp_path), "--into", str(tmp_path / "lm")]
    done = subprocess.run([*command, "--role", "target"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path} has no config.json: it must be a local Hugging Face folder\n"
    assert not (tmp_path / "lm").exists()
