"""What the launcher promises, on a tiny repository that starts in two seconds."""

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from scripts.serving import installation
from scripts.serving.errors import ServeError
from scripts.serving.probe import NotReady, ask_all
from scripts.serving.server import TritonServer

TINY = Path(__file__).parent / "repositories" / "tiny"
PROJECT = installation.PROJECT
NOTICED_S = 5.0  # what the watchdog promises
READY_S = 30.0


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[TritonServer]:
    with TritonServer(TINY, state_dir=tmp_path / "state") as server:
        yield server


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Run `python -m scripts.serve` on the tiny repository, as a user does; stopped at the end of the test."""
    launched: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "scripts.serve", "--repository", str(TINY), "--state-dir", str(tmp_path)]
        launched.append(
            subprocess.Popen(
                [*command, *arguments], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
        return launched[-1]

    yield run
    for process in launched:
        with process:
            process.kill()


def ask(server: TritonServer, model: str, text: str, **parameters: int) -> str:
    body = json.dumps({"text_input": text, **parameters}).encode()
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/{model}/generate", body)
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: str = json.load(response)["text"]
        return answer


def backend_process(server: TritonServer, model: str) -> psutil.Process:
    marker = f"{server.repository}/{model}/"
    [stub] = [process for process in descendants(os.getpid()) if any(marker in word for word in words(process)[1:2])]
    return stub


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def shared_memory(log: Path) -> list[Path]:
    """Return the regions in /dev/shm of the server that wrote this log: Triton logs their prefix when it starts."""
    prefixes = set(re.findall(r"inference-[0-9a-f]{16}-", log.read_text()))
    assert prefixes
    return [region for prefix in prefixes for region in Path("/dev/shm").glob(prefix + "*")]


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """Wait for `condition` and return how long it took; fail after `seconds`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - start


def wait_for_address(process: subprocess.Popen[str]) -> str:
    """Read the launcher's announcement to its end; return the HTTP address in it."""
    assert process.stdout
    announcement = ""
    for line in process.stdout:
        announcement += line
        if line.startswith("Every model answers"):
            break
    found = re.search(r"HTTP +(\S+)", announcement)
    assert found, announcement
    return found[1]


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_broken_backend_process_is_noticed_in_time_and_the_next_request_succeeds(
    tiny: TritonServer, caplog: pytest.LogCaptureFixture, blow: signal.Signals
) -> None:
    stub = backend_process(tiny, "echo")
    with caplog.at_level(logging.WARNING):
        stub.send_signal(blow)
        wait_until(lambda: tiny.restarts == 1, NOTICED_S)
        tiny.wait_ready(READY_S)
    assert ask(tiny, "echo", "again") == "again"
    assert not stub.is_running()
    assert "restarting the server in 0.5 s" in caplog.text


def test_dead_server_process_is_restarted_and_the_delay_grows(
    tiny: TritonServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for restarts, delay in ((1, 0.5), (2, 1.0), (3, 2.0)):
            backend_process(tiny, "stream").parent().kill()
            wait_until(lambda restarts=restarts: tiny.restarts == restarts, NOTICED_S)
            tiny.wait_ready(READY_S)
            assert f"restarting the server in {delay} s" in caplog.text
    assert ask(tiny, "echo", "again") == "again"


def test_hung_backend_process_is_noticed_in_time_and_the_next_request_succeeds(tiny: TritonServer) -> None:
    def hang() -> None:
        with pytest.raises(OSError):
            ask(tiny, "echo", "hang", wait_s=3600)

    hanging = threading.Thread(target=hang)
    hanging.start()
    wait_until(lambda: tiny.restarts == 1, NOTICED_S)
    tiny.wait_ready(READY_S)
    hanging.join()
    assert ask(tiny, "echo", "again") == "again"


def test_busy_model_and_one_that_waits_for_it_are_not_taken_for_hung(tiny: TritonServer) -> None:
    assert ask(tiny, "relay", "long", work_s=2 * int(NOTICED_S)) == "long"
    assert tiny.restarts == 0


def test_check_tells_the_truth_through_a_restart(tiny: TritonServer) -> None:
    def check() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "scripts.serve", "--check", "--repository", str(TINY)]
        port = tiny.http_url.rpartition(":")[2]
        return subprocess.run([*command, "--http-port", port], cwd=PROJECT, capture_output=True, text=True)

    assert check().returncode == 0
    backend_process(tiny, "echo").kill()
    broken = check()
    assert broken.returncode == 1
    assert broken.stdout.startswith("not ready: ") and broken.stdout.count("\n") == 1
    wait_until(lambda: tiny.restarts == 1, NOTICED_S)
    assert check().returncode == 1
    tiny.wait_ready(READY_S)
    assert check().returncode == 0


def test_probe_refuses_a_server_whose_backend_died_although_triton_calls_it_ready(tiny: TritonServer) -> None:
    ask_all(tiny.http_url, tiny.models, 10.0)
    backend_process(tiny, "stream").kill()
    with pytest.raises(NotReady, match="stream"):
        ask_all(tiny.http_url, tiny.models, 10.0)


