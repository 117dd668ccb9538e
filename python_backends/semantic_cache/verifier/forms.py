"""English word forms: which base forms a word may come from."""

from functools import lru_cache

VOWELS = frozenset("aeiouy")
LEAST = 3  # letters that a base form keeps
DEPTH = 2  # endings that a word may have: modifications, modification, modify
IRREGULAR = {
    form: base
    for base, forms in {
        "be": "am is are was were been being", "do": "does did done", "have": "has had", "go": "went gone goes",
        "get": "got gotten getting", "make": "made", "send": "sent", "buy": "bought", "pay": "paid", "find": "found",
        "keep": "kept", "leave": "left", "lose": "lost", "begin": "began begun", "break": "broke broken",
        "bring": "brought", "build": "built", "catch": "caught", "choose": "chose chosen", "come": "came",
        "drink": "drank drunk", "drive": "drove driven", "eat": "ate eaten", "fall": "fell fallen", "feel": "felt",
        "fly": "flew flown", "forget": "forgot forgotten", "freeze": "froze frozen", "give": "gave given",
        "grow": "grew grown", "hear": "heard", "hold": "held", "hide": "hid hidden", "know": "knew known",
        "lead": "led", "lend": "lent", "mean": "meant", "meet": "met", "ride": "rode ridden", "ring": "rang rung",
        "rise": "rose risen", "run": "ran", "say": "said", "see": "saw seen", "sell": "sold", "show": "shown",
        "sing": "sang sung", "sit": "sat", "sleep": "slept", "speak": "spoke spoken", "spend": "spent",
        "stand": "stood", "steal": "stole stolen", "swim": "swam swum", "take": "took taken", "teach": "taught",
        "tell": "told", "think": "thought", "throw": "threw thrown", "understand": "understood", "wake": "woke woken",
        "wear": "wore worn", "win": "won", "write": "wrote written", "weigh": "weight", "quit": "quitting",
        "child": "children", "person": "people persons", "man": "men", "woman": "women", "foot": "feet",
        "tooth": "teeth", "mouse": "mice", "life": "lives", "knife": "knives", "leaf": "leaves", "shelf": "shelves",
        "index": "indices indexes", "datum": "data", "criterion": "criteria", "deliver": "delivery",
        "arrive": "arrival", "cancel": "cancellation",
        "fail": "failure", "lie": "lying", "die": "dying", "invest": "investment",
    }.items()
    for form in forms.split()
}  # fmt: skip
NUMBERS = {
    word: str(value)
    for words, values in (
        ("zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen twenty", (0, *range(2, 21))),
        ("thirty forty fifty sixty seventy eighty ninety hundred thousand million billion",
         (30, 40, 50, 60, 70, 80, 90, 100, 1000, 10**6, 10**9)),
        ("second third fourth fifth sixth seventh eighth ninth tenth", range(2, 11)),
        ("half dozen twice", (0.5, 12, 2)),
    )
    for word, value in zip(words.split(), values, strict=True)
}  # fmt: skip
SPELLINGS = (  # British to American
    ("isation", "ization"), ("ising", "izing"), ("ised", "ized"), ("ise", "ize"), ("yse", "yze"), ("ysing", "yzing"),
    ("olour", "olor"), ("aviour", "avior"), ("avour", "avor"), ("ighbour", "ighbor"), ("onour", "onor"),
    ("abour", "abor"), ("entre", "enter"), ("metre", "meter"), ("litre", "liter"), ("theatre", "theater"),
    ("ogramme", "ogram"), ("efence", "efense"), ("icence", "icense"), ("grey", "gray"), ("ourney", "ourney"),
)  # fmt: skip
NOT_BRITISH = frozenset({"raise", "noise", "exercise", "advise", "rise", "wise", "otherwise", "precise", "promise",
    "surprise", "enterprise", "expertise", "franchise", "merchandise", "disguise", "praise", "cruise", "revise",
    "arise", "comprise", "rising", "raising", "raised", "advised", "advising", "revised", "revising", "promised",
    "supervise", "television", "premise", "premises", "likewise", "concise", "paradise", "devise"})  # fmt: skip
SUFFIXES = (  # ending, what may stand in its place
    ("ies", ("y", "ie")), ("ied", ("y",)), ("ing", ("", "e")), ("ed", ("", "e")), ("es", ("", "e")), ("s", ("",)),
    ("ly", ("", "le")), ("ally", ("",)), ("ification", ("ify",)), ("ation", ("ate", "e", "")), ("ion", ("", "e")),
    ("ment", ("",)), ("ance", ("", "e")), ("ence", ("", "e")), ("ibility", ("ible",)), ("ability", ("able",)),
)  # fmt: skip
DOUBLING = ("ing", "ed")
KEPT = ("ss", "us", "is")  # endings whose s is no plural


@lru_cache(65536)
def base_forms(word: str) -> frozenset[str]:
    """Return `word`, a lower-case word, in American spelling with every base form that its endings allow."""
    found = {american(word)}
    for _ in range(DEPTH):
        found |= {form for known in found for form in _shorter(known)}
    return frozenset(found)


def _shorter(word: str) -> set[str]:
    forms = {IRREGULAR[word]} if word in IRREGULAR else set()
    for ending, replacements in SUFFIXES:
        rest = word[: -len(ending)]
        if not word.endswith(ending) or not VOWELS & set(rest) or (ending == "s" and word.endswith(KEPT)):
            continue
        forms.update(rest + replacement for replacement in replacements if len(rest + replacement) >= LEAST)
        if len(rest) > LEAST and rest[-1] == rest[-2] and rest[-1] not in VOWELS and ending in DOUBLING:
            forms.add(rest[:-1])
    return forms


def american(word: str) -> str:
    """Return the American spelling of a lower-case word."""
    if word in NOT_BRITISH:
        return word
    for british, spelling in SPELLINGS:
        if british in word:
            return word.replace(british, spelling)
    return word
