"""Teach a small model what a large one gives.

    python -m scripts.distill TEACHER --data FILE|DIR --output DIR [--ratio R | --layers N] [--width N]
    python -m scripts.distill TARGET --student DRAFT --on-policy --data PROMPTS --output DIR

TEACHER is a Hugging Face folder: a sentence encoder or a causal language model. The student is made of its layers, or
is the model in --student. The result is a Hugging Face folder for scripts.quantize and scripts.export_model; it appears
whole or not at all. Checkpoint, curve and plot are kept in .build/distill/<name>; the same command goes on from there.
"""

import argparse
import hashlib
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from scripts.distillation import curve, data, model_folder, precision
from scripts.distillation.checkpoint import Progress
from scripts.distillation.encoder import SentenceVectors
from scripts.distillation.errors import DistillationError, Interrupted
from scripts.distillation.initialization import make_student
from scripts.distillation.kept import Kept
from scripts.distillation.language_model import Imitation
from scripts.distillation.model_folder import ModelFolder
from scripts.distillation.on_policy import OnPolicy, Sampling
from scripts.distillation.samples import collate
from scripts.distillation.sampling import padding
from scripts.distillation.settings import Settings
from scripts.distillation.shape import student_shape
from scripts.distillation.texts import Text, read
from scripts.distillation.trainer import Task, Trainer

WORK = Path(__file__).parents[1] / ".build" / "distill"
EPOCHS = 3
CALIBRATION_BATCHES = 8
console = Console(stderr=True)


