"""The real server, started once for all integration tests."""

from collections.abc import Iterator

import pytest

from scripts.serving.server import TritonServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The project's own model repository on free ports, with a state of its own."""
    with TritonServer(state_dir=tmp_path_factory.mktemp("state")) as server:
        yield server