def test_restricted_apis_need_the_key(tiny: TritonServer) -> None:
    def status(path: str, method: str, headers: dict[str, str]) -> int:
        request = urllib.request.Request(f"http://{tiny.http_url}/v2/{path}", method=method, headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code

    restricted = [
        ("systemsharedmemory/status", "GET"),
        ("repository/index", "POST"),
        ("models/echo/stats", "GET"),
        ("trace/setting", "GET"),
        ("logging", "GET"),
    ]
    for path, method in restricted:
        assert status(path, method, {}) == 403, path
        assert status(path, method, {"admin-key": "guess"}) == 403, path
        assert status(path, method, {"admin-key": tiny.admin_key}) == 200, path

    with tritonclient.grpc.InferenceServerClient(tiny.grpc_url) as client:
        for call in (
            client.get_system_shared_memory_status,
            client.get_model_repository_index,
            client.get_inference_statistics,
            client.get_trace_settings,
            client.get_log_settings,
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                call()
            call(headers={"triton-grpc-protocol-admin-key": tiny.admin_key})


def test_stop_leaves_no_process_and_no_shared_memory(tmp_path: Path) -> None:
    others = set(descendants(os.getpid()))
    with TritonServer(TINY, state_dir=tmp_path) as server:
        processes = set(descendants(os.getpid())) - others
        assert len(processes) >= 5  # the guardian, the server, three backend processes
        assert len(shared_memory(server.log)) >= 3
        backend_process(server, "echo").kill()  # even so
    assert not any(process.is_running() for process in processes)
    assert not shared_memory(server.log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_launcher_cleanly(
    launch: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: int
) -> None:
    launcher = launch("--http-port=0", "--grpc-port=0", "--metrics-port=0")
    wait_for_address(launcher)
    processes = descendants(launcher.pid)
    assert len(processes) >= 5
    launcher.send_signal(number)
    assert launcher.wait(READY_S) == 0
    assert not any(process.is_running() for process in processes)
    assert not shared_memory(tmp_path / "triton.log")


def test_a_launcher_killed_outright_leaves_nothing_either(
    launch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    launcher = launch("--http-port=0", "--grpc-port=0", "--metrics-port=0")
    wait_for_address(launcher)
    processes = descendants(launcher.pid)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(process.is_running() for process in processes), READY_S)
    assert not shared_memory(tmp_path / "triton.log")


def test_a_taken_port_is_one_line_that_says_what_to_do(launch: Callable[..., subprocess.Popen[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        output, _ = (launcher := launch("--http-port=0", f"--grpc-port={port}", "--metrics-port=0")).communicate()
    assert launcher.returncode == 1
    assert f"error: port {port} on 127.0.0.1 is taken" in output and "--grpc-port" in output
    assert "Traceback" not in output


def test_a_model_that_is_not_built_is_named(tmp_path: Path) -> None:
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "config.pbtxt").write_text('backend: "onnxruntime"\n')
    with pytest.raises(ServeError, match="absent; run `make models`"):
        TritonServer(tmp_path, state_dir=tmp_path / "state").start()


def test_a_model_that_cannot_load_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    model = tmp_path / "repository" / "broken"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text('backend: "python"\n')
    (model / "1" / "model.py").write_text("import no_such_module\n")
    others = set(descendants(os.getpid()))
    with pytest.raises(ServeError, match=r"failed to load 'broken'.*no_such_module"):
        TritonServer(tmp_path / "repository", state_dir=tmp_path).start()
    assert not shared_memory(tmp_path / "triton.log")
    assert not set(descendants(os.getpid())) - others


def test_a_named_tritonserver_brings_its_own_backends(tmp_path: Path) -> None:
    """A home laid out as in NVIDIA's container, made from the embedded server."""
    embedded = installation.embedded()
    home = tmp_path / "tritonserver"
    (home / "bin").mkdir(parents=True)
    (home / "backends").mkdir()
    shutil.copy2(embedded.binary, home / "bin")
    embedded.assemble_backends(home / "backends")
    (home / "backends" / "onnxruntime").unlink()  # the container's own, here one that answers like echo
    (home / "backends" / "onnxruntime").mkdir()
    shutil.copy2(TINY / "echo" / "1" / "model.py", home / "backends" / "onnxruntime")
    repository = tmp_path / "repository"
    (repository / "echo" / "1").mkdir(parents=True)
    (repository / "echo" / "1" / "weights").touch()
    config = (TINY / "echo" / "config.pbtxt").read_text()
    (repository / "echo" / "config.pbtxt").write_text(config.replace('"python"', '"onnxruntime"'))
    libraries = {"LD_LIBRARY_PATH": embedded.environment()["LD_LIBRARY_PATH"]}
    named = home / "bin" / "tritonserver"
    with TritonServer(repository, state_dir=tmp_path / "s", tritonserver=named, environment=libraries) as server:
        assert ask(server, "echo", "own") == "own"
