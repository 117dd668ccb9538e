"""Calibration and evaluation data: .npz, .npy and .jsonl files, or a folder of them, read a batch at a time.

- .npz: an array per input, named after it, the first axis counting samples; "labels" [N] may be among them.
- .npy: such an array for a model of one input.
- .jsonl: a sample a line: {"text": ...}, tokenized as the model's tokenizer.json does it, or {"<input>": nested lists}
  without the batch axis; "label" may be among them.

Nothing is read whole: files may be larger than memory.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import tokenizers
from numpy.lib import format as npy
from numpy.typing import NDArray

from scripts.quantization.errors import QuantizationError
from scripts.quantization.graph import Feeds, Input

SUFFIXES = (".npz", ".npy", ".jsonl")
ROWS = 8  # samples a batch
LABELS, LABEL, TEXT = "labels", "label", "text"


@dataclass(frozen=True)
class Batch:
    """Inputs of some samples, their labels [rows] where there are any, and where they come from."""

    feeds: Feeds
    labels: NDArray | None
    origin: str


class Samples:
    """The samples in a file or folder, checked against a model's inputs as they are read.

    Iterating raises QuantizationError, naming file, sample and input, for what the model cannot take.
    """

    def __init__(self, path: Path, inputs: Sequence[Input], tokenizer: tokenizers.Tokenizer | None, rows: int = ROWS):
        self._inputs = inputs
        self._tokenizer = tokenizer
        fixed = {taken.shape[0] for taken in inputs if taken.shape and isinstance(taken.shape[0], int)}
        self._rows = int(min(fixed, default=rows))
        self._fixed_rows = bool(fixed)
        self.files = _files(path)

    def __iter__(self) -> Iterator[Batch]:
        for file in self.files:
            batches = self._lines(file) if file.suffix == ".jsonl" else self._arrays(file)
            for batch in batches:
                yield self._checked(batch)

    def count(self) -> int:
        """Return how many samples there are, without reading them."""
        return sum(_count(file) for file in self.files)

    def _arrays(self, file: Path) -> Iterator[Batch]:
        with ExitStack() as stack:
            columns = _columns(file, stack, self._inputs)
            total = _common_length(file, columns)
            for start in range(0, total, self._rows):
                rows = min(self._rows, total - start)
                feeds = {name: column.read(rows) for name, column in columns.items()}
                yield Batch(feeds, feeds.pop(LABELS, None), f"{file}, samples {start} to {start + rows - 1}")

    def _lines(self, file: Path) -> Iterator[Batch]:
        """Batch neighbouring lines of equal shape; texts are padded to their batch's longest."""
        gathered: list[dict[str, Any]] = []
        start = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                sample = _sample(file, number, line)
                if gathered and (len(gathered) == self._rows or _shapes(sample) != _shapes(gathered[0])):
                    yield self._joined(gathered, f"{file}, line {start}")
                    gathered = []
                start = start if gathered else number
                gathered.append(sample)
        if gathered:
            yield self._joined(gathered, f"{file}, line {start}")

    def _joined(self, samples: list[dict[str, Any]], origin: str) -> Batch:
        labels = np.array([sample[LABEL] for sample in samples]) if LABEL in samples[0] else None
        if TEXT in samples[0]:
            return Batch(self._tokenized([sample[TEXT] for sample in samples], origin), labels, origin)
        columns = {name: [sample.get(name) for sample in samples] for name in samples[0] if name != LABEL}
        try:
            feeds = {name: np.array(values) for name, values in columns.items()}
        except ValueError as error:
            raise QuantizationError(f"{origin}: {error}") from error
        return Batch(feeds, labels, origin)

    def _tokenized(self, texts: list[str], origin: str) -> Feeds:
        if self._tokenizer is None:
            raise QuantizationError(f"{origin} has texts, but the model has no tokenizer.json beside it: --tokenizer")
        return tokenize(self._tokenizer, texts, self._inputs)

    def _checked(self, batch: Batch) -> Batch:
        names = {taken.name for taken in self._inputs}
        if batch.feeds.keys() != names:
            raise QuantizationError(
                f"{batch.origin} has {_listed(batch.feeds)}; the model's inputs are {_listed(names)}"
            )
        feeds = {taken.name: _cast(batch.feeds[taken.name], taken, batch.origin) for taken in self._inputs}
        rows = len(next(iter(feeds.values())))
        if self._fixed_rows and rows < self._rows:  # the graph takes full batches only: repeat the last sample
            feeds = {name: np.concatenate([v, np.repeat(v[-1:], self._rows - rows, 0)]) for name, v in feeds.items()}
        return Batch(feeds, batch.labels, batch.origin)


