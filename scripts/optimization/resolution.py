"""From --model to what is optimized."""

import hashlib
import json
import random
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx

from scripts.build_repository import ENCODER
from scripts.demo_models.corpus import collect_facts
from scripts.demo_models.phrasings import TRAINED, UNSEEN
from scripts.demo_models.questions import trained_questions
from scripts.demo_models.shipped import save_target
from scripts.distill_embedder import write_texts
from scripts.optimization.encoder import EncoderSubject
from scripts.optimization.errors import OptimizationError
from scripts.optimization.forms import Forms
from scripts.optimization.language_model import LanguageModelSubject
from scripts.optimization.students import Students, Write
from scripts.optimization.subject import Say, Subject
from scripts.quantization.dequantize import dequantize_rows
from scripts.quantization.model_file import recorded, save_model
from scripts.quantization.subject import Subject as Source
from scripts.quantization.subject import open_subject
from scripts.serving.installation import MODEL_REPOSITORY

SHIPPED_ENCODER, SHIPPED_LANGUAGE_MODEL = "embedder", "language_model"
OBJECTS, PHRASINGS_EACH = 240, 2
LEARNED_SENTENCES, LEARNED_QUESTIONS = 20_000, 2_000  # about what is read in a few minutes


@dataclass(frozen=True)
class Wanted:
    """What the command line says of the model and of its data; see scripts.optimize."""

    model: str
    data: Path | None
    draft: Path | None
    student: Path | None
    distillation_data: Path | None
    distillation_minutes: float
    target_quality: float
    work: Path


def resolve(wanted: Wanted, scratch: Path, say: Say) -> Subject:
    """Open the model; `scratch` holds what is exported and must stay until the end.

    Raises OptimizationError, QuantizationError or ExportError for what cannot be used.
    """
    for option in ("data", "draft", "student", "distillation_data"):
        path = getattr(wanted, option)
        if path and not path.exists():
            raise OptimizationError(f"--{option.replace('_', '-')} {path} does not exist")
    source = _open(wanted.model, scratch)
    shipped = wanted.model == SHIPPED_LANGUAGE_MODEL  # by its name in the repository: a path may end in the same
    decoder_data = wanted.data or (_write_questions(scratch) if shipped else None)
    if source.decoder and decoder_data is None:
        raise OptimizationError('--data is missing: a language model needs JSONL of {"prompt": ..., "completion": ...}')
    draft = wanted.draft or (MODEL_REPOSITORY / SHIPPED_LANGUAGE_MODEL / "1" / "draft" if shipped else None)
    students = Students(wanted.student, *_lessons(wanted), wanted.distillation_minutes)
    data = decoder_data if source.decoder else wanted.data
    forms = Forms(wanted.work / source.name, _digest(source, data, wanted))
    if source.decoder:
        assert data is not None
        return LanguageModelSubject(source, data, students, draft, forms, say)
    return EncoderSubject(source, data, students, forms, say)


def _open(model: str, scratch: Path) -> Source:
    served = MODEL_REPOSITORY / model / "1"
    if Path(model).name != model or not served.is_dir():
        if not Path(model).exists():
            names = ", ".join(sorted(path.parent.name for path in MODEL_REPOSITORY.glob("*/1")))
            raise OptimizationError(f"--model {model} is neither a path nor one of {names}")
        return open_subject(Path(model), scratch, None, upgrade_opset=False)
    if model == SHIPPED_ENCODER:  # what is served is quantized already: this is what it was made from
        return replace(open_subject(ENCODER, scratch, None, upgrade_opset=False), name=model)
    if (served / "target").is_dir():
        return replace(open_subject(_in_fp32(served / "target", scratch), scratch, None, False), name=model)
    return open_subject(served / "model.onnx", scratch, None, upgrade_opset=False)


def _in_fp32(folder: Path, scratch: Path) -> Path:
    """Return a language model's folder with fp32 weights: what its INT8 ones stand for."""
    model = onnx.load(folder / "model.onnx")
    if recorded(model).get("precision") != "row-int8":
        return folder
    restored = scratch / "restored"
    shutil.copytree(folder, restored, ignore=shutil.ignore_patterns("model.onnx*"))
    save_model(dequantize_rows(model), restored)
    return restored


def _lessons(wanted: Wanted) -> tuple[Path | Write | None, Path | Write | None]:
    """Return a Hugging Face folder to learn from, and texts, or what writes them."""
    if wanted.model == SHIPPED_ENCODER:
        return ENCODER, wanted.distillation_data or partial(write_texts, count=LEARNED_SENTENCES)
    if wanted.model == SHIPPED_LANGUAGE_MODEL:
        return save_target, wanted.distillation_data or _write_lessons
    given = Path(wanted.model)
    return (given if (given / "config.json").is_file() else None), wanted.distillation_data


def _write_questions(folder: Path) -> Path:
    """Write questions about the standard library, each object in a few phrasings, one after the other."""
    rng = random.Random(0)
    lines = [
        {"prompt": phrasing.format(n=fact.name), "completion": fact.summary}
        for fact in rng.sample(collect_facts(), OBJECTS)
        for phrasing in rng.sample((*TRAINED, *UNSEEN), PHRASINGS_EACH)
    ]
    return _write_lines(folder / "questions.jsonl", lines)


def _write_lessons(path: Path) -> None:
    questions = trained_questions(collect_facts(), LEARNED_QUESTIONS, seed=2)
    _write_lines(path, [{"prompt": question.prompt, "completion": question.answer} for question in questions])


def _write_lines(path: Path, lines: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _digest(source: Source, data: Path | None, wanted: Wanted) -> str:
    """Hash all that what is made and measured depends on."""
    digest = hashlib.sha256(source.digest.encode())
    for path in (data, wanted.draft, wanted.student):
        files = [] if path is None else sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    digest.update(repr((wanted.distillation_data, wanted.distillation_minutes, wanted.target_quality)).encode())
    return digest.hexdigest()
