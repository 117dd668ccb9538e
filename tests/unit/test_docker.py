"""The container files are well formed and agree with the rest of the project."""

import ast
import subprocess
import sys
from pathlib import Path

from tests.containerfile import DOCKERFILE, PROJECT, stages

TOOLS = Path(sys.executable).parent
SHIPPED = ("semantic_cache", "speculative_decoding")
GIVEN = {"numpy", "triton_python_backend_utils"}  # by NVIDIA's image
PACKAGES = {"azure": {"azure-cosmos"}, "psycopg": {"psycopg", "psycopg-binary"}}  # named unlike what is imported


def pins(path: Path) -> dict[str, str]:
    lines = (line for line in path.read_text().splitlines() if "==" in line and not line.startswith("#"))
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines)}


def imports(folder: Path) -> set[str]:
    """Return the top-level names of what the Python files in `folder` import from elsewhere."""
    found: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {folder.name}


def test_dockerfile_passes_hadolint() -> None:
    subprocess.run([TOOLS / "hadolint", DOCKERFILE], check=True)


def test_compose_file_follows_the_compose_specification() -> None:
    check = [TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    subprocess.run([*check, PROJECT / "docker" / "compose.yaml"], check=True)


def test_image_installs_what_its_backends_import_in_the_locked_versions() -> None:
    installed = pins(PROJECT / "docker" / "requirements.txt")
    needed = set().union(*(imports(PROJECT / "python_backends" / backend) for backend in SHIPPED)) - GIVEN
    assert set().union(*(PACKAGES.get(name, {name}) for name in needed)) == set(installed)
    assert installed.items() <= pins(PROJECT / "requirements.lock").items()


def test_build_context_holds_every_file_that_is_copied() -> None:
    lines = (PROJECT / ".dockerignore").read_text().splitlines()
    kept = {Path(line[1:]) for line in lines if line.startswith("!")}
    sources = {
        Path(source)
        for stage in stages().values()
        for copy in stage.copies
        if not copy.stage
        for source in copy.sources
    }
    for source in sources:
        assert kept & {source, *source.parents}, f"{source} is left out by .dockerignore"
