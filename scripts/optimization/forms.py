"""The forms of a model that have been made, kept over an interruption."""

import json
import shutil
from pathlib import Path

from scripts.whole_file import write_whole

INDEX = "forms.json"


class Forms:
    """Folders with weights, by name, below `folder`; what was made of another model or other data is thrown away."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self._digest = digest
        self._made: dict[str, str] = {}
        index = folder / INDEX
        if index.is_file() and (known := json.loads(index.read_text(encoding="utf-8")))["digest"] == digest:
            self._made = known["made"]
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def __contains__(self, name: str) -> bool:
        return name in self._made

    def __getitem__(self, name: str) -> Path:
        return self.folder / self._made[name]

    def names(self) -> list[str]:
        """Return the names of all forms, in the order in which they were kept."""
        return list(self._made)

    def keep(self, name: str, folder: Path) -> None:
        """Note that `folder`, below this one's, holds the form `name` whole."""
        self._made[name] = str(folder.relative_to(self.folder))
        write_whole(self.folder / INDEX, json.dumps({"digest": self._digest, "made": self._made}))
