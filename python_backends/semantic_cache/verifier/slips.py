"""Words typed wrong, put right where the other prompt has the word that was meant."""

import re
from collections.abc import Collection, Iterator

KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
LONG = 8  # letters of a word that may have lost one, or got one
LEAST = 4  # letters of a word that is put right: of shorter ones a letter less or more is another word
# What is quoted is meant as it is. Words with a capital within a sentence are names, and what touches a digit, a dot or
# a dash is part of something else.
WORDS = re.compile(
    r"""`[^`\n]+`|"[^"\n]+"|(?<!\w)'[^'\n]+'(?!\w)|(?:^|(?<=[\s(]))(?P<word>(?:(?<=^)[A-Z])?[a-z]+)(?=[\s,.;:!?)]|$)(?!\.\w)"""
)


class Slips:
    """Callable: (prompt, prompt) -> the same, but for words of one that the other has without their slip of the key.

    A slip makes an unknown word of a known one: two letters that follow each other are exchanged or, between the first
    and the last, one is doubled or halved, or was meant to be a key beside it, or, of a long word, is missing or too
    many. Else two words may well be different things: sync and async, payer and payee, nitrate and nitrite, insulin
    and inulin.
    """

    def __init__(self, known: Collection[str]) -> None:
        """`known`: words in lower case."""
        self._known = known

    def __call__(self, first: str, second: str) -> tuple[str, str]:
        """Put both right."""
        mine, yours = (set(_words(prompt)) for prompt in (first, second))
        return self._mended(first, mine, yours), self._mended(second, yours, mine)

    def _mended(self, prompt: str, own: set[str], other: set[str]) -> str:
        meant = {}
        for word in own - other:
            if len(word) >= LEAST - 1 and word not in self._known:
                options = [one for one in other - own if one in self._known and is_slip(word, one)]
                if len(options) == 1:
                    meant[word] = options[0]
        if not meant:
            return prompt
        return WORDS.sub(lambda match: meant.get((match["word"] or "").lower(), match.group()), prompt)


def is_slip(word: str, meant: str) -> bool:
    """Return whether one slip makes `word` of `meant`."""
    if len(meant) < LEAST or word == meant or abs(len(word) - len(meant)) > 1:
        return False
    shorter, longer = sorted((word, meant), key=len)
    at = next((place for place, letter in enumerate(shorter) if letter != longer[place]), len(shorter))
    if len(word) == len(meant) and word[at:] == meant[at + 1 : at + 2] + meant[at] + meant[at + 2 :]:
        return True
    if word[0] != meant[0] or word[-1] != meant[-1]:
        return False
    if len(word) == len(meant):
        return word[at + 1 :] == meant[at + 1 :] and are_neighbours(word[at], meant[at])
    return shorter[at:] == longer[at + 1 :] and (len(meant) >= LONG or longer[at] == longer[at - 1])


def are_neighbours(one: str, other: str) -> bool:
    """Return whether two letters are next to each other on a keyboard, each row half a key right of the one above."""
    places = [
        next((row, keys.index(letter)) for row, keys in enumerate(KEYS) if letter in keys) for letter in (one, other)
    ]
    (row, column), (lower, other_column) = sorted(places)
    return other_column - column in ((-1, 1), (-1, 0), ())[lower - row]


def _words(prompt: str) -> Iterator[str]:
    for match in WORDS.finditer(prompt):
        if match["word"]:
            yield match["word"].lower()
