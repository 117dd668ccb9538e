"""SQLite: nothing acknowledged is lost, processes share a file, and nobody else reads it."""

import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from semantic_cache.records import Entry, Found, Key
from semantic_cache.stores.sqlite import SqliteStore

PYTHON_BACKENDS = Path(__file__).parents[2] / "python_backends"
WRITER = """
import sys, time
from pathlib import Path
from semantic_cache.records import Entry, Key
from semantic_cache.stores.sqlite import SqliteStore
store, name = SqliteStore(Path(sys.argv[1])), sys.argv[2]
number = 0
while True:
    key = f"{name} {number}".encode()
    answer = f"answer to {number}"
    store.put([Entry(Key(b"partition", key), b"t", "m", "prompt", answer, "{}", None, (), 1, 0.0, 1e12)])
    print(number, flush=True)
    number += 1
    time.sleep(0.001)
"""


def entry(exact: bytes) -> Entry:
    return Entry(Key(b"p", exact), b"t", "m", "prompt", "answer", "{}", None, (), 1, 0.0, 1e12)


def key(text: str) -> Key:
    return Key(b"partition", text.encode())


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
    store = SqliteStore(path)
    for number in range(count):
        assert store.get(key(f"one {number}"), 0.0) == Found(f"answer to {number}", "{}", 0.0)
    assert store.usage().entries in (count, count + 1)  # the last may be stored and not yet acknowledged


def test_writers_of_several_processes_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    processes = [writer(path, name) for name in ("one", "two", "three")]  # all create it at once
    for process in processes:
        assert process.stdout and process.stdout.readline() == "0\n"
    time.sleep(0.3)
    counts = [1 + acknowledged(process) for process in processes]
    store = SqliteStore(path)
    for name, count in zip(("one", "two", "three"), counts, strict=True):
        assert all(store.get(key(f"{name} {number}"), 0.0) for number in range(count))
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_only_its_owner_can_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "made" / "for" / "it" / "store.sqlite"
    SqliteStore(path).put([entry(b"a")])
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(ValueError, match="schema version 7"):
        SqliteStore(path)
