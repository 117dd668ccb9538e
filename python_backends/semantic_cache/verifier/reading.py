"""A prompt as a verifier reads it: its words, what each stands for, and what is said literally."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from semantic_cache.verifier.forms import NUMBERS, base_forms
from semantic_cache.verifier.frames import strip_frame, without_greeting
from semantic_cache.verifier.lexicon import Groups, Lexicon, default_lexicon, word_class

LITERALS = re.compile(
    r"""(?P<quoted>"[^"\n]+"|`[^`\n]+`|(?<![\w])'[^'\n]+'(?!\w))
    |(?P<url>https?://\S+|[\w.+-]+@[\w-]+\.[\w.]+)
    |(?P<call>[A-Za-z_][\w.]*\([^()\n]*\))
    |(?P<date>\d{4}-\d{1,2}-\d{1,2}|\d+/\d+(?![\d/.])|\d{1,2}/\d{1,2}/\d{2,4}|\d{1,2}:\d{2}(?::\d{2})?)
    |(?P<path>(?<![\w])(?:~|\.{0,2})/[\w.\-/*]+|[A-Za-z][\w.\-]*/[\w.\-/]+|\d+(?:\.\d+){3}(?:/\d+)?)
    |(?P<version>\bv?\d+(?:\.\d+){2,}(?:-?(?:rc|alpha|beta)\d*)?)
    |(?P<number>[+-]?\d+(?:,\d+)*(?:\.\d+)?(?=\s|[%°€$£]|[.,;:?!)\]}'-]*(?:\s|$)|[a-z]{1,3}\b|-[a-z]))
    |(?P<identifier>\b[A-Z]\#(?!\w)|[A-Za-z_]+(?:-[A-Za-z]+)*-?\d[\w.\-:]*|[A-Za-z]\w*(?:[._:]\w+)+|\d+[A-Za-z]\w*|\w*_\w+
        |[a-z]+[A-Z]\w*|[A-Z][a-z]+[A-Z]\w+)
    |(?P<flag>(?<!\S)--?[A-Za-z][\w-]*(?![\w'’]))
    |(?P<operator>===|!==|==|!=|<=|>=|=>|->|\+\+|--(?=\s|$)|&&|\|\||\*\*|<<|>>|[-+*/%|&^]=|\[\]|\{\}|(?<=\s)[<>=+*|^~@\#](?=\s)|(?<=\b[a-z0-9]\s)-(?=\s[a-z0-9]\b))
    |(?P<symbol>[%°€$£])
    |(?P<word>[^\W\d_]+(?:['’][^\W\d_]+)?)
    |(?P<mark>[.?!;:,\n()])""",
    re.VERBOSE,
)  # fmt: skip
LITERAL_KINDS = frozenset({"quoted", "url", "call", "date", "path", "version", "identifier", "flag", "operator"})
CONTRACTIONS = (
    (re.compile(r"\bwon['’]t\b", re.I), "will not"), (re.compile(r"\b(?:can['’]t|cannot)\b", re.I), "can not"),
    (re.compile(r"n['’]t\b", re.I), " not"), (re.compile(r"\bi['’]m\b", re.I), "i am"),
    (re.compile(r"['’]re\b", re.I), " are"), (re.compile(r"['’]ve\b", re.I), " have"),
    (re.compile(r"['’]ll\b", re.I), " will"), (re.compile(r"\b(i|you|we|they|he|she)['’]d\b", re.I), r"\1 would"),
    (re.compile(r"\b(what|who|where|how|when|why|it|that|there|here|let)['’]s\b", re.I), r"\1 is"),
    (re.compile(r"['’]s\b", re.I), " "), (re.compile(r"(?<=s)['’](?=\s)"), " "),
    (re.compile(r"\b(?:a\.m\.|a\.m)(?=\W|$)", re.I), "am"), (re.compile(r"\b(?:p\.m\.|p\.m)(?=\W|$)", re.I), "pm"),
    (re.compile(r"\bif (?:i|we) do not want to (?:use|have) (?:an? |any )?", re.I), "without "),
    (re.compile(r"\bwithout (?:using|having|needing) ", re.I), "without "),
    (re.compile(r"\be\.g\.", re.I), "for example"), (re.compile(r"\bi\.e\.", re.I), "that is"),
)  # fmt: skip
UNITS = {
    form: unit
    for unit, forms in {
        "percent": "% percents", "degree": "° degrees", "euro": "€ euros eur", "dollar": "$ dollars usd bucks",
        "pound": "£ pounds", "kilometer": "km kms", "meter": "m", "centimeter": "cm", "millimeter": "mm",
        "kilogram": "kg kilo kilos", "gram": "g", "liter": "l", "milliliter": "ml", "second": "s sec secs",
        "millisecond": "ms", "minute": "min mins", "hour": "h hr hrs", "kilobyte": "kb", "megabyte": "mb",
        "gigabyte": "gb", "terabyte": "tb", "celsius": "c centigrade", "fahrenheit": "f", "mile": "mi",
    }.items()
    for form in forms.split()
}  # fmt: skip
UNIT_NAMES = frozenset(UNITS.values()) | word_class("UNIT_NAMES")
DATES = word_class("DATES")
PARTICLE_VERBS = word_class("PARTICLE_VERBS")
PARTICLES = word_class("PARTICLES")
NEGATIONS = word_class("NEGATIONS")
SYMMETRIC = word_class("SYMMETRIC")
MARKERS = word_class("MARKERS")
STOP = word_class("STOP")
LIGHT = word_class("LIGHT")
CLASSES = word_class("CLASSES")
END = "\n"
NEGATING = frozenset({("instead", "of"), ("rather", "than"), ("in", "place", "of"), ("with", "no")})
BOUNDS = {"over": ("more", "than"), "above": ("more", "than"), "under": ("less", "than"), "below": ("less", "than")}
ASKED = {  # what a question asks for, said as a word
    "often": ("often",), "long": ("duration",), "far": ("distance",), "count": ("number",), "much": ("amount",),
    "when": ("time",), "where": ("place",), "who": ("person",), "since": ("since",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Word:
    """One thing said.

    forms: base forms it may have. charged: it has an opposite. kind: literal, number, unit, date, name or plain.
    marker: the function words right before it. negated: right after a negation. sentence: which it stands in.
    """

    text: str
    forms: frozenset[str]
    groups: Groups
    sides: frozenset[tuple[int, int]]
    charged: bool
    kind: str
    marker: tuple[str, ...]
    negated: bool
    sentence: int

    @property
    def light(self) -> bool:
        """Whether it says little by itself."""
        return self.kind == "plain" and not self.forms.isdisjoint(LIGHT)

    @property
    def classifies(self) -> bool:
        """Whether it only says what kind of thing a name stands for."""
        return not self.forms.isdisjoint(CLASSES)


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt's words in order, the kind of what it asks (of its last question), and how often it says no.

    `symmetric`: it compares things whose order does not matter.
    """

    words: tuple[Word, ...]
    kind: str
    negations: int
    sentences: int
    symmetric: bool


@lru_cache(8192)
def read(prompt: str) -> Reading:
    """Read a prompt. Any text is read; what is not English comes out as plain words."""
    return _Reader(default_lexicon()).read(without_greeting(prompt))


class _Reader:
    def __init__(self, lexicon: Lexicon) -> None:
        self._lexicon = lexicon
        self._words: list[Word] = []
        self._negations = 0

    def read(self, prompt: str) -> Reading:
        tokens = _tokens(prompt)
        kinds = []
        for number, (sentence, is_question) in enumerate(_sentences(tokens.words)):
            frame = strip_frame(" ".join(sentence))
            kinds.append((is_question or frame.kind != "tell", frame.kind))
            if frame.kind in ASKED:
                self._add(ASKED[frame.kind], "plain", [], False, number)
            self._take(_join_particles(frame.about.split()), tokens, number)
        asked = [kind for is_asked, kind in kinds if is_asked]
        kind = asked[-1] if asked else "tell"
        symmetric = not SYMMETRIC.isdisjoint(form for word in tokens.words for form in base_forms(word))
        return Reading(tuple(self._words), kind, self._negations, len(kinds), symmetric)

    def _take(self, words: Sequence[str], tokens: "_Tokens", sentence: int) -> None:
        marker: list[str] = []
        negated = False
        at = 0
        while at < len(words):
            word = words[at]
            negating = next((phrase for phrase in NEGATING if tuple(words[at : at + len(phrase)]) == phrase), None)
            if negating:
                self._negations += 1
                negated, at = True, at + len(negating)
                continue
            phrase = None if word in tokens.acronyms else self._lexicon.longest_phrase(words[at:])
            if phrase:
                self._add(phrase, "plain", marker, negated, sentence)
                marker, negated, at = [], False, at + len(phrase)
                continue
            at += 1
            if word in tokens.acronyms:
                self._add((word,), "name", marker, negated, sentence)
                marker, negated = [], False
            elif word in NEGATIONS:
                self._negations += 1
                negated = True
            elif word in BOUNDS and at < len(words) and (words[at][0].isdigit() or words[at] in ("a", "an")):
                self._add(BOUNDS[word], "plain", marker, negated, sentence)
                marker, negated = [], False
            elif word in MARKERS:
                marker.append(word)
            elif word not in STOP and word != ",":
                literal = tokens.literals.get(word)
                measured = bool(self._words) and self._words[-1].kind == "number" and not marker
                kind = "literal" if literal else "name" if word in tokens.names else _kind(word, measured)
                self._add((literal or word,), kind, marker, negated, sentence)
                marker, negated = [], False

    def _add(self, phrase: tuple[str, ...], kind: str, marker: list[str], negated: bool, sentence: int) -> None:
        forms = (
            frozenset({" ".join(phrase)}) if len(phrase) > 1 or kind in ("literal", "number") else base_forms(phrase[0])
        )
        self._words.append(
            Word(
                " ".join(phrase),
                forms,
                self._lexicon.groups(phrase),
                self._lexicon.sides(phrase),
                self._lexicon.has_opposite(phrase),
                kind,
                tuple(marker),
                negated,
                sentence,
            )
        )


def _kind(word: str, measured: bool) -> str:
    if word[0].isdigit():
        return "number"
    forms = base_forms(word)
    if measured and not forms.isdisjoint(UNIT_NAMES):
        return "unit"
    return "date" if not forms.isdisjoint(DATES) else "plain"


class _Tokens(NamedTuple):
    """Words in lower case and marks; `literals`: what stand-ins among them stand for; `names`: words with a capital,
    `acronyms`: in capitals."""

    words: list[str]
    literals: dict[str, str]
    names: set[str]
    acronyms: set[str]


def _tokens(text: str) -> _Tokens:
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in CONTRACTIONS:
        text = pattern.sub(replacement, text)
    tokens = _Tokens([], {}, set(), set())
    shouts = text.isupper()
    for match in LITERALS.finditer(text):
        kind, value = str(match.lastgroup), match.group()
        if kind in LITERAL_KINDS:
            stand_in = f"\x00{len(tokens.literals)}"
            tokens.literals[stand_in] = "".join(value.strip("\"'`").rstrip(".,:").split())
            tokens.words.append(stand_in)
        elif kind == "number":
            tokens.words.append(_number(value))
        elif kind == "symbol":
            tokens.words.append(UNITS[value])
        elif kind == "word":
            if len(value) > 1 and value.isupper() and not shouts:
                tokens.acronyms.add(value.lower())
            _add_word(tokens, value)
        else:
            tokens.words.append(END if value in ".!\n" else value)
    return tokens


def _add_word(tokens: _Tokens, value: str) -> None:
    lower = value.lower()
    last = tokens.words[-1] if tokens.words else END
    if value[0].isupper() and last not in (END, "?", ":") and not is_function_word(lower) and lower not in DATES:
        tokens.names.add(lower)
    if lower in UNITS and (last[0].isdigit() or last == "degree"):
        lower = UNITS[lower]
    elif lower in ("am", "pm") and last[0].isdigit():
        lower = "a.m." if lower == "am" else "p.m."
    tokens.words.append(NUMBERS.get(lower, lower))


def is_function_word(word: str) -> bool:
    """Whether a lower-case word belongs to how things are said, not to what is said."""
    return word in STOP or word in MARKERS or word in NEGATIONS


def _number(text: str) -> str:
    value = float(text.replace(",", ""))
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def _join_particles(words: list[str]) -> list[str]:
    """Put a verb's particle behind it: "switch the lights on" becomes "switch on the lights"."""
    words = list(words)
    for at, word in enumerate(words):
        if base_forms(word).isdisjoint(PARTICLE_VERBS):
            continue
        for later in range(at + 2, min(at + 8, len(words))):
            follows = words[later + 1] if later + 1 < len(words) else ","
            if words[later] in PARTICLES and (follows == "," or follows in MARKERS):
                words.insert(at + 1, words.pop(later))
                break
    return words


def _sentences(words: Sequence[str]) -> list[tuple[list[str], bool]]:
    """Part at ends of sentences; say of each whether it ends with a question mark."""
    sentences: list[tuple[list[str], bool]] = []
    current: list[str] = []
    for word in (*words, END):
        if word in (END, "?"):
            if current:
                sentences.append((current, word == "?"))
            current = []
        elif word not in ("(", ")"):
            current.append("," if word in (":", ";") else word)
    return sentences
