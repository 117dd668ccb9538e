"""Which tritonserver runs, and the backend directory it is given."""

import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from scripts.serving.errors import ServeError

PROJECT = Path(__file__).resolve().parents[2]
PYTHON_BACKENDS = PROJECT / "python_backends"
MODEL_REPOSITORY = PROJECT / "model_repository"


@dataclass(frozen=True)
class Installation:
    """A tritonserver, and where its own backends and libraries are."""

    binary: Path
    backends: Path
    stub: Path | None = None  # the Python backend's stub, where it does not lie in `backends` already
    libraries: tuple[Path, ...] = ()

    @property
    def is_embedded(self) -> bool:
        """Whether this is the server inside the nvidia-pytriton wheel."""
        return self.stub is not None

    def assemble_backends(self, directory: Path) -> None:
        """Fill the empty `directory` with this server's backends and those of this project that it lacks.

        Folders are links. Only the embedded server's Python backend is copied: it has to be joined with its stub,
        and Triton refuses a backend library that is a link.
        """
        for folder in (*self.backends.iterdir(), *PYTHON_BACKENDS.iterdir()):
            target = directory / folder.name
            if folder.name == "python" and self.stub:
                shutil.copytree(folder, target)
                shutil.copy2(self.stub, target)
            elif folder.is_dir() and not target.exists():
                target.symlink_to(folder.resolve())

    def environment(self) -> dict[str, str]:
        """Return this process's environment with what the server and its Python stubs need to start."""
        libraries = [*map(str, self.libraries), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            "ORT_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1",
        }


def find(tritonserver: Path | None = None) -> Installation:
    """Return the named tritonserver, else the one on PATH, else the one embedded in the nvidia-pytriton wheel.

    Raises ServeError when there is none.
    """
    binary = tritonserver or shutil.which("tritonserver")
    return _system(Path(binary)) if binary else embedded()


def embedded() -> Installation:
    """Return the tritonserver inside the nvidia-pytriton wheel. Raises ServeError when it is not installed."""
    package = find_spec("pytriton")
    if package is None or package.origin is None:
        raise ServeError(
            "no tritonserver: run `make models` to install the embedded one, or name one with --tritonserver"
        )
    home = Path(package.origin).parent / "tritonserver"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Installation(
        binary=home / "bin" / "tritonserver",
        backends=home / "backends",
        stub=home / "python_backend_stubs" / python / "triton_python_backend_stub",
        libraries=(home.parents[1] / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR"))),
    )


def _system(binary: Path) -> Installation:
    backends = binary.resolve().parent.parent / "backends"
    if not os.access(binary, os.X_OK):
        raise ServeError(f"{binary} is not an executable file: give --tritonserver the path of a tritonserver")
    if not backends.is_dir():
        raise ServeError(f"{binary} has no backends: {backends} is missing")
    return Installation(binary=binary.absolute(), backends=backends)
