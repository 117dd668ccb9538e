"""scripts.distill: a student that the other commands take, whole or not at all, and clear refusals."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts import distill, quantize
from scripts.distillation.errors import DistillationError
from scripts.export_model import export_model
from tests import distillation, language_models


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)  # waking threads takes longer than such models do
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    language_models.save_random(tmp_path / "teacher", "llama", tied=True)
    return tmp_path / "teacher"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    distillation.save_encoder(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return distillation.save_texts(tmp_path / "texts.txt")


def command(teacher: Path, data: Path, output: Path, *options: str) -> list[str]:
    line = [str(teacher), "--data", str(data), "--output", str(output), "--work", f"{output}-work"]
    return [*line, "--precision", "fp32", *options]


def run(teacher: Path, data: Path, output: Path, *options: str) -> None:
    distill.distill(distill.parse(command(teacher, data, output, *options)))


def test_a_distilled_language_model_exports_and_quantizes(teacher: Path, texts: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    run(teacher, texts, student, "--ratio", "0.5", "--steps", "4")
    config = json.loads((student / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert (student / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    export_model(student, tmp_path / "exported", "row-int8")
    assert (tmp_path / "exported" / "model.onnx").is_file()
    line = [str(student), "--to", "row-int8", "--report", str(tmp_path / "report"), "--max-quality-loss", "0.5"]
    assert quantize.quantize(quantize.parse(line)).precision == "row-int8"


def test_a_distilled_encoder_quantizes(encoder: Path, texts: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    run(encoder, texts, student, "--layers", "2", "--feed-forward", "32", "--steps", "4")
    line = [str(student), "--to", "row-int8", "--report", str(tmp_path / "report"), "--max-quality-loss", "0.9"]
    result = quantize.quantize(quantize.parse(line))
    assert result.precision == "row-int8" and result.rows_independent


def test_learning_brings_an_encoder_nearer_to_its_teacher(encoder: Path, texts: Path, tmp_path: Path) -> None:
    run(encoder, texts, tmp_path / "student", "--layers", "2", "--steps", "60", "--rate", "3e-3")
    curve = json.loads((tmp_path / "student-work" / "curve.json").read_text())
    assert curve[-1][2]["loss"] < 0.6 * curve[0][2]["loss"]
    assert (tmp_path / "student-work" / "loss.png").stat().st_size > 1000


def test_a_narrower_encoder_learns_the_cosines(encoder: Path, texts: Path, tmp_path: Path) -> None:
    run(encoder, texts, tmp_path / "student", "--layers", "2", "--width", "16", "--steps", "40", "--rate", "3e-3")
    first, *_, last = json.loads((tmp_path / "student-work" / "curve.json").read_text())
    assert "cosine" not in last[2] and last[2]["loss"] < first[2]["loss"]


def test_a_draft_learns_what_its_target_says_and_more_is_accepted(teacher: Path, tmp_path: Path) -> None:
    texts = distillation.save_texts(tmp_path / "texts.txt")
    prompts = distillation.save_texts(tmp_path / "prompts.jsonl", 40, prompts=True)
    run(teacher, texts, tmp_path / "start", "--layers", "1", "--steps", "1")
    options = ("--student", str(tmp_path / "start"), "--on-policy", "--answer-tokens", "8", "--rate", "5e-3")
    run(teacher, prompts, tmp_path / "draft", *options, "--steps", "60", "--sampling-temperature", "0")
    first, *_, last = json.loads((tmp_path / "draft-work" / "curve.json").read_text())
    assert last[2]["acceptance_rate"] > first[2]["acceptance_rate"]
    assert 1 <= last[2]["tokens_per_round"] <= last[2]["tokens_per_round_bound"] <= 9


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_an_interrupted_run_goes_on_and_ends_where_an_uninterrupted_one_does(
    teacher: Path, texts: Path, tmp_path: Path
) -> None:
    options = ("--layers", "1", "--steps", "400", "--seed", "7")
    run(teacher, texts, tmp_path / "whole", *options)
    line = [sys.executable, "-m", "scripts.distill", *command(teacher, texts, tmp_path / "parts", *options)]
    started = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    assert started.stderr is not None
    for seen in started.stderr:
        if "step 40/400" in seen:
            started.send_signal(signal.SIGINT)
            break
    complaint = started.stderr.read()
    assert started.wait(60) == 1 and "interrupted after" in complaint
    assert not (tmp_path / "parts").exists()
    run(teacher, texts, tmp_path / "parts", *options)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_checkpoint_of_other_options_is_refused_until_restarted(teacher: Path, texts: Path, tmp_path: Path) -> None:
    run(teacher, texts, tmp_path / "student", "--layers", "1", "--steps", "2")
    with pytest.raises(DistillationError, match=r"belongs to a run with other settings.*--restart"):
        run(teacher, texts, tmp_path / "student", "--layers", "1", "--steps", "3")
    run(teacher, texts, tmp_path / "student", "--layers", "1", "--steps", "3", "--restart")


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def rename_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("break_teacher", "complaint"),
    [
        (
            lambda folder: (folder / "config.json").unlink(),
            "has no config.json: it must be a local Hugging Face folder",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json does not load"),
        (lambda folder: (folder / "model.safetensors").unlink(), "does not load: .*model.safetensors"),
        (break_weights, "does not load"),
        (rename_weights, "lacks weights of 9 tensors"),
    ],
    ids=["no config", "no tokenizer", "bad tokenizer", "no weights", "damaged weights", "missing layer"],
)
def test_a_teacher_that_does_not_load_is_refused(
    teacher: Path, texts: Path, tmp_path: Path, break_teacher: Callable[[Path], None], complaint: str
) -> None:
    break_teacher(teacher)
    with pytest.raises(DistillationError, match=complaint):
        run(teacher, texts, tmp_path / "student", "--layers", "1")
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--layers", "1", "--ratio", "0.5"), "--layers and --ratio contradict"),
        (("--ratio", "1.5"), "--ratio is 1.5: it must be above 0 and at most 1"),
        (("--layers", "3"), "--layers is 3: the teacher has 2, so it must be from 1 to 2"),
        (("--layers", "0"), "--layers is 0"),
        (("--width", "48"), "--width is 48: .*multiple of 32"),
        ((), "as large as the teacher"),
        (("--layers", "1", "--steps", "3", "--minutes", "1"), "give one of them, not both"),
        (("--layers", "1", "--rows", "0"), "rows is 0: it must be at least 1"),
        (("--layers", "1", "--student", "elsewhere"), "--layers contradicts it"),
        (("--student", "elsewhere"), "elsewhere has no config.json"),
    ],
)
def test_options_that_contradict_or_do_not_fit_are_refused(
    teacher: Path, texts: Path, tmp_path: Path, options: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(DistillationError, match=complaint):
        run(teacher, texts, tmp_path / "student", *options)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("none.txt", None, "none.txt does not exist"),
        ("empty.txt", "\n \n", "empty.txt has no text"),
        ("one.txt", "a single text", "there is one text only"),
        ("image.png", "x", "image.png is not a .txt"),
        ("bad.jsonl", '{"text": "a"}\n{"txet": "b"}', "bad.jsonl, line 2 must be"),
        ("bad.jsonl", '{"text": "a"}\n{', "bad.jsonl, line 2 is not JSON"),
        ("prompts.jsonl", '{"prompt": "a"}\n{"prompt": "b"}', "for --on-policy"),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused(
    teacher: Path, tmp_path: Path, name: str, content: str | None, complaint: str
) -> None:
    data = tmp_path / name
    if content is not None:
        data.write_text(content)
    with pytest.raises(DistillationError, match=complaint):
        run(teacher, data, tmp_path / "student", "--layers", "1")
    assert not (tmp_path / "student").exists()


def test_a_folder_without_texts_is_refused(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DistillationError, match=r"nothing has no \.txt"):
        run(teacher, tmp_path / "nothing", tmp_path / "student", "--layers", "1")


def test_a_student_of_another_kind_or_vocabulary_is_refused(
    teacher: Path, encoder: Path, texts: Path, tmp_path: Path
) -> None:
    with pytest.raises(DistillationError, match="they must be of one kind"):
        run(teacher, texts, tmp_path / "student", "--student", str(encoder))
    other = tmp_path / "other"
    language_models.save_random(other, "llama", tied=True)
    language_models.tokenizer("<extra>").save_pretrained(other)
    with pytest.raises(DistillationError, match="has another tokenizer than"):
        run(teacher, texts, tmp_path / "student", "--student", str(other))
    with pytest.raises(DistillationError, match="--on-policy is for language models"):
        run(encoder, texts, tmp_path / "student", "--layers", "1", "--on-policy")


def test_a_folder_that_is_no_model_is_never_replaced(teacher: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.txt").write_text("a year's work")
    with pytest.raises(DistillationError, match="is no model's folder"):
        run(teacher, texts, tmp_path / "student", "--layers", "1")
    assert (tmp_path / "student" / "thesis.txt").exists()


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "scripts.distill", *command(tmp_path, tmp_path, tmp_path / "student")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path} has no config.json: it must be a local Hugging Face folder\n"
