"""Make a model smaller and faster, and say what it cost.

    python -m scripts.quantize MODEL [--to dynamic-int8|static-int8|fp16|int4|row-int8|auto]
                               [--calibration FILE|DIR] [--evaluation FILE] [--into model_repository/NAME]

MODEL is an fp32 ONNX file, or a language model's folder (ONNX Runtime GenAI's layout, or a Hugging Face folder, which
is exported first). The source is never touched. All that is made and measured goes to .build/quantize/<name>: a folder
for each precision, report.json and report.png. With --into, the chosen model becomes a folder that Triton serves.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported

from rich.console import Console

from scripts.export_model import ExportError
from scripts.machine import describe_machine
from scripts.quantization import report
from scripts.quantization.errors import RUNTIME_ERRORS, QuantizationError
from scripts.quantization.install import install_decoder, install_encoder, require_writable
from scripts.quantization.int4 import BLOCK_SIZES
from scripts.quantization.integers import METHODS
from scripts.quantization.precision import PRECISIONS, PROVIDERS, Options, candidates, require_runs
from scripts.quantization.study import FP32, Result, Study
from scripts.quantization.subject import Subject, open_subject
from scripts.serving.installation import PROJECT

REPORTS = PROJECT / ".build" / "quantize"
console = Console(stderr=True)
WIDE = 190  # columns of the table, where it is not a terminal that is written to


def quantize(arguments: argparse.Namespace) -> Result:
    """Do what the command line asks for, and return the result that was chosen. Raises QuantizationError."""
    auto = arguments.to == "auto"
    wanted = candidates(arguments.provider, arguments.calibration is not None) if auto else [arguments.to]
    for precision in wanted:
        require_runs(precision, arguments.provider)
    if arguments.into:
        require_writable(arguments.into)
    arguments.report.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.report, prefix=".quantize-") as scratch:
        work = Path(scratch)
        subject = open_subject(arguments.model, work, arguments.tokenizer, arguments.upgrade_opset)
        options = Options(arguments.calibration_method, arguments.block_size, not arguments.asymmetric)
        source = subject.source(arguments.calibration, options)
        study = Study(subject, source, work, arguments.provider, arguments.evaluation, console.log)
        for precision in wanted:
            study.add(precision, arguments.max_quality_loss)
        study.measure_speed()
        chosen = _choose(study, wanted, auto, arguments.max_quality_loss)
        report.write(work, subject.name, study.results, chosen, describe_machine())
        output = Console() if sys.stdout.isatty() else Console(width=WIDE)
        output.print(report.table(subject.name, study.results, chosen), *report.notes(study.results), sep="\n")
        if chosen is None:
            closest = min((study.results[precision] for precision in wanted), key=lambda result: result.loss)
            raise QuantizationError(
                f"{closest.precision} comes closest and loses {closest.loss:.4f}, more than --max-quality-loss "
                f"{arguments.max_quality_loss}; nothing was installed"
            )
        if arguments.into:
            _install(subject, chosen, arguments)
        _keep(work, arguments.report / subject.name)
    return chosen


def _choose(study: Study, wanted: list, auto: bool, most_loss: float) -> Result | None:
    if auto:
        return study.best(most_loss)
    result = study.results[wanted[0]]
    return result if result.loss <= most_loss else None


def _install(subject: Subject, chosen: Result, arguments: argparse.Namespace) -> None:
    if subject.decoder:
        install_decoder(chosen.folder, arguments.into, arguments.role)
    else:
        install_encoder(chosen.folder, arguments.into, arguments.provider)
    console.log(f"{arguments.into} serves {chosen.precision}")


def _keep(work: Path, folder: Path) -> None:
    """Move what was made to where the user finds it."""
    for source in (FP32, "exported"):
        shutil.rmtree(work / source, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for made in work.iterdir():
        made.rename(folder / made.name)
    console.log(f"report and models: {folder}")


def parse(command_line: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--to", choices=(*PRECISIONS, "auto"), default="auto", help="default: auto, the fastest")
    parser.add_argument("--calibration", type=Path, help=".npz, .npy or .jsonl (.txt for language models), or a folder")
    parser.add_argument("--calibration-method", choices=METHODS, default="minmax", help="of static-int8")
    parser.add_argument("--evaluation", type=Path, help="held-out data; with labels: accuracy is the quality")
    parser.add_argument("--max-quality-loss", type=_fraction, default=0.01, help="a fraction; default 0.01")
    parser.add_argument("--into", type=Path, help="a model's folder in the repository")
    parser.add_argument("--role", choices=("target", "draft"), default="target", help="of a language model")
    parser.add_argument("--provider", choices=PROVIDERS, default="cpu", help="where the model will run")
    parser.add_argument("--block-size", type=int, choices=BLOCK_SIZES, default=32, help="of int4")
    parser.add_argument("--asymmetric", action="store_true", help="int4 with zero points")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, unless it lies beside the model")
    parser.add_argument("--upgrade-opset", action="store_true", help="convert a model of an old opset first")
    parser.add_argument("--report", type=Path, default=REPORTS, help="where models and reports are kept")
    return parser.parse_args(command_line)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction from 0 to 1")
    return value


def main() -> None:
    """Quantize, or say in one line why not."""
    try:
        quantize(parse())
    except (QuantizationError, ExportError) as error:
        sys.exit(f"error: {error}")
    except RUNTIME_ERRORS as error:
        sys.exit(f"error: ONNX Runtime cannot run the model on this data: {str(error).splitlines()[0]}")
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
