"""Calibration and evaluation data: every format, streamed, and checked against what the model takes."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.format import open_memmap

from scripts.quantization.errors import QuantizationError
from scripts.quantization.graph import Input
from scripts.quantization.samples import Samples
from scripts.serving.installation import PROJECT
from tests import language_models
from tests.quantization_models import LEFT, RIGHT

FLOAT, INT64 = np.dtype(np.float32), np.dtype(np.int64)
ONE = [Input("x", FLOAT, ("batch", 4))]
TWO = [Input(LEFT, FLOAT, ("batch", 4)), Input(RIGHT, FLOAT, ("batch", 2))]
TOKENS = [Input(name, INT64, ("batch", "sequence")) for name in ("input_ids", "attention_mask")]
TOKENIZER = language_models.tokenizer().backend_tokenizer
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def lines(path: Path, samples: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def arrays(path: Path, inputs: Sequence[Input] = ONE, **options: Any) -> list[dict[str, np.ndarray]]:
    return [batch.feeds for batch in Samples(path, inputs, None, **options)]


def joined(path: Path, inputs: Sequence[Input] = ONE, **options: Any) -> dict[str, np.ndarray]:
    batches = arrays(path, inputs, **options)
    return {taken.name: np.concatenate([feeds[taken.name] for feeds in batches]) for taken in inputs}


def test_an_npz_gives_its_samples_in_batches(tmp_path: Path) -> None:
    left, right = normal(19, 4), normal(19, 2)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "data.npz", **{LEFT: left, RIGHT: right})
        batches = arrays(tmp_path / "data.npz", TWO, rows=8)
        assert [len(feeds[LEFT]) for feeds in batches] == [8, 8, 3]
        np.testing.assert_array_equal(np.concatenate([feeds[LEFT] for feeds in batches]), left)
        np.testing.assert_array_equal(np.concatenate([feeds[RIGHT] for feeds in batches]), right)
        assert Samples(tmp_path / "data.npz", TWO, None).count() == 19


def test_an_npy_is_for_the_only_input(tmp_path: Path) -> None:
    x = normal(11, 4)
    np.save(tmp_path / "data.npy", x)
    np.testing.assert_array_equal(joined(tmp_path / "data.npy")["x"], x)
    with pytest.raises(QuantizationError, match=r"holds one array, the model has the inputs .*: use \.npz"):
        arrays(tmp_path / "data.npy", TWO)


def test_lines_of_arrays_are_samples(tmp_path: Path) -> None:
    left, right = normal(10, 4), normal(10, 2)
    samples = [{LEFT: one.tolist(), RIGHT: two.tolist()} for one, two in zip(left, right, strict=True)]
    path = lines(tmp_path / "data.jsonl", samples)
    np.testing.assert_array_equal(joined(path, TWO)[LEFT], left)
    np.testing.assert_array_equal(joined(path, TWO)[RIGHT], right)
    assert Samples(path, TWO, None).count() == 10


def test_lines_of_text_go_through_the_tokenizer(tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", [{"text": "ab"}, {"text": "naïve — 日本"}, "a bare string"])
    (batch,) = Samples(path, TOKENS, TOKENIZER)
    for row, text in enumerate(["ab", "naïve — 日本", "a bare string"]):
        ids = batch.feeds["input_ids"][row][batch.feeds["attention_mask"][row] == 1]
        assert ids.tolist() == TOKENIZER.encode(text).ids
    assert (batch.feeds["input_ids"][batch.feeds["attention_mask"] == 0] == 0).all()


def test_lines_of_varying_length_share_a_batch_only_with_their_like(tmp_path: Path) -> None:
    widths = [3, 3, 3, 5, 5, 3]
    samples = [{"x": normal(width).tolist()} for width in widths]
    batches = arrays(lines(tmp_path / "data.jsonl", samples), [Input("x", FLOAT, ("batch", "width"))])
    assert [feeds["x"].shape for feeds in batches] == [(3, 3), (2, 5), (1, 3)]


def test_a_folder_gives_all_its_files_in_order(tmp_path: Path) -> None:
    first, second, third = normal(3, 4), normal(2, 4), normal(1, 4)
    np.save(tmp_path / "a.npy", first)
    np.savez(tmp_path / "b.npz", x=second)
    lines(tmp_path / "c.jsonl", [{"x": third[0].tolist()}])
    (tmp_path / "README.md").write_text("not data")
    np.testing.assert_array_equal(joined(tmp_path)["x"], np.concatenate([first, second, third]))
    assert Samples(tmp_path, ONE, None).count() == 6


def test_a_fixed_batch_dimension_gets_full_batches(tmp_path: Path) -> None:
    x = normal(7, 4)
    np.save(tmp_path / "data.npy", x)
    batches = arrays(tmp_path / "data.npy", [Input("x", FLOAT, (3, 4))])
    assert [feeds["x"].shape for feeds in batches] == [(3, 4)] * 3
    np.testing.assert_array_equal(np.concatenate([feeds["x"] for feeds in batches])[:7], x)


@pytest.mark.parametrize("stored", [np.float64, np.float16, np.int32, np.uint8, np.bool_])
def test_numbers_are_brought_to_the_type_of_the_input(tmp_path: Path, stored: type) -> None:
    x = (RNG.random((5, 4)) * 2).astype(stored)
    np.save(tmp_path / "data.npy", x)
    given = joined(tmp_path / "data.npy")["x"]
    assert given.dtype == np.float32
    np.testing.assert_array_equal(given, x.astype(np.float32))


def test_labels_are_kept_apart(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=normal(10, 4), labels=np.arange(10))
    lines(tmp_path / "data.jsonl", [{"x": [0, 0, 0, 0], "label": 7}, {"x": [0, 0, 0, 0], "label": 8}])
    batches = list(Samples(tmp_path, ONE, None))
    labels = np.concatenate([batch.labels for batch in batches if batch.labels is not None])
    assert labels.tolist() == [7, 8, *range(10)]
    assert all(batch.feeds.keys() == {"x"} for batch in batches)


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_much_larger_than_what_is_allowed_is_streamed(tmp_path: Path, compressed: bool) -> None:
    """256 MiB of numbers, read by a process whose heap may hold 64 more MiB than it has at the start."""
    column = open_memmap(tmp_path / "x.npy", "w+", np.float32, (2**16, 1024))  # zeros take no room on disk
    column.flush()
    del column
    archive = "import sys, zipfile; z = zipfile.ZipFile(sys.argv[1], 'w', int(sys.argv[2]), compresslevel=1)"
    script = f"""{archive}
