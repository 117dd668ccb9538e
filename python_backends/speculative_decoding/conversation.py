"""Continuing a conversation on the tokens it has, so that what a model has seen stays what it has seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Message = dict[str, str]  # role and content


class ChatTokenizer(Protocol):
    """What continuing needs of a tokenizer and its chat template."""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Return a conversation in the model's format, open for an answer or not."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, special tokens within it recognised and none added."""

    def decode_all(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, special tokens as they are written in a template."""


@dataclass(frozen=True)
class Continuation:
    """A conversation's tokens with a new question: the first `kept` committed ones, and then `tokens`.

    reason: why not all committed tokens could be kept, "" when they were.
    """

    kept: int
    tokens: tuple[int, ...]
    reason: str


def continue_chat(
    tokenizer: ChatTokenizer, history: Sequence[Message], committed: Sequence[int], new: Sequence[Message]
) -> Continuation:
    """Return what to feed so that `new` messages follow `history`, whose tokens are `committed`.

    `history` ends with the answer that `committed` ends with; its end-of-turn token, which is not committed, is part of
    what follows. Templates that rewrite what was said before (trimming, dropping reasoning, today's date) do not keep
    the committed tokens: then the conversation is rendered anew, and `reason` says so.
    """
    whole = tokenizer.render([*history, *new], True)
    if not history:
        return Continuation(0, tuple(tokenizer.encode(whole)), "")
    reason = ""
    said = tokenizer.render(history[:-1], True) + history[-1]["content"]
    if not whole.startswith(said):
        reason = "the chat template renders earlier messages differently once others follow"
    else:
        tokens = tokenizer.encode(whole[len(said) :])
        if tokenizer.decode_all([*committed, *tokens]) == tokenizer.decode_all(tokenizer.encode(whole)):
            return Continuation(len(committed), tuple(tokens), "")
        reason = "the committed tokens are not those of the conversation's text"
    anew = tokenizer.encode(whole)
    kept = common_prefix(committed, anew)
    return Continuation(kept, tuple(anew[kept:]), reason)


def continue_text(tokenizer: ChatTokenizer, committed: Sequence[int], text: str) -> Continuation:
    """Return what to feed so that plain text follows committed tokens."""
    return Continuation(len(committed), tuple(tokenizer.encode(text)), "")


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
