"""What speaks for and against two prompts being the same question: reasons to refuse, and figures to weigh."""

from typing import NamedTuple

from semantic_cache.verifier.alignment import ASKED_FOR, Alignment, align, opposed
from semantic_cache.verifier.frames import NEAR
from semantic_cache.verifier.lexicon import default_lexicon, word_class
from semantic_cache.verifier.reading import Reading, Word

SOURCES, TARGETS = frozenset({"from", "by"}), frozenset({"to", "into", "onto", "toward", "towards"})
PLACES = frozenset({"on", "in", "at"})
HARMLESS = word_class("HARMLESS")
BLAND = frozenset(word.replace("_", " ") for word in word_class("BLAND"))
MEASURES = frozenset({"often", "duration", "distance", "since"})  # asked for by one, and by the other not
NAMED = ("name", "literal")
REPEATED = (*NAMED, "number")
LIGHT_WEIGHT = 0.25
FIGURES = (
    "similarity", "left", "right", "more", "less", "substituted", "kind", "near_kind", "markers", "synonyms",
    "length", "sentences", "head", "added",
)  # fmt: skip


class Comparison(NamedTuple):
    """`refusal`: why they cannot be the same, or None. `figures`: one per name in FIGURES.

    `is_settled`: whether words have the last word: both say the same ones, or literals differ in nothing but case.
    """

    refusal: str | None
    figures: tuple[float, ...]
    is_settled: bool


def compare(first: Reading, second: Reading, similarity: float) -> Comparison:
    """Compare two readings; `similarity` is the cosine of the prompts' vectors."""
    alignment = align(first, second)
    refusal = _refusal(first, second, alignment)
    is_settled = (refusal is None and _is_verbatim(first, second, alignment)) or (
        refusal == "literal" and _differ_in_case(first, second)
    )
    return Comparison(refusal, _figures(first, second, alignment, similarity), is_settled)


def _is_verbatim(first: Reading, second: Reading, alignment: Alignment) -> bool:
    """Whether two prompts ask in the same words, each with the same preposition, whatever surrounds them."""
    same = all(
        first.words[i].forms & second.words[j].forms and first.words[i].marker == second.words[j].marker
        for i, j in alignment.pairs
    )
    return same and first.kind == second.kind and not (alignment.left or alignment.right)


def _differ_in_case(first: Reading, second: Reading) -> bool:
    """Whether a literal of one is a literal of the other but for the case of its letters."""
    one, other = ({word.text for word in reading.words if word.kind == "literal"} for reading in (first, second))
    return bool({text.lower() for text in one - other} & {text.lower() for text in other - one})


def _refusal(first: Reading, second: Reading, alignment: Alignment) -> str | None:
    loose = [*(first.words[i] for i in alignment.left), *(second.words[j] for j in alignment.right)]
    for kind in ("literal", "number", "unit", "date", "name"):
        if any(word.kind == kind for word in loose):
            return kind
    if opposed(first, second, alignment):
        return "opposite"
    if _negation_differs(first, second, alignment):
        return "negation"
    if change := _changes(first, second, alignment):
        return change
    if _roles_differ(first, second, alignment):
        return "roles"
    asks_more = first.kind != second.kind and any(word.text in MEASURES for word in loose)
    if asks_more or _asks_for_other(first, second, alignment) or not _kinds_agree(first, second):
        return "question"
    return None


def _asks_for_other(first: Reading, second: Reading, alignment: Alignment) -> bool:
    """Whether one asks how many, when or where, and nothing in the other's wording says that it does too."""
    if first.kind == second.kind or {"tell", "much"} & {first.kind, second.kind}:  # how much is it: what is it
        return False
    loose = [*(first.words[i] for i in alignment.left), *(second.words[j] for j in alignment.right)]
    is_reworded = any(first.words[i].forms.isdisjoint(second.words[j].forms) for i, j in alignment.pairs)
    return not is_reworded and any(word.text in ASKED_FOR for word in loose)


def _negation_differs(first: Reading, second: Reading, alignment: Alignment) -> bool:
    if (first.negations > 0) != (second.negations > 0):
        return True
    return any(first.words[i].negated != second.words[j].negated for i, j in alignment.pairs)


def _kinds_agree(first: Reading, second: Reading) -> bool:
    kinds = frozenset({first.kind, second.kind})
    is_choice = first.symmetric and second.symmetric and kinds == {"what", "whether"}
    return len(kinds) == 1 or kinds in NEAR or is_choice


def _telling(reading: Reading, loose: list[int]) -> list[Word]:
    """Return the words without a partner that say something."""
    words = [reading.words[at] for at in loose]
    return [word for word in words if not word.light and word.text not in ASKED_FOR]


