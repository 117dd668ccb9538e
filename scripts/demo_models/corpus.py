"""The facts the demo models learn: what every public object of the standard library is documented to do."""

import importlib
import inspect
import json
import os.path
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# Importing these prints, opens windows or browsers, or brings in test suites.
SKIPPED_PARTS = {"antigravity", "this", "idlelib", "turtledemo", "turtle", "lib2to3", "test", "tests", "__main__"}
# Platform modules that a reader knows under another name (os, os.path).
SKIPPED_PARTS |= {"posix", "nt", "posixpath", "ntpath"}
MAX_SUMMARY = 220
MAX_SIGNATURE = 100
SIGNATURE_LINE = re.compile(r"^[\w.]+\(.*?\)(\s*(->|-->|=>|=)\s*.*)?$", re.DOTALL)


@dataclass(frozen=True)
class Fact:
    """One documented object: its dotted name, the summary of its docstring, and its call signature or ''."""

    name: str
    summary: str
    signature: str

    @property
    def answer(self) -> str:
        """The text a model is trained to give for this object."""
        return f"{self.summary}\nSignature: {self.signature}" if self.signature else self.summary


def _modules() -> Iterator[tuple[str, ModuleType]]:
    yield "os.path", os.path
    for top in sorted(sys.stdlib_module_names):
        if top.startswith("_") or top in SKIPPED_PARTS:
            continue
        try:
            module = importlib.import_module(top)
        except ImportError:  # a module of another platform
            continue
        yield top, module
        for info in pkgutil.walk_packages(getattr(module, "__path__", []), top + "."):
            if any(part.startswith("_") or part in SKIPPED_PARTS for part in info.name.split(".")):
                continue
            try:
                yield info.name, importlib.import_module(info.name)
            except (ImportError, OSError):
                continue


def _is_own(name: str, module: ModuleType, value: object) -> bool:
    """Whether `module` is where a reader would look for `value`, not just a place that imports it."""
    if name in getattr(module, "__all__", ()):
        return True
    home = getattr(value, "__module__", None) or module.__name__
    return home == module.__name__ or home == "builtins" or home.startswith("_")


def _members(module_name: str, module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, callable) for the public functions, classes and methods of a module."""
    prefix = "" if module_name == "builtins" else module_name + "."
    for name in list(getattr(module, "__all__", None) or vars(module)):
        value = getattr(module, name, None)
        if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        if not _is_own(name, module, value):
            continue
        yield prefix + name, value
        if inspect.isclass(value):
            for attribute, member in list(vars(value).items()):
                function = getattr(member, "__func__", member)
                if not attribute.startswith("_") and inspect.isroutine(function):
                    yield f"{prefix}{name}.{attribute}", function


def _summary(docstring: str) -> tuple[str, str]:
    """Return (first sentence, signature line of a built-in or '') of a docstring."""
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(docstring).split("\n\n") if part.strip()]
    signature = ""
    first_line = inspect.cleandoc(docstring).split("\n", 1)[0].strip()
    if paragraphs and SIGNATURE_LINE.match(first_line):
        signature = first_line
        rest = paragraphs[0][len(" ".join(first_line.split())) :].strip()
        paragraphs = [rest, *paragraphs[1:]] if rest else paragraphs[1:]
    if not paragraphs:
        return "", signature
    sentence = re.split(r"(?<=[a-z)\]'\"`]\.)\s+(?=[A-Z])", paragraphs[0], maxsplit=1)[0].lstrip("- ")
    if len(sentence) > MAX_SUMMARY:
        sentence = sentence[:MAX_SUMMARY].rsplit(" ", 1)[0] + " ..."
    return sentence, signature


def _signature(name: str, value: object, from_docstring: str) -> str:
    try:
        signature = name.rsplit(".", 1)[-1] + re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(value)))  # type: ignore[arg-type]
    except (ValueError, TypeError, AttributeError):
        signature = from_docstring
    return signature if len(signature) <= MAX_SIGNATURE else ""


def collect_facts() -> list[Fact]:
    """Read the facts off the running interpreter, one per dotted name, sorted by name."""
    facts: dict[str, Fact] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module_name, module in _modules():
            for name, value in _members(module_name, module):
                docstring = getattr(value, "__doc__", None)
                if not isinstance(docstring, str) or name in facts:
                    continue
                summary, signature = _summary(docstring)
                if len(summary) >= 8:
                    facts[name] = Fact(name, summary, _signature(name, value, signature))
    return [facts[name] for name in sorted(facts)]


def load_facts(path: Path) -> list[Fact]:
    """Read the facts stored at `path` (JSON lines), collecting and storing them first where there are none."""
    if not path.exists():
        path.write_text("".join(json.dumps(asdict(fact)) + "\n" for fact in collect_facts()), encoding="utf-8")
    return [Fact(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
