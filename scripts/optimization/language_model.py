"""A language model that the speculative_decoding backend serves."""

import difflib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from scripts.optimization.batching import THREADS, Settings
from scripts.optimization.errors import OptimizationError
from scripts.optimization.forms import Forms
from scripts.optimization.setup import FP32, Setup
from scripts.optimization.students import Students
from scripts.optimization.subject import Ask, Request, Say, Subject
from scripts.quantization.subject import Subject as Source
from scripts.serving.client import GenerateClient
from scripts.serving.installation import MODEL_REPOSITORY
from scripts.whole_file import write_whole

MODEL, ENSEMBLE = "language_model", "generate"
AROUND = ("embedder", "pair_model", "semantic_cache", ENSEMBLE)  # what a cached language model is served with
MOST_TOKENS = 96


class Example(NamedTuple):
    """A prompt, and how a right answer begins; empty where that is not known."""

    prompt: str
    completion: str = ""


class LanguageModelSubject(Subject):
    """Quality is the share of answers that begin as expected; without expectations, how alike the answers are to those
    of the model as it came."""

    kind = "language model"

    def __init__(
        self, source: Source, data: Path, students: Students, draft: Path | None, forms: Forms, say: Say
    ) -> None:
        """data: JSONL of {"prompt": ..., "completion": ...}, the second may be left out. draft: a folder in ONNX
        Runtime GenAI's layout, None without. Raises OptimizationError."""
        super().__init__(source, data, students, forms, say)
        self._draft = draft
        self._examples = read_examples(data)
        self._original_file = forms.folder / "original_answers.json"

    @property
    def evaluation(self) -> Path | None:
        """Without completions, the project's own sentences."""
        return self._data if self._examples[0].completion else None

    def first(self) -> Setup:
        return Setup(FP32, Settings(1, None, 1, os.cpu_count() or 1))

    def requests(self) -> Sequence[Request]:
        return self._examples

    def write(self, setup: Setup, repository: Path) -> None:
        folder = repository / MODEL
        shutil.copytree(self.weights(setup.weights), folder / "1" / "target")
        if setup.speculation:
            assert self._draft is not None
            shutil.copytree(self._draft, folder / "1" / "draft")
        config = text_format.Parse(_shipped_config(MODEL), ModelConfig())
        values = {
            "max_sequences": setup.batching.max_batch_size,
            "speculation_length": setup.speculation,
            "kv_cache_bytes": "auto" if setup.keeps_prefixes else 0,
            "prompt_format": self._prompt_format,
            THREADS: setup.batching.threads,
        }
        for name, value in values.items():
            config.parameters[name].string_value = str(value)
        (folder / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
        for name in AROUND if setup.cached else ():
            shutil.copytree(MODEL_REPOSITORY / name, repository / name)

    @cached_property
    def _prompt_format(self) -> str:
        named = json.loads((self._source.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        templated = named.get("chat_template") or (self._source.folder / "chat_template.jinja").is_file()
        return "chat" if templated else "raw"

    def ask(self, setup: Setup, scope: str) -> Callable[[str], Ask]:
        @contextmanager
        def connect(url: str) -> Iterator[Callable[[Example], str]]:
            with GenerateClient(url, ENSEMBLE if setup.cached else MODEL) as client:
                yield lambda example: client.ask(example.prompt, max_tokens=MOST_TOKENS, tenant=scope).text

        return connect

    def quality(self, setup: Setup, answers: Sequence[tuple[Request, Any]]) -> float:
        """The first setup is the original that others are compared with, where nothing is expected."""
        original = self._original(setup, answers)
        scores = [_score(text, example.completion, original.get(example.prompt, "")) for example, text in answers]
        return sum(scores) / len(scores)

    def _original(self, setup: Setup, answers: Sequence[tuple[Example, str]]) -> dict[str, str]:
        """Return what the first setup answered, kept over an interruption; prompts of another plan are added."""
        if self._examples[0].completion:
            return {}
        known = json.loads(self._original_file.read_text(encoding="utf-8")) if self._original_file.exists() else {}
        said: dict[str, str] = {example.prompt: text for example, text in answers} | known
        if setup == self.first() and said != known:
            write_whole(self._original_file, json.dumps(said))
            return said
        return known

    def why_not(self, technique: str) -> str:
        if technique == "speculative decoding" and self._draft is None:
            return "there is no draft: give --draft"
        return self._students.why_not() if technique == "distillation" else ""


def _score(text: str, completion: str, original: str) -> float:
    said = " ".join(text.split())
    if completion:
        return float(said.startswith(" ".join(completion.split())))
    return difflib.SequenceMatcher(None, said, " ".join(original.split()), autojunk=False).ratio()


def read_examples(path: Path) -> list[Example]:
    """Read JSONL of {"prompt": ..., "completion": ...}. Raises OptimizationError, naming file, line and field."""
    examples: dict[str, Example] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise OptimizationError(f"--data {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            example = _example(line, f"--data {path}, line {number}")
            examples.setdefault(example.prompt, example)
    if not examples:
        raise OptimizationError(f"--data {path} has no prompt")
    if len({bool(example.completion) for example in examples.values()}) > 1:
        raise OptimizationError(f"--data {path}: some lines have a completion, others none: all or none must")
    return list(examples.values())


def _example(line: str, origin: str) -> Example:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise OptimizationError(f"{origin} is not JSON: {error}") from error
    fields = item if isinstance(item, dict) else {}
    prompt, completion = fields.get("prompt"), fields.get("completion", "")
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(completion, str):
        raise OptimizationError(
            f'{origin} must be {{"prompt": "...", "completion": "..."}}; completion may be left out'
        )
    return Example(prompt, completion)


def _shipped_config(model: str) -> str:
    return (MODEL_REPOSITORY / model / "config.pbtxt").read_text(encoding="utf-8")
