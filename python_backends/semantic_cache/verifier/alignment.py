"""Which word of one prompt says what which word of another says."""

from typing import NamedTuple

from semantic_cache.verifier.lexicon import are_opposed
from semantic_cache.verifier.reading import Reading, Word

ASKED_FOR = frozenset({"time", "place", "person", "number", "amount"})  # by when, where, who, how many and how much
EXACT_KINDS = frozenset({"literal", "number"})  # said the same or not at all


class Alignment(NamedTuple):
    """`pairs`: places of partners (in the first, in the second); `left`, `right`: places without a partner."""

    pairs: list[tuple[int, int]]
    left: list[int]
    right: list[int]


def align(first: Reading, second: Reading) -> Alignment:
    """Pair words of the same form, then synonyms; a word may be said twice."""
    pairs: list[tuple[int, int]] = []
    free_left, free_right = dict(enumerate(first.words)), dict(enumerate(second.words))
    for agree in (_same, _synonymous):
        for i, word in list(free_left.items()):
            options = [j for j, other in free_right.items() if agree(word, other)]
            if options:
                j = min(options, key=lambda j: (second.words[j].text in ASKED_FOR, abs(i - j)))
                pairs.append((i, j))
                del free_left[i], free_right[j]
    left = [i for i, word in free_left.items() if not _said(word, second)]
    right = [j for j, word in free_right.items() if not _said(word, first)]
    return Alignment(sorted(pairs), left, right)


def opposed(first: Reading, second: Reading, alignment: Alignment) -> tuple[Word, Word] | None:
    """Return words without a partner that are each other's opposite, or of one family."""
    for i in alignment.left:
        for j in alignment.right:
            one, other = first.words[i], second.words[j]
            if one.sides and other.sides and are_opposed(one.sides, other.sides):
                return one, other
    return None


def _same(one: Word, other: Word) -> bool:
    if one.kind in EXACT_KINDS or other.kind in EXACT_KINDS:
        return one.text == other.text
    return not one.forms.isdisjoint(other.forms)


def _synonymous(one: Word, other: Word) -> bool:
    if one.kind in EXACT_KINDS or other.kind in EXACT_KINDS:
        return False
    return not one.groups.isdisjoint(other.groups) and not are_opposed(one.sides, other.sides)


def _said(word: Word, elsewhere: Reading) -> bool:
    if word.kind in EXACT_KINDS:
        return False
    return any(_same(word, other) for other in elsewhere.words)