def distill(arguments: argparse.Namespace) -> Progress:
    """Do what the command line asks for, and return what was reached. Raises DistillationError."""
    _require_consistent(arguments)
    model_folder.require_writable(arguments.output)
    teacher = model_folder.open_folder(arguments.teacher)
    if arguments.on_policy and teacher.kind != "language model":
        raise DistillationError(f"{teacher.folder} is an encoder: --on-policy is for language models")
    texts, held_out = _texts(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    settings = _settings(arguments, len(texts))
    settings = replace(settings, length=min(settings.length, teacher.context))
    student, kept = _student(arguments, teacher, texts, settings)
    work = arguments.work or WORK / arguments.output.resolve().name
    identity = _identity(arguments, settings, student, texts, held_out)
    work.mkdir(parents=True, exist_ok=True)
    if arguments.restart:
        (work / "checkpoint.pt").unlink(missing_ok=True)
    teacher.model.to(device)
    student.to(device)
    dtype = precision.resolve(arguments.precision, device)
    console.log(
        f"{_millions(teacher.model)} to {_millions(student)} parameters, {len(texts)} texts, {len(held_out)} held out, "
        f"{device}, {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
    )
    read_by = hashlib.sha256(
        repr((identity["teacher"], identity["data"], settings.length, dtype)).encode()
    ).hexdigest()[:12]
    task = _task(arguments, teacher, texts, held_out, settings, kept, dtype, work / f"teacher_vectors-{read_by}.pt")
    trainer = Trainer(student, task, settings, work / "checkpoint.pt", identity, console.log)
    with _Interruptible(trainer.stop):
        progress = trainer.run()
    curve.write(progress, work / "curve.json")
    curve.plot(progress, work / "loss.png", arguments.output.name)
    if not trainer.ended:
        raise Interrupted(f"interrupted after {progress.steps} steps; the same command goes on from there")
    model_folder.write(student, teacher, arguments.output)
    console.log(f"{arguments.output}: the student of step {progress.best_step}; curve and plot: {work}")
    return progress


def _require_consistent(arguments: argparse.Namespace) -> None:
    given = [name for name in ("layers", "ratio", "width", "feed_forward") if getattr(arguments, name) is not None]
    if arguments.student and given:
        raise DistillationError(f"--student has its own shape: --{given[0].replace('_', '-')} contradicts it")
    if arguments.output.resolve() in {arguments.teacher.resolve(), arguments.student and arguments.student.resolve()}:
        raise DistillationError(f"--output {arguments.output} is where the teacher or the student lies")
    if arguments.held_out and arguments.held_out.resolve() == arguments.data.resolve():
        raise DistillationError("--held-out is what is learned from: it must be another file")


def _texts(arguments: argparse.Namespace) -> tuple[list[Text], list[Text]]:
    texts = read(arguments.data)
    return (texts, read(arguments.held_out)) if arguments.held_out else data.split(texts, arguments.seed)


def _settings(arguments: argparse.Namespace, texts: int) -> Settings:
    steps = arguments.steps
    if steps is None and arguments.minutes is None:
        steps = max(1, math.ceil(EPOCHS * texts / max(1, arguments.rows)))
    return Settings(
        steps=steps,
        minutes=arguments.minutes,
        rows=arguments.rows,
        length=arguments.length,
        peak_rate=arguments.rate,
        temperature=1.0 if arguments.on_policy else arguments.temperature,
        seed=arguments.seed,
        patience=arguments.patience,
    )


def _student(
    arguments: argparse.Namespace, teacher: ModelFolder, texts: list[Text], settings: Settings
) -> tuple[PreTrainedModel, Kept | None]:
    if arguments.student:
        student = model_folder.open_folder(arguments.student)
        model_folder.require_same_vocabulary(teacher, student)
        return student.model, None
    shape = student_shape(
        teacher.model.config, arguments.layers, arguments.ratio, arguments.width, arguments.feed_forward
    )
    samples = data.sentences(texts[: CALIBRATION_BATCHES * settings.rows], teacher, settings.length)
    pad, rows = padding(teacher.model), settings.rows
    batches = [collate(samples[i : i + rows], pad, torch.device("cpu")) for i in range(0, len(samples), rows)]
    return make_student(teacher, shape, batches)


def _task(
    arguments: argparse.Namespace,
    teacher: ModelFolder,
    texts: list[Text],
    held_out: list[Text],
    settings: Settings,
    kept: Kept | None,
    dtype: torch.dtype,
    vectors: Path,
) -> Task:
    if arguments.on_policy:
        sampling = Sampling(temperature=arguments.sampling_temperature, most_tokens=arguments.answer_tokens)
        most = teacher.context - sampling.most_tokens
        prompts, asked = (data.prompt_tokens(part, teacher, most) for part in (texts, held_out))
        return OnPolicy(teacher.model.to(dtype), prompts, asked, settings, sampling, dtype)
    prepare = data.sentences if teacher.kind == "encoder" else data.passages
    learned, kept_apart = (prepare(part, teacher, settings.length) for part in (texts, held_out))
    if teacher.kind == "encoder":
        return SentenceVectors(teacher.model, learned, kept_apart, settings, dtype, vectors)
    return Imitation(teacher.model, learned, kept_apart, settings, kept, dtype)


def _identity(
    arguments: argparse.Namespace,
    settings: Settings,
    student: PreTrainedModel,
    texts: list[Text],
    held_out: list[Text],
) -> dict[str, Any]:
    """Return what a run's result depends on: a checkpoint is gone on from only where all of it is the same."""
    weights = hashlib.sha256()
    for file in sorted(arguments.teacher.glob("*.safetensors")):
        weights.update(file.read_bytes())
    shape = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    return {
        "settings": asdict(settings),
        "teacher": weights.hexdigest(),
        "student": hashlib.sha256(repr((shape, str(arguments.student))).encode()).hexdigest(),
        "data": hashlib.sha256(repr((texts, held_out)).encode()).hexdigest(),
        "policy": [arguments.on_policy, arguments.sampling_temperature, arguments.answer_tokens],
        "precision": arguments.precision,
    }


class _Interruptible:
    """While entered, Ctrl-C and SIGTERM end the run after the step at hand, so that its state can be kept."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}

    def _heard(self, number: int, frame: FrameType | None) -> None:
        console.log("stopping after this step ...")
        self._stop()

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _millions(model: PreTrainedModel) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M"


def parse(command_line: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--data", type=Path, required=True, help=".txt, .md, .rst or .jsonl, or a folder of them")
    parser.add_argument("--held-out", type=Path, help="what to judge by; default: a twentieth of --data, 500 at most")
    parser.add_argument("--output", type=Path, required=True, help="where the student goes")
    parser.add_argument("--student", type=Path, help="a model to go on from, in place of one made of the teacher")
    parser.add_argument("--layers", type=int, help="of the student")
    parser.add_argument("--ratio", type=float, help="of the student's layers to the teacher's")
    parser.add_argument("--width", type=int, help="hidden width of the student")
    parser.add_argument("--feed-forward", type=int, help="feed-forward width; default: in proportion to --width")
    parser.add_argument("--steps", type=int, help=f"default: {EPOCHS} times over the data")
    parser.add_argument("--minutes", type=float, help="how long to learn, in place of --steps")
    parser.add_argument("--rows", type=int, default=16, help="texts a step; default 16")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text at most; default 128")
    parser.add_argument("--rate", type=float, default=5e-4, help="highest learning rate; default 5e-4")
    parser.add_argument("--temperature", type=float, default=2.0, help="of the distributions compared; default 2")
    parser.add_argument("--patience", type=int, default=5, help="evaluations (20 a run) without a gain, then stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--on-policy", action="store_true", help="learn from the teacher's own answers to --data")
    parser.add_argument("--sampling-temperature", type=float, default=1.0, help="of those answers; 0 is greedy")
    parser.add_argument("--answer-tokens", type=int, default=96, help="of those answers, at most; default 96")
    parser.add_argument("--work", type=Path, help="checkpoint, curve and plot; default .build/distill/<output's name>")
    parser.add_argument("--restart", action="store_true", help="forget an interrupted run")
    return parser.parse_args(command_line)


def main() -> None:
    """Distill, or say in one line why not."""
    try:
        distill(parse())
    except DistillationError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