def _changes(first: Reading, second: Reading, alignment: Alignment) -> str | None:
    """Say whether something is exchanged, or said by one only though it has an opposite: then it makes a difference."""
    left, right = _telling(first, alignment.left), _telling(second, alignment.right)
    if left and right:
        return "exchange"
    loose = [word for word in (*left, *right) if word.charged and not word.classifies]
    if any(word.forms.isdisjoint(HARMLESS) for word in loose):
        return "change"
    if _added(first, second, alignment):
        return "addition"  # most words that one says and the other does not narrow the question
    return "exchange" if _only_loosely_alike(first, second, alignment) else None


def _added(first: Reading, second: Reading, alignment: Alignment) -> int:
    """Count the words without a partner that are neither bland nor say what kind of thing a name stands for."""
    loose = _telling(first, alignment.left) + _telling(second, alignment.right)
    return sum(not word.classifies and word.forms.isdisjoint(BLAND) for word in loose)


def _only_loosely_alike(first: Reading, second: Reading, alignment: Alignment) -> bool:
    """Whether two prompts put alike differ by one word, for one that means the same in some contexts only."""
    changed = [(i, j) for i, j in alignment.pairs if first.words[i].forms.isdisjoint(second.words[j].forms)]
    if alignment.left or alignment.right or len(changed) != 1 or first.kind != second.kind:
        return False
    one, other = first.words[changed[0][0]], second.words[changed[0][1]]
    in_place = all(i == j and first.words[i].marker == second.words[j].marker for i, j in alignment.pairs)
    is_word = " " not in one.text and " " not in other.text  # a phrase says more clearly what is meant
    return in_place and is_word and default_lexicon().only_loose(one.groups & other.groups)


def _roles_differ(first: Reading, second: Reading, alignment: Alignment) -> bool:
    """Whether two things have changed places, or one that was a source has become a target."""
    pairs = alignment.pairs
    for i, j in pairs:
        one, other = set(first.words[i].marker[-1:]), set(second.words[j].marker[-1:])
        if (one & SOURCES and other & TARGETS) or (one & TARGETS and other & SOURCES):
            return True
        if ("from" in one and other & PLACES) or ("from" in other and one & PLACES):
            return True
    if (first.symmetric and second.symmetric) or first.kind == second.kind == "far":
        return False
    if _repeats_in_another_order(first, second):
        return True
    for at, (i, j) in enumerate(pairs):
        for k, m in pairs[at + 1 :]:
            if j < m:
                continue
            moved = first.words[i], first.words[k], second.words[j], second.words[m]
            around = any(i < x < k and m < y < j for x, y in pairs)
            named = all(word.kind in NAMED for word in moved)
            is_compound = not (moved[1].marker or around or named)  # "namespace x", "x namespace"
            if _exchanged(*moved) and not is_compound:
                return True
    return False


def _repeats_in_another_order(first: Reading, second: Reading) -> bool:
    """Whether one says a name or number twice, and the other does not say the same ones in the same order."""
    one, other = ([word.text for word in reading.words if word.kind in REPEATED] for reading in (first, second))
    return one != other and (len(set(one)) < len(one) or len(set(other)) < len(other))


def _exchanged(one: Word, two: Word, new_one: Word, new_two: Word) -> bool:
    """Whether what was `one ... two` is now `new_two ... new_one`, each with the other's marker."""
    return one.marker == new_two.marker and two.marker == new_one.marker


def _figures(first: Reading, second: Reading, alignment: Alignment, similarity: float) -> tuple[float, ...]:
    exchanged = bool(alignment.left and alignment.right)
    left = sum(_weight(first.words[i], exchanged) for i in alignment.left)
    right = sum(_weight(second.words[j], exchanged) for j in alignment.right)
    total = max(1.0, min(_total(first), _total(second)))
    partners = len(alignment.pairs)
    markers = sum(first.words[i].marker != second.words[j].marker for i, j in alignment.pairs)
    synonyms = sum(first.words[i].forms.isdisjoint(second.words[j].forms) for i, j in alignment.pairs)
    return (
        similarity,
        left,
        right,
        max(left, right) / total,
        min(left, right) / total,
        min(left, right),
        float(first.kind == second.kind),
        float(first.kind != second.kind and frozenset({first.kind, second.kind}) in NEAR),
        markers / max(1, partners),
        synonyms / max(1, partners),
        total,
        float(abs(first.sentences - second.sentences)),
        float(_head_is_loose(first, alignment.left)) + float(_head_is_loose(second, alignment.right)),
        float(_added(first, second, alignment)),
    )


def _head_is_loose(reading: Reading, loose: list[int]) -> bool:
    """Whether the word that says what is to be done, or what is asked for, has no partner."""
    heads = [place for place, word in enumerate(reading.words) if not word.light and not word.classifies]
    return bool(heads) and heads[0] in loose


def _total(reading: Reading) -> float:
    return sum(_weight(word, True) for word in reading.words)


def _weight(word: Word, exchanged: bool) -> float:
    return LIGHT_WEIGHT if word.light or (word.classifies and not exchanged) else 1.0