z.write(sys.argv[3], 'x.npy'); z.close()
import resource
import numpy as np
from pathlib import Path
from scripts.quantization.graph import Input
from scripts.quantization.samples import Samples
pages = int(Path('/proc/self/statm').read_text().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (pages + 2**26,) * 2)
try:
    bytearray(2**28)
except MemoryError:
    print('limited')
inputs = [Input('x', np.dtype(np.float32), ('batch', 1024))]
print(sum(len(batch.feeds['x']) for batch in Samples(Path(sys.argv[1]), inputs, None, rows=1024)))
"""
    kind = "8" if compressed else "0"
    command = [sys.executable, "-c", script, str(tmp_path / "data.npz"), kind, str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=False)
    for file in tmp_path.iterdir():
        file.unlink()
    assert done.stdout.split() == ["limited", str(2**16)], done.stderr


def nan_at(sample: int) -> np.ndarray:
    x = normal(20, 4)
    x[sample, 2] = np.nan
    return x


def infinity_in_lines(path: Path) -> Path:
    return lines(path / "data.jsonl", [{"x": [1, 2, 3, 4]}, {"x": [1, float("inf"), 3, 4]}])


def npz(**columns: np.ndarray) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.savez(folder / "data.npz", **columns)
        return folder / "data.npz"

    return write


def npy(column: np.ndarray) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.save(folder / "data.npy", column)
        return folder / "data.npy"

    return write


def content(name: str, text: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(text)
        return folder / name

    return write


# Name -> (what writes the file, what the error says)
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing file": (lambda folder: folder / "data.npz", r"data\.npz"),
    "another kind of file": (content("data.csv", b"1,2,3,4\n"), r"data\.csv is not, and has no, \.npz, \.npy, \.jsonl"),
    "empty folder": (lambda folder: folder, r"is not, and has no, \.npz"),
    "not an archive": (content("data.npz", b"something"), r"data\.npz is not an \.npz file"),
    "not an array": (content("data.npy", b"something else"), r"data\.npy is not a numpy array"),
    "cut off": (content("data.npy", b"\x93NUMPY\x01\x00"), r"data\.npy"),
    "other names": (npz(y=normal(3, 4)), r"data\.npz, samples 0 to 2 has y; the model's inputs are x"),
    "one name too many": (npz(x=normal(3, 4), y=normal(3, 4)), r"has x, y; the model's inputs are x"),
    "other width": (npz(x=normal(3, 5)), r"input 'x' has shape \[3, 5\]; the model takes \['batch', 4\]"),
    "other rank": (npz(x=normal(3, 4, 1)), r"input 'x' has shape \[3, 4, 1\]; the model takes \['batch', 4\]"),
    "complex numbers": (npz(x=normal(3, 4).astype(np.complex64)), r"input 'x' is complex64; the model takes float32"),
    "strings": (npz(x=np.array([["a"] * 4])), r"input 'x' is <U1; the model takes float32"),
    "different lengths": (npz(x=normal(3, 4), labels=np.arange(2)), r"different lengths: .*'x': 3.*'labels': 2"),
    "NaN": (npz(x=nan_at(13)), r"data\.npz, samples 8 to 15: input 'x' has NaN or infinity in sample 5 of these"),
    "infinity": (infinity_in_lines, r"data\.jsonl, line 1: input 'x' has NaN or infinity in sample 1"),
    "objects": (npz(x=np.array([{}, {}], dtype=object)), r"x\.npy must be .* array of numbers"),
    "column order": (npy(np.asfortranarray(normal(3, 4))), r"must be a C-ordered array"),
    "scalar": (npy(np.float32(1)), r"must be a C-ordered array of numbers whose first axis counts samples"),
    "not JSON": (content("data.jsonl", b'{"x": [1, 2, 3, 4]}\nx\n'), r"data\.jsonl, line 2 is not JSON"),
    "not an object": (content("data.jsonl", b"[1]\n"), r"data\.jsonl, line 1 must be"),
    "text without a tokenizer": (content("data.jsonl", b'{"text": "a"}\n'), r"no tokenizer\.json beside it: --tokeni"),
    "ragged lines": (content("data.jsonl", b'{"x": [[1], [1, 2]]}\n'), r"data\.jsonl, line 1"),
    "a name missing in a line": (content("data.jsonl", b'{"x": [1, 2, 3, 4]}\n{}\n'), r"data\.jsonl, line 2"),
    "not UTF-8": (content("data.jsonl", b'{"text": "\xff"}\n'), r"data\.jsonl"),
    "null": (content("data.jsonl", b'{"x": null}\n'), r"data\.jsonl, line 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_model_cannot_take_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write, complaint = BAD[name]
    with pytest.raises(QuantizationError, match=complaint) as refusal:
        arrays(write(tmp_path))
    assert "\n" not in str(refusal.value)


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", normal(40, 4))
    whole = (tmp_path / "data.npy").read_bytes()
    (tmp_path / "data.npy").write_bytes(whole[:-100])
    with pytest.raises(QuantizationError, match=r"data\.npy"):
        arrays(tmp_path / "data.npy")


def test_fractions_for_ids_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", input_ids=normal(3, 4), attention_mask=np.ones((3, 4), np.int64))
    with pytest.raises(QuantizationError, match="input 'input_ids' is float32; the model takes int64"):
        list(Samples(tmp_path / "data.npz", TOKENS, None))


def test_a_pickle_in_an_archive_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "opened",)

    np.savez(tmp_path / "data.npz", x=np.array([Trap()], dtype=object))
    with pytest.raises(QuantizationError, match="must be a C-ordered array of numbers"):
        arrays(tmp_path / "data.npz")
    assert not (tmp_path / "opened").exists()
