"""One run of tritonserver, with the backend processes that it starts."""

import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from scripts.serving import guardian
from scripts.serving.installation import Installation

STUB = "triton_python_backend_stub"


class Usage(NamedTuple):
    """CPU seconds, and bytes of memory that are no other process's."""

    cpu_s: float
    memory_bytes: int


class TritonProcess:
    """A running tritonserver under its guardian; whatever ends it, no process and no shared memory of it stays."""

    def __init__(
        self, installation: Installation, arguments: list[str], environment: Mapping[str, str], log: Path
    ) -> None:
        """Start the server with `arguments`, `environment` on top of what it needs, and its output added to `log`."""
        self._prefix = f"inference-{secrets.token_hex(8)}-"
        self._scratch = Path(tempfile.mkdtemp(prefix=self._prefix))
        installation.assemble_backends(self._scratch)
        command = [
            str(installation.binary),
            *arguments,
            f"--backend-directory={self._scratch}",
            f"--cache-directory={installation.backends.parent / 'caches'}",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
        ]
        with log.open("ab") as output:
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", "-S", guardian.__file__, self._prefix, str(self._scratch), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=installation.environment() | dict(environment),
                start_new_session=True,
            )
        self._server: psutil.Process | None = None  # found once it has been started

    @property
    def exit_status(self) -> int | None:
        """The server's exit status, or None while it runs."""
        return self._guardian.poll()

    @property
    def server(self) -> psutil.Process:
        """The tritonserver itself. Raises psutil.NoSuchProcess before it has started and after it has ended."""
        if self._server is None:
            children = psutil.Process(self._guardian.pid).children()
            if not children:
                raise psutil.NoSuchProcess(self._guardian.pid)
            self._server = children[0]
        return self._server

    def children(self) -> list[tuple[str, psutil.Process]]:
        """Return the server's child processes, each with the model it runs ("" for one that has died)."""
        return [(_model_of(child), child) for child in self.server.children()]

    def usage(self) -> Usage:
        """Return what the server and its child processes have used."""
        processes = [self.server, *self.server.children()]
        times = [process.cpu_times() for process in processes]
        return Usage(
            sum(time.user + time.system for time in times),
            sum(process.memory_full_info().uss for process in processes),
        )

    def stop(self) -> None:
        """End the server gracefully: requests in flight may finish within Triton's exit timeout."""
        self._end(b"")

    def kill(self) -> None:
        """End the server at once."""
        self._end(b"kill")

    def _end(self, order: bytes) -> None:
        try:
            self._guardian.communicate(order, timeout=2 * guardian.GRACE_S)
        except subprocess.TimeoutExpired:
            self._guardian.kill()
            self._guardian.wait()
        if self._guardian.returncode < 0:  # it was killed, and could not do its work
            if self._server:
                guardian.kill_group(self._server.pid)
            guardian.remove_leavings(self._prefix, self._scratch)


def _model_of(child: psutil.Process) -> str:
    """Read the model's name from the command line: stub REPOSITORY/MODEL/VERSION/model.py ..."""
    command = child.cmdline()
    return Path(command[1]).parts[-3] if command and Path(command[0]).name == STUB else ""
