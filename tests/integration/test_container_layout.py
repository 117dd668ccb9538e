"""The folders that docker/Dockerfile makes start under the embedded server."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.serving import guardian, installation, ports
from scripts.serving.probe import NotReady, ask_all
from scripts.serving.repository import model_names
from tests.containerfile import PROJECT, Copy, Stage, stages

READY_S = 120.0


@pytest.fixture(scope="module")
def image() -> Stage:
    return stages()[""]


@pytest.fixture(scope="module")
def root(image: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root directory as the image's COPY lines lay it out, on top of what NVIDIA's image brings."""
    root = tmp_path_factory.mktemp("root")
    lay_base_image(root)
    for copy in image.copies:
        lay(copy, root)
    return root


def lay_base_image(root: Path) -> None:
    """The backends of NVIDIA's image that the repository names: here the stand-in serves for its C++ one."""
    everything = root / "assembled"
    everything.mkdir()
    installation.embedded().assemble_backends(everything)
    for backend in ("python", "onnxruntime"):
        shutil.copytree(everything / backend, root / "opt" / "tritonserver" / "backends" / backend)


def lay(copy: Copy, root: Path) -> None:
    destination = root / copy.destination.lstrip("/")
    for source in copy.sources:
        # The models' stage is the project with its models built, as `make models` leaves this tree.
        origin = PROJECT / (Path(source).relative_to(stages()[copy.stage].workdir) if copy.stage else source)
        if origin.is_dir():
            shutil.copytree(origin, destination)
        else:
            target = destination / origin.name if copy.destination.endswith("/") else destination
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(origin, target)


@pytest.fixture(scope="module")
def url(image: Stage, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server started by the image's own command, with its paths moved under `root`."""
    free = ports.claim("127.0.0.1", {"http-port": 0, "grpc-port": 0, "metrics-port": 0})
    script, repository = image.cmd
    command = [
        f"{root}{script}",
        repository.replace("=/", f"={root}/"),
        f"--backend-directory={root}/opt/tritonserver/backends",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        *(f"--{option}={port}" for option, port in free.items()),
    ]
    embedded = installation.embedded()
    state = tmp_path_factory.mktemp("state")
    environment = embedded.environment() | image.environment | {"INFERENCE_STATE_DIR": str(state)}
    environment["PATH"] += f"{os.pathsep}{embedded.binary.parent}"
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            yield wait_ready(process, f"127.0.0.1:{free['http-port']}", model_names(root / "models"))
            process.terminate()
            process.wait(READY_S)
        finally:
            guardian.kill_group(process.pid)


def wait_ready(process: subprocess.Popen[bytes], url: str, models: list[str]) -> str:
    deadline = time.monotonic() + READY_S
    while True:
        try:
            ask_all(url, models, READY_S)
            return url
        except NotReady:
            assert process.poll() is None, "tritonserver did not start"
            assert time.monotonic() < deadline, f"not ready within {READY_S} s"
            time.sleep(0.2)


def test_every_model_answers_and_the_image_calls_itself_healthy(image: Stage, root: Path, url: str) -> None:
    script, address = image.healthcheck
    check = [f"{root}{script}", address.replace("127.0.0.1:8000", url)]
    assert subprocess.run(check, capture_output=True).returncode == 0


def test_image_calls_a_silent_server_unhealthy(image: Stage, root: Path) -> None:
    [port] = ports.claim("127.0.0.1", {"http-port": 0}).values()
    check = [f"{root}{image.healthcheck[0]}", f"http://127.0.0.1:{port}"]
    assert subprocess.run(check, capture_output=True).returncode != 0
