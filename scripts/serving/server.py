"""A Triton server that stays up: started, proven ready, watched, restarted, stopped without a trace."""

import logging
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from scripts.serving import installation, ports, probe
from scripts.serving.errors import ServeError
from scripts.serving.installation import MODEL_REPOSITORY
from scripts.serving.process import TritonProcess, Usage
from scripts.serving.repository import model_names
from scripts.serving.watchdog import LOOK_S, Watchdog

STATE_DIR = installation.PROJECT / ".state"
RESTRICTED_APIS = "shared-memory,model-repository,statistics,trace,logging"
ADMIN_HEADER = "admin-key"
EXIT_TIMEOUT_S = 10
LOAD_TIMEOUT_S = 600  # of one model, and of all
# Of each backend process. Regions that have to grow under concurrent BLS calls crash the server (triton server #8882);
# with the default of 1 MiB, 32 clients with prompts of 500 tokens did so within 20 s.
SHARED_MEMORY_BYTES = 64 * 2**20
PROBE_TIMEOUT_S = 30.0
READY_POLL_S = 0.1
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0  # before a restart, doubled each time ...
STABLE_S = 60.0  # ... until the server has stayed up for so long

EXPOSED = "the embedded tritonserver 2.51 has known vulnerabilities, so serve a network from the container instead"

logger = logging.getLogger(__name__)


def response_cache(size: int) -> list[str]:
    """Return tritonserver's options for a response cache of so many bytes, of which models may make use; 0: none."""
    return [f"--cache-config=local,size={size}"] if size else []


