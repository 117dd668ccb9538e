"""A stored answer as a stream."""

import re

MOST_PIECES = 64  # each is a response to send; who reads a stream wants it to begin, not to be long

WORD = re.compile(r"\s*\S+|\s+$")


def pieces(answer: str) -> list[str]:
    """Part an answer between words; the pieces joined are the answer."""
    words = WORD.findall(answer)
    size = -(-len(words) // MOST_PIECES) or 1
    return ["".join(words[at : at + size]) for at in range(0, len(words), size)] or [answer]
