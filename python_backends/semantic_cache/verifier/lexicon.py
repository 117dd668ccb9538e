"""Which words may stand for one another, and which must not be exchanged."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from semantic_cache.verifier.forms import NUMBERS, american, base_forms

FOLDER = Path(__file__).parent
LONGEST = 6  # words of a phrase
LOOSE = "~"  # begins a group whose words mean the same in some contexts only

Phrase = tuple[str, ...]
Groups = frozenset[int]


class Lexicon:
    """Synonyms, opposites and families; a phrase is a tuple of base forms, a single word included."""

    def __init__(self, synonyms: str, opposites: str, families: str) -> None:
        """Read their texts: synonyms are parted by commas, the sides of the others by a bar; # is a comment.

        A line of synonyms that begins with LOOSE holds words that mean the same in some contexts only.
        """
        self._groups: dict[Phrase, set[int]] = defaultdict(set)
        self._sides: dict[Phrase, set[tuple[int, int]]] = defaultdict(set)
        self._loose: set[int] = set()
        for number, line in enumerate(_lines(synonyms)):
            if line.startswith(LOOSE):
                self._loose.add(number)
            for phrase in line.removeprefix(LOOSE).split(","):
                self._groups[_phrase(phrase)].add(number)
        self._opposites = sum(1 for _ in _lines(opposites))
        for number, line in enumerate((*_lines(opposites), *_lines(families))):
            for side, words in enumerate(line.split("|")):
                for word in words.split():
                    self._sides[_phrase(word.replace("_", " "))].add((number, side))
        self._phrases: dict[str, list[Phrase]] = defaultdict(list)  # by first word, longest first
        for longest_first in sorted({*self._groups, *self._sides}, key=lambda phrase: (-len(phrase), phrase)):
            if len(longest_first) > 1:
                self._phrases[longest_first[0]].append(longest_first)

    def groups(self, phrase: Phrase) -> Groups:
        """Return the synonym groups that a phrase, or a word in any of its forms, belongs to."""
        return frozenset().union(*(self._groups.get(form, ()) for form in _variants(phrase)))

    def only_loose(self, groups: Groups) -> bool:
        """Whether there are groups, and of all of them the words mean the same in some contexts only."""
        return bool(groups) and groups <= self._loose

    def sides(self, phrase: Phrase) -> frozenset[tuple[int, int]]:
        """Return the (opposition, side) pairs of a phrase."""
        return frozenset().union(*(self._sides.get(form, ()) for form in _variants(phrase)))

    def has_opposite(self, phrase: Phrase) -> bool:
        """Whether there is a word that says the contrary."""
        return any(number < self._opposites for number, _ in self.sides(phrase))

    def longest_phrase(self, words: Sequence[str]) -> Phrase | None:
        """Return the longest phrase of two words or more that `words`, in any form, begin with."""
        forms = [base_forms(word) for word in words[:LONGEST]]
        found = [phrase for first in forms[0] for phrase in self._phrases.get(first, ()) if _begins(forms, phrase)]
        return max(found, key=len, default=None)


@lru_cache(1)
def default_lexicon() -> Lexicon:
    """Return the lexicon in this folder."""
    names = ("synonyms.txt", "opposites.txt", "families.txt")
    return Lexicon(*((FOLDER / name).read_text("utf-8") for name in names))


@lru_cache(1)
def _word_classes() -> dict[str, frozenset[str]]:
    text = (FOLDER / "classes.txt").read_text("utf-8").replace("\n    ", " ")
    lines = (line.partition(": ") for line in _lines(text))
    return {name: frozenset(words.split()) for name, _, words in lines}


def word_class(name: str) -> frozenset[str]:
    """Return a closed class of words in classes.txt."""
    return _word_classes()[name]


def are_opposed(one: frozenset[tuple[int, int]], other: frozenset[tuple[int, int]]) -> bool:
    """Whether two words stand on different sides of one opposition, and never on the same side of it."""
    return any((number, 1 - side) in other and (number, side) not in other for number, side in one)


def _lines(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if line.strip() and not line.startswith("#"))


def _phrase(text: str) -> Phrase:
    return tuple(NUMBERS.get(word, american(word)) for word in text.strip().replace("-", " ").split())


def _variants(phrase: Phrase) -> Iterator[Phrase]:
    if len(phrase) == 1:
        return ((form,) for form in base_forms(phrase[0]))
    return iter((phrase,))


def _begins(forms: Sequence[frozenset[str]], phrase: Phrase) -> bool:
    return len(phrase) <= len(forms) and all(word in options for word, options in zip(phrase, forms, strict=False))
