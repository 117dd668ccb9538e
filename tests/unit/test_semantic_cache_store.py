"""The store: durable, shared, forgetful on time."""

import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from semantic_cache.store import Entry, Found, Store

PYTHON_BACKENDS = Path(__file__).parents[2] / "python_backends"
VECTOR = np.arange(4, dtype=np.float32)
FAR = 1e12
WRITER = """
import sys, time
from pathlib import Path
from semantic_cache.store import Entry, Store
store, name = Store(Path(sys.argv[1])), sys.argv[2]
number = 0
while True:
    key = f"{name} {number}".encode()
    store.put([Entry(b"partition", key, "prompt", f"answer to {number}", "{}", None, 0.0, 1e12)])
    print(number, flush=True)
    number += 1
    time.sleep(0.001)
"""


def entry(exact: bytes, expires: float = FAR, answer: str = "answer", partition: bytes = b"p") -> Entry:
    return Entry(partition, exact, "prompt", answer, "{}", VECTOR, 0.0, expires)


def writer(path: Path, name: str) -> subprocess.Popen[str]:
    """A process that stores entries for ever and prints the number of each once it is acknowledged."""
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name], cwd=PYTHON_BACKENDS, stdout=subprocess.PIPE, text=True
    )


def acknowledged(process: subprocess.Popen[str]) -> int:
    """Kill the writer outright and return how many entries it had been told are stored."""
    process.kill()
    output, _ = process.communicate()
    return output.count("\n")


@pytest.mark.parametrize("round_", range(5))
def test_a_killed_writer_loses_no_acknowledged_entry(tmp_path: Path, round_: int) -> None:
    path = tmp_path / "store.sqlite"
    process = writer(path, "one")
    assert process.stdout
    process.stdout.readline()
    time.sleep(0.05 + 0.07 * round_)
    count = 1 + acknowledged(process)
    store = Store(path)
    for number in range(count):
        assert store.get(f"one {number}".encode(), 0.0) == Found(f"answer to {number}", "{}")
    assert store.count() in (count, count + 1)  # the last may be stored and not yet acknowledged


def test_writers_of_several_processes_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    processes = [writer(path, name) for name in ("one", "two", "three")]  # all create it at once
    for process in processes:
        assert process.stdout and process.stdout.readline() == "0\n"
    time.sleep(0.3)
    counts = [1 + acknowledged(process) for process in processes]
    store = Store(path)
    for name, count in zip(("one", "two", "three"), counts, strict=True):
        assert all(store.get(f"{name} {number}".encode(), 0.0) for number in range(count))
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_an_expired_entry_is_never_served_and_goes_with_a_purge(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.sqlite")
    store.put([entry(b"soon", expires=10.0), *(entry(b"%d" % number, expires=5.0) for number in range(2500))])
    assert store.get(b"soon", 9.9) == Found("answer", "{}")
    assert store.get(b"soon", 10.0) is None
    assert store.candidates([1], 10.0) == []
    assert store.after(b"p", 0, 10.0, VECTOR.size, 9).expiries == []
    store.purge(9.9)
    assert store.count() == 1
    store.purge(10.0)
    assert store.count() == 0


def test_an_entry_replaces_the_one_with_its_key_under_a_new_id(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.sqlite")
    store.put([entry(b"a", answer="old"), entry(b"b")])
    store.put([entry(b"a", answer="new")])
    assert store.get(b"a", 0.0) == Found("new", "{}")
    assert store.count() == 2
    vectors = store.after(b"p", 2, 0.0, VECTOR.size, 9)
    assert vectors.ids.tolist() == [3]
    np.testing.assert_array_equal(vectors.matrix, [VECTOR])


def test_vectors_are_read_by_partition_and_size(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.sqlite")
    store.put([entry(b"a"), entry(b"b", partition=b"q"), entry(b"c")._replace(vector=None), entry(b"d")])
    assert store.after(b"p", 0, 0.0, VECTOR.size, 9).ids.tolist() == [1, 4]
    assert store.after(b"p", 0, 0.0, VECTOR.size, 1).ids.tolist() == [1]
    assert store.after(b"p", 0, 0.0, 384, 9).matrix.shape == (0, 384)


def test_a_batch_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.sqlite")
    with pytest.raises(sqlite3.Error):
        store.put([entry(b"a"), entry(b"b")._replace(answer=None)])  # type: ignore[arg-type]
    assert store.count() == 0
    store.put([entry(b"a")])
    assert store.count() == 1


def test_threads_read_while_another_writes(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.sqlite")
    store.put([entry(b"a")])
    missed: list[bool] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            missed.append(store.get(b"a", 0.0) is None)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(50):
        store.put([entry(b"%d" % number)])
    done.set()
    for reader in readers:
        reader.join()
    store.close()
    assert missed and not any(missed)


def test_only_its_owner_can_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "made" / "for" / "it" / "store.sqlite"
    Store(path).put([entry(b"a")])
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(ValueError, match="schema version 7"):
        Store(path)
