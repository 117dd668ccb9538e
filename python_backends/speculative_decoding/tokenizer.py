"""Text to tokens and back: chat rendering, and decoding that never emits half a character."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from speculative_decoding.messages import Message
from speculative_decoding.validation import InvalidOptionError

PromptFormat = Literal["chat", "raw"]
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")  # that templates may name
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
        self.prompt_format = prompt_format
        config = _config(folder)
        self._special = {name: text for name in SPECIAL if (text := _token_text(config.get(name))) is not None}
        source = _chat_template(folder, config)
        if source is None and prompt_format == "chat":
            raise ValueError(f'{folder} has no chat template: set the parameter prompt_format to "raw"')
        self._template = None if source is None else _compile(source)
        self.longest_token = max(len(token.encode()) for token in self._tokenizer.get_vocab())

    def encode_prompt(self, text: str) -> list[int]:
        """Return the tokens of a prompt, rendered in this model's prompt format. Raises InvalidOptionError."""
        if self.prompt_format == "chat":
            return self.encode_messages((Message("user", text),), "text_input")
        tokens: list[int] = self._tokenizer.encode(text).ids
        return tokens

    def encode_messages(self, messages: Sequence[Message], field: str = "messages") -> list[int]:
        """Return the tokens of a chat, rendered by the model's template. Raises InvalidOptionError naming `field`."""
        return self.encode(self.render([message._asdict() for message in messages], True, field))

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool, field: str = "messages") -> str:
        """Return a chat as the model's template writes it, open for an answer or not. Raises InvalidOptionError."""
        if self._template is None:
            raise InvalidOptionError(f"{field} cannot be taken: this model has no chat template; send text_input")
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special
            )
        except TemplateError as error:
            raise InvalidOptionError(f"{field} was refused by the model's chat template: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, special ones within it recognised and none added."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return tokens

    def token_text(self, token: int) -> str:
        """Return the text of one token, special ones included."""
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text

    def decode(self, tokens: list[int]) -> str:
        """Return the text of `tokens`, special tokens left out."""
        text: str = self._tokenizer.decode(tokens)
        return text

    def decode_all(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, special ones as templates write them."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
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


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config


def _token_text(token: object) -> str | None:
    """Return a special token's text as tokenizer_config.json has it: alone, or in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def _compile(source: str) -> Template:
    """Return a chat template with the function that templates refuse a chat by."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)
