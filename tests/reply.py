"""What a client of the ensemble gets."""

from typing import Any, NamedTuple


class Reply(NamedTuple):
    """An answer and its info."""

    text: str
    info: dict[str, Any]

    @property
    def source(self) -> str:
        return str(self.info["source"])
