"""Text to tokens and back: chat rendering, and decoding that never emits half a character."""

import json
from pathlib import Path
from typing import Literal

import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

PromptFormat = Literal["chat", "raw"]
INCOMPLETE = "\ufffd"  # what a decoder gives for a character whose last bytes are still to come


class Tokenizer:
    """A Hugging Face tokenizer.json with the chat template beside it."""

    def __init__(self, folder: Path, prompt_format: PromptFormat) -> None:
        """Load `folder`. With "chat" a prompt is rendered as one user message, with "raw" it is taken as it is.

        Raises ValueError when the folder lacks what the format needs.
        """
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder} has no tokenizer.json")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._template = None
        if prompt_format == "chat":
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            self._template = environment.from_string(_chat_template(folder))
        self.longest_token = max(len(token.encode()) for token in self._tokenizer.get_vocab())

    def encode_prompt(self, text: str) -> list[int]:
        """Return the tokens of a prompt, rendered in this model's prompt format."""
        if self._template is None:
            tokens: list[int] = self._tokenizer.encode(text).ids
        else:
            messages = [{"role": "user", "content": text}]
            rendered = self._template.render(messages=messages, add_generation_prompt=True)
            tokens = self._tokenizer.encode(rendered, add_special_tokens=False).ids
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Return the text of `tokens`, special tokens left out."""
        text: str = self._tokenizer.decode(tokens)
        return text

    def vocabulary(self) -> dict[str, int]:
        """Return every token with its id, special tokens included."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary


class IncrementalDecoder:
    """Turns tokens, as they come, into text whose pieces join to the decoding of the whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = 0  # where decoding begins, so that a token sees what is before it
        self._shown = 0  # tokens whose text has been given out

    def feed(self, tokens: list[int]) -> str:
        """Take new tokens and return the text that is certain now."""
        self._tokens += tokens
        before = self._tokenizer.decode(self._tokens[self._context : self._shown])
        text = self._tokenizer.decode(self._tokens[self._context :])
        if text.endswith(INCOMPLETE):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]

    def flush(self) -> str:
        """Return what is left when no token follows, an unfinished character included."""
        before = self._tokenizer.decode(self._tokens[self._context : self._shown])
        text = self._tokenizer.decode(self._tokens[self._context :])
        self._context = self._shown = len(self._tokens)
        return text[len(before) :]


def _chat_template(folder: Path) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    if not isinstance(template, str):
        raise ValueError(f'{folder} has no chat template: set the parameter prompt_format to "raw"')
    return template
