"""What is to be quantized: an ONNX file, or the folder of a language model or a sentence encoder."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import tokenizers

from scripts.export_model import export_fp32
from scripts.quantization import texts
from scripts.quantization.errors import QuantizationError
from scripts.quantization.graph import Feeds, Input, graph_inputs, random_feeds
from scripts.quantization.model_file import load_model, save_model
from scripts.quantization.precision import Options, Source
from scripts.quantization.samples import Samples, load_tokenizer
from scripts.sentence_encoder import sentence_encoder

RANDOM_BATCHES, RANDOM_ROWS, RANDOM_LENGTH = 4, 16, 16


@dataclass(eq=False)
class Subject:
    """An fp32 model with what lies beside it. `folder` holds model.onnx and, for a decoder, its other files."""

    name: str
    folder: Path
    model: onnx.ModelProto
    decoder: bool
    tokenizer: tokenizers.Tokenizer | None
    digest: str

    @property
    def inputs(self) -> list[Input]:
        """What the graph must be fed."""
        return graph_inputs(self.model)

    def source(self, calibration: Path | None, options: Options) -> Source:
        """Return the model ready to be quantized with the data in `calibration`."""
        batches = None if calibration is None else CalibrationData(self, calibration)
        return Source(self.model, batches, options, self.decoder, self._stand_in())

    def side_files(self) -> list[Path]:
        """Return the files of a decoder's folder other than the model itself."""
        return [file for file in self.folder.iterdir() if file.is_file() and not file.name.startswith("model.onnx")]

    def _stand_in(self) -> list[Feeds] | None:
        """Random tokens, for a text encoder: they show its outlier channels as well as real text does."""
        if self.decoder or "input_ids" not in {taken.name for taken in self.inputs}:
            return None
        return [random_feeds(self.model, RANDOM_ROWS, RANDOM_LENGTH, seed) for seed in range(RANDOM_BATCHES)]


class CalibrationData:
    """Batches of inputs in the file or folder `path`, which can be read again and again."""

    def __init__(self, subject: Subject, path: Path) -> None:
        self._subject = subject
        self.path = path

    def count(self) -> int:
        """Return how many samples there are."""
        if self._subject.decoder:
            return sum(1 for _ in texts.read(self.path, self._subject.folder))
        return Samples(self.path, self._subject.inputs, self._subject.tokenizer).count()

    def __iter__(self) -> Iterator[Feeds]:
        subject = self._subject
        if subject.decoder:
            for tokens, _ in texts.read(self.path, subject.folder):
                yield texts.decoder_feeds(subject.inputs, tokens, subject.folder)
        else:
            for batch in Samples(self.path, subject.inputs, subject.tokenizer):
                yield batch.feeds


def open_subject(path: Path, scratch: Path, tokenizer: Path | None, upgrade_opset: bool) -> Subject:
    """Read the model at `path`: an ONNX file, a folder in ONNX Runtime GenAI's layout, or a Hugging Face folder of a
    language model or a BERT sentence encoder, which is exported into `scratch` first.

    Raises QuantizationError or ExportError.
    """
    if not path.exists():
        raise QuantizationError(f"{path} does not exist")
    if path.is_file():
        beside = tokenizer or path.with_name("tokenizer.json")
        model = load_model(path, upgrade_opset)
        name = path.parent.parent.name if path.parent.name.isdigit() else path.stem
        return Subject(name, path.parent, model, False, load_tokenizer(beside), _digest(path))
    if _is_encoder(path):
        folder = scratch / "exported"
        folder.mkdir()
        save_model(sentence_encoder(path), folder)
        made = load_model(folder / "model.onnx", upgrade_opset)
        return Subject(path.name, folder, made, False, load_tokenizer(path / "tokenizer.json"), _digest(folder))
    folder = path
    if (path / "config.json").is_file() and not (path / "genai_config.json").is_file():
        folder = scratch / "exported"
        export_fp32(path, folder)
    if not (folder / "genai_config.json").is_file():
        raise QuantizationError(
            f"{path} has neither genai_config.json nor config.json: it is no language model's folder"
        )
    model = load_model(folder / "model.onnx", upgrade_opset)
    return Subject(path.name, folder, model, True, load_tokenizer(folder / "tokenizer.json"), _digest(folder))


def _is_encoder(path: Path) -> bool:
    """Whether `path` is the Hugging Face folder of a BERT sentence encoder."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise QuantizationError(f"{path}/config.json is not JSON: {error}") from error
    return isinstance(config, dict) and "BertModel" in (config.get("architectures") or [])


def copy_side_files(subject: Subject, folder: Path) -> None:
    """Put a decoder's configuration and tokenizer beside its quantized model."""
    if subject.decoder:
        for file in subject.side_files():
            shutil.copy(file, folder)


def _digest(path: Path) -> str:
    """Return the SHA-256 of a model, the data files beside it included."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.glob("model.onnx*")):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
