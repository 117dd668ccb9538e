"""Find out how a model is best served: measure, apply techniques one at a time, keep what helps.

    python -m scripts.optimize --model NAME|PATH --target-latency-ms X --target-quality Y
                               [--objective latency|throughput|cost] [--data FILE] [--output DIR]

NAME is a model in model_repository; PATH an ONNX file, or the folder of a language model or a sentence encoder.
Tried in this order, until 95% of requests take at most X ms at a quality of at least Y: caching, quantization, batching
and instances, speculative decoding, reuse of keys and values, distillation. A setup below the quality is not kept.
Exits with 0 when both targets are met and with 1 when they are not. The best setup is written to --output as a model
repository; the report, and all that an interrupted run goes on from, is in .build/optimize/<name>.
"""

import argparse
import os
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import get_args

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported
os.environ["HF_HUB_OFFLINE"] = "1"

from rich.console import Console

from scripts.export_model import ExportError
from scripts.machine import describe_machine
from scripts.optimization import report
from scripts.optimization.errors import OptimizationError
from scripts.optimization.measurement import CACHE_BYTES
from scripts.optimization.optimizer import Objective, Search, Targets, optimize
from scripts.optimization.plan import Plan
from scripts.optimization.record import Record
from scripts.optimization.resolution import Wanted, resolve
from scripts.optimization.subject import Subject
from scripts.quantization.errors import RUNTIME_ERRORS, QuantizationError
from scripts.serving.errors import ServeError
from scripts.serving.installation import PROJECT

WORK = PROJECT / ".build" / "optimize"
REQUESTS = {"encoder": 400, "language model": 100}
INTERRUPTED = 130
WIDE = 200  # columns of the table, where it is not a terminal that is written to
console = Console(stderr=True)


def run(arguments: argparse.Namespace) -> bool:
    """Do what the command line asks for; return whether the targets are met.

    Raises OptimizationError, QuantizationError, ExportError or ServeError.
    """
    targets = Targets(arguments.target_latency_ms, arguments.target_quality, arguments.objective)
    wanted = Wanted(**{name: getattr(arguments, name) for name in Wanted.__dataclass_fields__})
    with tempfile.TemporaryDirectory(prefix="optimize-") as scratch:
        subject = resolve(wanted, Path(scratch), console.log)
        requests = arguments.requests or REQUESTS[subject.kind]
        plan = Plan(arguments.clients, requests, arguments.repeats)
        search = optimize(subject, targets, Record(subject, plan).measure, console.log)
        output = arguments.output or subject.forms.folder / "repository"
        install(subject, search, output)
    _tell(subject, search, targets, plan, output)
    return targets.are_met(search.measured)


def install(subject: Subject, search: Search, output: Path) -> None:
    """Write the best setup to the model repository `output`, each model whole or not at all.

    Raises OptimizationError.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".optimize-", dir=output) as folder:
            subject.write(search.best, Path(folder, "repository"))
            for made in sorted(Path(folder, "repository").iterdir()):
                _exchange(made, output / made.name, Path(folder, f"{made.name}.old"))
    except OSError as error:
        raise OptimizationError(f"--output {output} cannot be written: {error.strerror}") from error


def _exchange(new: Path, place: Path, old: Path) -> None:
    """Move `new` to `place`, and what is there to `old`."""
    if place.exists():
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise


def _tell(subject: Subject, search: Search, targets: Targets, plan: Plan, output: Path) -> None:
    """Print the table and write the page."""
    cache = f" --response-cache-bytes {CACHE_BYTES}" if search.best.cached and subject.kind == "encoder" else ""
    commands = [
        f"python -m scripts.optimize {shlex.join(sys.argv[1:])}",
        f'make serve ARGS="--repository {output}{cache}"',
    ]
    facts = {
        "requests": f"{plan.passes} passes of {plan.requests} at most, {plan.clients} clients, each with one at a time",
        "repeats": f"{plan.repeats:.0%} of requests were made before in the same pass",
        **describe_machine(),
    }
    path = subject.forms.folder / "report.html"
    report.page(subject.name, search, targets, facts, commands, path)
    terminal = Console() if sys.stdout.isatty() else Console(width=WIDE)
    terminal.print(report.table(subject.name, search), report.summary(search, targets), sep="\n")
    terminal.print(f"report: {path}\nmodel repository: {output}\nserve it: {commands[1]}", soft_wrap=True)


def parse(command_line: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.optimize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a name in model_repository, or a path")
    parser.add_argument("--target-latency-ms", type=float, required=True, help="of the 95th percentile")
    parser.add_argument("--target-quality", type=float, required=True, help="above 0, at most 1")
    parser.add_argument(
        "--objective", choices=get_args(Objective), default="latency", help="default: latency, the mean"
    )
    parser.add_argument(
        "--data", type=Path, help="JSONL of prompts and completions; of an encoder what scripts.quantize evaluates on"
    )
    parser.add_argument("--draft", type=Path, help="a language model's draft, as scripts.export_model makes it")
    parser.add_argument("--student", type=Path, help="a Hugging Face folder that scripts.distill made")
    parser.add_argument("--distillation-data", type=Path, help="texts to learn from, as scripts.distill takes them")
    parser.add_argument("--distillation-minutes", type=float, default=3.0, help="to learn; 0: no distillation")
    parser.add_argument("--clients", type=_positive, default=4, help="requests at one time")
    parser.add_argument("--requests", type=_positive, help=f"in a pass, of which two count; default {REQUESTS}")
    parser.add_argument("--repeats", type=_share, default=0.3, help="share that was asked before; default 0.3")
    parser.add_argument("--output", type=Path, help="default: .build/optimize/<name>/repository")
    parser.add_argument("--work", type=Path, default=WORK, help=argparse.SUPPRESS)
    return parser.parse_args(command_line)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return value


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and below 1")
    return value


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Optimize, or say in one line why not."""
    arguments = parse()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        return 0 if run(arguments) else 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what has been measured", file=sys.stderr)
        return INTERRUPTED
    except (OptimizationError, QuantizationError, ExportError, ServeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except RUNTIME_ERRORS as error:
        print(f"error: ONNX Runtime cannot run the model on this data: {str(error).splitlines()[0]}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
