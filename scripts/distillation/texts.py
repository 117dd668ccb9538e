"""What is learned from: text files, and folders of them.

.txt, .md and .rst: a text a paragraph. .jsonl: a line is {"text": ...}, {"prompt": ...} for on-policy learning, or
{"prompt": ..., "completion": ...}, of which the completion is learned.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.distillation.errors import DistillationError

PLAIN = (".txt", ".md", ".rst")
SUFFIXES = (*PLAIN, ".jsonl")


@dataclass(frozen=True)
class Text:
    """A text, and the prompt before it, which is read and not learned; None where there is none."""

    text: str
    prompt: str | None = None


def read(path: Path) -> list[Text]:
    """Return the texts in the file or folder `path`, in the order of the files' names.

    Raises DistillationError for what is missing, empty or not of the form above, naming file and line.
    """
    if not path.exists():
        raise DistillationError(f"{path} does not exist: --data must be a file or a folder of {', '.join(SUFFIXES)}")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not files:
        raise DistillationError(f"{path} has no {', '.join(SUFFIXES)} file")
    texts = [text for file in files for text in _read_file(file)]
    if not texts:
        raise DistillationError(f"{path} has no text")
    return texts


def _read_file(file: Path) -> Iterator[Text]:
    if file.suffix not in SUFFIXES:
        raise DistillationError(f"{file} is not a {', '.join(SUFFIXES)} file")
    try:
        content = file.read_text(encoding="utf-8")
    except ValueError as error:
        raise DistillationError(f"{file} is not UTF-8: {error}") from error
    except OSError as error:
        raise DistillationError(f"{file} cannot be read: {error.strerror}") from error
    if file.suffix in PLAIN:
        yield from (Text(part.strip()) for part in content.split("\n\n") if part.strip())
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield _item(line, f"{file}, line {number}")


def _item(line: str, origin: str) -> Text:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise DistillationError(f"{origin} is not JSON: {error}") from error
    text, prompt, completion = (
        item.get(name) if isinstance(item, dict) else None for name in ("text", "prompt", "completion")
    )
    if isinstance(text, str) and prompt is None:
        return Text(text)
    if isinstance(prompt, str) and (completion is None or isinstance(completion, str)):
        return Text(completion or "", prompt)
    raise DistillationError(
        f'{origin} must be {{"text": "..."}}, {{"prompt": "..."}} or {{"prompt": "...", "completion": "..."}}'
    )