class TritonServer:
    """The model repository, served on `host`; use it as a context manager, or call start() and stop().

    `restarts` counts the times that the watchdog found the server broken. The restricted APIs (shared memory, model
    repository, statistics, trace, logging) need the HTTP header `admin-key`, or the gRPC metadata
    `triton-grpc-protocol-admin-key`, with the value `admin_key`: random, and told to nobody but Triton.
    """

    def __init__(
        self,
        repository: Path = MODEL_REPOSITORY,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        state_dir: Path | None = None,
        tritonserver: Path | None = None,
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """Prepare a server; port 0 means a free one.

        `state_dir` (created; default .state in the project) holds what outlives the server: the backends' stores and
        the log. `environment` is added to what the server's processes see, `options` to tritonserver's command line.
        """
        self.repository = repository.resolve()
        self.state_dir = (state_dir or STATE_DIR).resolve()
        self.log = self.state_dir / "triton.log"
        self.admin_key = secrets.token_hex(16)
        self.models: list[str] = []
        self.restarts = 0
        self._host = host
        self._wanted = {"http-port": http_port, "grpc-port": grpc_port, "metrics-port": metrics_port}
        self._ports = dict(self._wanted)
        self._tritonserver = tritonserver
        self._options = options
        self._environment = {**(environment or {}), "INFERENCE_STATE_DIR": str(self.state_dir)}
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._supervisor: threading.Thread | None = None

    @property
    def http_url(self) -> str:
        return self._url("http-port")

    @property
    def grpc_url(self) -> str:
        return self._url("grpc-port")

    @property
    def metrics_url(self) -> str:
        return self._url("metrics-port")

    def usage(self) -> Usage:
        """Return what the server has used so far. Raises psutil.NoSuchProcess while it does not run."""
        return self._process.usage()

    def start(self) -> None:
        """Start the server and its watchdog; return when every model has answered.

        Raises ServeError when a port is taken, a model is not built, no tritonserver is found, or it does not start.
        """
        self._installation = installation.find(self._tritonserver)
        if self._installation.is_embedded and not self._host.startswith(("127.", "localhost")):
            logger.warning("listening on %s: %s", self._host, EXPOSED)
        self.models = model_names(self.repository)
        self._ports = ports.claim(self._host, self._wanted)
        self.state_dir.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        self._stopping.clear()
        watchdog = self._launch()
        self._ready.set()
        self._supervisor = threading.Thread(target=self._supervise, args=[watchdog], name="supervisor", daemon=True)
        self._supervisor.start()

    def stop(self) -> None:
        """End the server gracefully and wait until nothing is left of it."""
        self._stopping.set()
        if self._supervisor:
            self._supervisor.join()
            self._supervisor = None
        self._ready.clear()

    def wait_ready(self, timeout: float = LOAD_TIMEOUT_S) -> None:
        """Wait until every model answers, through restarts. Raises ServeError after `timeout` seconds."""
        if not self._ready.wait(timeout):
            raise ServeError(f"the server was not ready within {timeout} s; see {self.log}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _launch(self) -> Watchdog:
        """Start the server and wait until it answers; on any failure, end it. Raises ServeError."""
        environment = {"INFERENCE_HTTP_URL": f"http://{self.http_url}", **self._environment}
        self._process = TritonProcess(self._installation, self._arguments(), environment, self.log)
        try:
            self._wait_for_answers()
            return Watchdog(self._process, self.http_url, self.models)
        except (probe.NotReady, psutil.NoSuchProcess) as error:
            self._process.kill()
            raise ServeError(f"tritonserver broke while starting: {error}; see {self.log}") from error
        except BaseException:
            self._process.kill()
            raise

    def _wait_for_answers(self) -> None:
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        while not self._stopping.wait(READY_POLL_S):
            if self._process.exit_status is not None:
                raise ServeError(f"tritonserver did not start: {self._complaint()}; see {self.log}")
            try:
                return probe.ask_all(self.http_url, self.models, PROBE_TIMEOUT_S)
            except probe.NotReady:
                if time.monotonic() > deadline:
                    raise
        raise ServeError("stopped while starting")

    def _supervise(self, watchdog: Watchdog | None) -> None:
        """Watch and restart until stop() is called, then end the server."""
        delay = FIRST_DELAY_S
        while watchdog:
            ready_at = time.monotonic()
            fault = self._watch(watchdog)
            self._ready.clear()
            if fault is None:
                self._process.stop()
                return watchdog.close()
            if time.monotonic() - ready_at >= STABLE_S:
                delay = FIRST_DELAY_S
            self.restarts += 1
            logger.warning("%s: restarting the server in %.1f s", fault, delay)
            self._process.kill()
            watchdog.close()
            watchdog, delay = self._restart(delay)

    def _watch(self, watchdog: Watchdog) -> str | None:
        """Return what is wrong as soon as something is, or None once stop() is called."""
        while not self._stopping.wait(LOOK_S):
            if fault := watchdog.fault():
                return fault
        return None

    def _restart(self, delay: float) -> tuple[Watchdog | None, float]:
        """Start the server again, as often as it takes; return its watchdog (None once stopping) and the next delay."""
        while not self._stopping.wait(delay):
            delay = min(2 * delay, LONGEST_DELAY_S)
            try:
                watchdog = self._launch()
            except (ServeError, OSError) as error:
                if not self._stopping.is_set():
                    logger.error("%s: next try in %.1f s", error, delay)
                continue
            self._ready.set()
            logger.warning("the server is ready again")
            return watchdog, delay
        return None, delay

    def _arguments(self) -> list[str]:
        return [
            f"--model-repository={self.repository}",
            f"--http-address={self._host}",
            f"--grpc-address={self._host}",
            *(f"--{option}={port}" for option, port in self._ports.items()),
            f"--http-restricted-api={RESTRICTED_APIS}:{ADMIN_HEADER}={self.admin_key}",
            f"--grpc-restricted-protocol={RESTRICTED_APIS}:{ADMIN_HEADER}={self.admin_key}",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            f"--backend-config=python,shm-default-byte-size={SHARED_MEMORY_BYTES}",
            f"--backend-config=python,stub-timeout-seconds={LOAD_TIMEOUT_S}",
            "--log-format=ISO8601",
            *self._options,
        ]

    def _complaint(self) -> str:
        """Return the line of the log that says best why the server did not start."""
        lines = self.log.read_text(errors="replace").splitlines()
        telling = ("Poll failed", "failed to load '", "Invalid argument", "error:")
        failures = [line for line in lines if any(words in line for words in telling)]
        return (failures or lines or ["it said nothing"])[0].strip()

    def _url(self, option: str) -> str:
        return f"{'127.0.0.1' if self._host == '0.0.0.0' else self._host}:{self._ports[option]}"
