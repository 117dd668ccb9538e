"""Serve a model repository with Triton: `python -m scripts.serve`, and `--check` to ask whether it truly answers."""

import argparse
import logging
import signal
import sys
from pathlib import Path
from types import FrameType

from scripts.serving import probe
from scripts.serving.errors import ServeError
from scripts.serving.repository import model_names
from scripts.serving.server import MODEL_REPOSITORY, STATE_DIR, TritonServer, response_cache

CHECK_TIMEOUT_S = 10.0
CURL = "curl -s {url}/v2/models/generate/generate -d '{body}'"
BODY = '{"text_input": "What does itertools.chain do?", "max_tokens": 48}'


def main() -> int:
    """Serve until SIGINT or SIGTERM, or check a running server; return the exit status."""
    options = _parse()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, _interrupt)
    try:
        return _check(options) if options.check else _serve(options)
    except ServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _serve(options: argparse.Namespace) -> int:
    server = TritonServer(
        options.repository,
        options.host,
        options.http_port,
        options.grpc_port,
        options.metrics_port,
        options.state_dir,
        options.tritonserver,
        options=response_cache(options.response_cache_bytes),
    )
    try:
        print(f"Starting Triton with {options.repository} ...", flush=True)
        with server:
            _announce(server)
            signal.pause()
    except KeyboardInterrupt:
        print("Stopped.", flush=True)
    return 0


def _check(options: argparse.Namespace) -> int:
    try:
        probe.ask_all(f"{options.host}:{options.http_port}", model_names(options.repository), CHECK_TIMEOUT_S)
    except probe.NotReady as reason:
        print(f"not ready: {reason}")
        return 1
    print("ready: every model answers")
    return 0


def _announce(server: TritonServer) -> None:
    print(f"  models   {', '.join(server.models)}")
    print(f"  HTTP     {server.http_url}")
    print(f"  gRPC     {server.grpc_url}")
    print(f"  metrics  {server.metrics_url}/metrics")
    print(f"  log      {server.log}")
    if "generate" in server.models:
        print("Try:\n  " + CURL.format(url=server.http_url.replace("127.0.0.1", "localhost"), body=BODY))
    print("Every model answers. Stop with Ctrl-C.", flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, prog="python -m scripts.serve"
    )
    parser.add_argument("--repository", type=Path, default=MODEL_REPOSITORY, help="model repository to serve")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--http-port", type=int, default=8000, help="0 picks a free one")
    parser.add_argument("--grpc-port", type=int, default=8001, help="0 picks a free one")
    parser.add_argument("--metrics-port", type=int, default=8002, help="0 picks a free one")
    parser.add_argument(
        "--state-dir", type=Path, default=STATE_DIR, help="what outlives the server: caches and its log"
    )
    parser.add_argument("--tritonserver", type=Path, help="use this one, not the one on PATH or the embedded one")
    parser.add_argument(
        "--response-cache-bytes",
        type=int,
        default=0,
        help="size of Triton's own cache, for models whose config.pbtxt switches it on; 0: none",
    )
    parser.add_argument(
        "--check", action="store_true", help="exit 0 only if every model of a running server answers now"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
