"""A minute of mixed load on a server of its own, by locust: `make load`, or `python -m perf.load [locust options]`."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.serving.installation import PROJECT
from scripts.serving.server import TritonServer

LOCUSTFILE = Path(__file__).parent / "locustfile.py"
REPORT = PROJECT / ".build" / "load.html"


def run(server: TritonServer, options: list[str], report: Path = REPORT) -> int:
    """Send the load to `server` and write the HTML report; return locust's exit status, 1 when a request failed.

    `options` are locust's own and override ours: 12 users, all of them at work within 4 s, for a minute.
    """
    report.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
    command += ["--users", "12", "--spawn-rate", "3", "--run-time", "60s", "--html", str(report)]
    environment = os.environ | {"GRPC_URL": server.grpc_url}
    return subprocess.run(
        [*command, "--host", f"http://{server.http_url}", *options], env=environment, cwd=PROJECT
    ).returncode


def main() -> int:
    """Serve, load, and say where the report is."""
    with tempfile.TemporaryDirectory(prefix="load-") as state, TritonServer(state_dir=Path(state)) as server:
        status = run(server, sys.argv[1:])
    print(f"report: {REPORT}")
    return status


if __name__ == "__main__":
    sys.exit(main())
