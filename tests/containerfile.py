"""docker/Dockerfile, read with BuildKit's own parser."""

from pathlib import Path
from typing import NamedTuple

import dockerfile

PROJECT = Path(__file__).resolve().parents[1]
DOCKERFILE = PROJECT / "docker" / "Dockerfile"


class Copy(NamedTuple):
    """One COPY line; `stage` is empty when it copies from the build context."""

    stage: str
    sources: tuple[str, ...]
    destination: str


class Stage(NamedTuple):
    """What one FROM begins."""

    copies: list[Copy]
    workdir: str
    cmd: tuple[str, ...]
    healthcheck: tuple[str, ...]
    environment: dict[str, str]


def stages() -> dict[str, Stage]:
    """Return the stages by name, in order; the last, which becomes the image, is called ""."""
    found: dict[str, Stage] = {}
    for line in dockerfile.parse_file(str(DOCKERFILE)):
        if line.cmd == "FROM":
            name = line.value[2] if len(line.value) == 3 else ""
            found[name] = stage = Stage([], "/", (), (), {})
        elif line.cmd == "COPY":
            origin = "".join(flag.removeprefix("--from=") for flag in line.flags if flag.startswith("--from="))
            stage.copies.append(Copy(origin, line.value[:-1], line.value[-1]))
        elif line.cmd == "ENV":
            stage.environment.update(zip(line.value[::2], line.value[1::2], strict=True))
        elif line.cmd == "WORKDIR":
            found[name] = stage = stage._replace(workdir=line.value[0])
        elif line.cmd == "CMD":
            found[name] = stage = stage._replace(cmd=line.value)
        elif line.cmd == "HEALTHCHECK":
            found[name] = stage = stage._replace(healthcheck=line.value[1:])
    return found