def tokenize(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], inputs: Sequence[Input]) -> Feeds:
    """Return `texts` as the token inputs that a text model takes, padded on the right to the longest."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    ids, mask = (np.zeros((len(rows), max(map(len, rows))), np.int64) for _ in range(2))
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {taken.name: known[taken.name].astype(taken.data_type) for taken in inputs if taken.name in known}


def load_tokenizer(path: Path) -> tokenizers.Tokenizer | None:
    """Load a tokenizer.json, without the padding and truncation it may ask for; None where there is no such file."""
    if not path.is_file():
        return None
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class _Column:
    """An array in a .npy stream, read a few rows at a time."""

    def __init__(self, stream: IO[bytes], origin: str) -> None:
        try:
            version = npy.read_magic(stream)
            header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, by_column, self._type = header(stream)
        except ValueError as error:
            raise QuantizationError(f"{origin} is not a numpy array: {error}") from error
        if self._type.hasobject or by_column or not shape:
            raise QuantizationError(f"{origin} must be a C-ordered array of numbers whose first axis counts samples")
        self._stream, self._origin, self._shape, self.length = stream, origin, shape[1:], shape[0]

    def read(self, rows: int) -> NDArray:
        size = rows * int(np.prod(self._shape)) * self._type.itemsize
        content = self._stream.read(size)
        if len(content) < size:
            raise QuantizationError(f"{self._origin} ends early: its header promises {self.length} samples")
        return np.frombuffer(content, self._type).reshape(rows, *self._shape)


def _columns(file: Path, stack: ExitStack, inputs: Sequence[Input]) -> dict[str, _Column]:
    if file.suffix == ".npy":
        if len(inputs) != 1:
            names = _listed(taken.name for taken in inputs)
            raise QuantizationError(f"{file} holds one array, the model has the inputs {names}: use .npz")
        return {inputs[0].name: _Column(stack.enter_context(file.open("rb")), str(file))}
    try:
        archive = stack.enter_context(zipfile.ZipFile(file))
    except zipfile.BadZipFile as error:
        raise QuantizationError(f"{file} is not an .npz file: {error}") from error
    return {
        name.removesuffix(".npy"): _Column(stack.enter_context(archive.open(name)), f"{file}, {name}")
        for name in archive.namelist()
    }


def _common_length(file: Path, columns: Mapping[str, _Column]) -> int:
    lengths = {name: column.length for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise QuantizationError(f"{file} has arrays of different lengths: {lengths}")
    return max(lengths.values(), default=0)


def _sample(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        sample = json.loads(line)
    except ValueError as error:
        raise QuantizationError(f"{file}, line {number} is not JSON: {error}") from error
    if isinstance(sample, str):
        sample = {TEXT: sample}
    if not isinstance(sample, dict) or not isinstance(sample.get(TEXT, ""), str):
        raise QuantizationError(f'{file}, line {number} must be {{"text": "..."}} or {{"<input>": [...]}}')
    return sample


def _shapes(sample: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each array of a sample; texts have none, they are padded."""
    return {name: _shape(value) for name, value in sample.items() if name not in (TEXT, LABEL)}


def _shape(value: Any) -> tuple[int, ...]:
    return (len(value), *_shape(value[0])) if isinstance(value, list) and value else ()


def _cast(values: NDArray, taken: Input, origin: str) -> NDArray:
    """Return `values` in the input's type. Raises QuantizationError where that loses something, or NaN is in it."""
    name = f"{origin}: input {taken.name!r}"
    if len(values.shape) != len(taken.shape) or any(
        isinstance(size, int) and size != given for size, given in zip(taken.shape[1:], values.shape[1:], strict=True)
    ):
        raise QuantizationError(f"{name} has shape {list(values.shape)}; the model takes {list(taken.shape)}")
    if values.dtype.kind not in ("f" if taken.data_type.kind == "f" else "") + "iub":
        raise QuantizationError(f"{name} is {values.dtype}; the model takes {taken.data_type}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        sample = int(np.argwhere(~np.isfinite(values))[0][0])
        raise QuantizationError(f"{name} has NaN or infinity in sample {sample} of these; remove it")
    return np.ascontiguousarray(values, taken.data_type)


def _files(path: Path) -> list[Path]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in SUFFIXES and file.is_file()]
    if not files:
        raise QuantizationError(f"{path} is not, and has no, {', '.join(SUFFIXES)} file")
    return files


def _count(file: Path) -> int:
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            return sum(bool(line.strip()) for line in lines)
    with ExitStack() as stack:
        if file.suffix == ".npy":
            return _Column(stack.enter_context(file.open("rb")), str(file)).length
        archive = stack.enter_context(zipfile.ZipFile(file))
        names = archive.namelist()
        return _Column(stack.enter_context(archive.open(names[0])), str(file)).length if names else 0


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
