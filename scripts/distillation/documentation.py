"""English that every Python installation has: the sentences of docstrings, and of the language reference."""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

SENTENCE_END = re.compile(r"(?<=[a-z)\]'\"`][.!?])\s+(?=[A-Z])")
WORDS = re.compile(r"[a-z]{2,}")
FEWEST_WORDS, MOST_CHARACTERS = 3, 300
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages"}


def sentences() -> list[str]:
    """Return the different sentences in the standard library's and the installed packages' documentation, sorted."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    found: set[str] = set()
    for text in topics.topics.values():
        found.update(_sentences(text))
    for folder in (library, packages):
        for file in sorted(folder.rglob("*.py")):
            if not SKIPPED & set(file.relative_to(folder).parts):
                for docstring in _docstrings(file):
                    found.update(_sentences(docstring))
    return sorted(found)


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old escapes in other people's code
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # templates and files of other Pythons
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _sentences(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        if ">>>" in paragraph or "----" in paragraph or "====" in paragraph:
            continue
        for part in SENTENCE_END.split(" ".join(paragraph.split())):
            words = WORDS.findall(part.lower())
            if len(words) >= FEWEST_WORDS and len(part) <= MOST_CHARACTERS:
                yield part
