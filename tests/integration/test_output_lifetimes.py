"""What becomes of the outputs that a caller does not ask for, and of what Triton made when a server stops."""

import queue
import shutil
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc

from scripts.serving.installation import PYTHON_BACKENDS
from scripts.serving.server import MODEL_REPOSITORY, TritonServer
from tests.integration.test_generate import TIMEOUT_S, tensor

GUARD = Path(__file__).parent / "repositories" / "guard.py"
MODEL = """import sys
sys.path[:0] = [{backends!r}, {guard!r}]
import guard
from {backend}.model import TritonPythonModel
"""
OUTPUTS = {
    "semantic_cache": ("cached_output", "cache_entry", "cache_info"),
    "language_model": ("text_output", "info"),
    "generate": ("text_output", "info"),
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The project's models, with guarded backends."""
    repository = tmp_path / "repository"
    shutil.copytree(MODEL_REPOSITORY, repository)
    for model, backend in {"semantic_cache": "semantic_cache", "language_model": "speculative_decoding"}.items():
        config = repository / model / "config.pbtxt"
        config.write_text(config.read_text().replace(f'backend: "{backend}"', 'backend: "python"'))
        code = MODEL.format(backends=str(PYTHON_BACKENDS), guard=str(GUARD.parent), backend=backend)
        (repository / model / "1" / "model.py").write_text(code)
    return repository


def ask_for(server: TritonServer, model: str, output: str) -> str:
    """Return the one output asked for."""
    results: queue.Queue[Any] = queue.Queue()
    prompt = tensor("text_input", f"What does {model} give for {output}?".encode())
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: results.put(error or result))
        client.async_stream_infer(model, [prompt], outputs=[tritonclient.grpc.InferRequestedOutput(output)])
        result = results.get(timeout=TIMEOUT_S)
        assert not isinstance(result, Exception), result
        value: bytes = result.as_numpy(output).item()
        return value.decode()


def test_outputs_that_nobody_asked_for_are_freed_where_python_may_run(repository: Path, tmp_path: Path) -> None:
    with TritonServer(repository, state_dir=tmp_path / "state") as server:
        for model, outputs in OUTPUTS.items():
            for output in outputs:
                first, again = ask_for(server, model, output), ask_for(server, model, output)
                assert bool(first) == bool(again) == (output != "cached_output")  # nobody stores for the cache alone
        assert server.restarts == 0
    assert "Fatal Python error" not in server.log.read_text(errors="replace")
