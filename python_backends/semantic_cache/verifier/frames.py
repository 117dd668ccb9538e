"""What kind of question a sentence asks, found by how it is put; the rest of it is what it is about."""

import re
from typing import NamedTuple

POLITE = re.compile(
    r"(?:hi|hello|hey|please|kindly|ok|okay|thanks|thank you|excuse me|sorry|good morning)\b[ ,!.]*"
    r"|(?:would|do) you mind (?:telling|showing|explaining to|explaining) (?:me )?(?:please )?"
    r"|(?:could|can|would|will) you (?:please |kindly |just )*(?:tell|show|explain to|help|remind) me (?:please )?"
    r"(?=how|what|which|when|where|who|why|if|whether)"
    r"|(?:could|can|would|will) you (?:please |kindly |just )*"
    r"|(?:walk me through|give me an idea of|help me understand|remind me|explain to me)\b "
    r"|i (?:do not|never) (?:get|understand|see) (?=how|what|which|when|where|who|why|if|whether)"
    r"|(?:please )?(?:tell|show) me (?:please )?(?=how|what|which|when|where|who|why|if|whether)"
    r"|(?:do you know|i wonder|i was wondering|i have always wondered|i would like to know|i want to know"
    r"|i need to know|i do not know|any idea|i am curious)[ ,]*(?=how|what|which|when|where|who|why|if|whether)"
    r"|(?:i would like|i want|i need|i wish|we would like|we want|we need) to (?=\w)"
    r"|(?:i would like|i want|i need|i am looking for|we need|we want) (?:you to )?(?=an? |the |some |\w)"
)
GREETING = re.compile(
    r"\s*(?:(?:hi|hello|hey)(?: there| all| everyone)?|good (?:morning|afternoon|evening)|(?:quick|simple) question"
    r"|(?:i have|i've got) a (?:quick )?question|(?:can|could) (?:you|someone|anyone) (?:please )?help(?: me)?"
    r"|just wondering)\s*[,.!?:]+\s*",
    re.IGNORECASE,
)
ENDING = re.compile(r"[ ,]*\b(?:please|thanks|thank you|for me)[ .!?]*$")
STEPS = r"(?:best |right |correct |proper |easiest |simplest )?"
FRAMES = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("why", r"(?:why|how come|what (?:is|was) the reason(?: why| that| for)?|for what reason"
         r"|what(?: (?:is|was) it that)? (?:causes|caused|makes|made|led to|leads to)"
         r"|what (?:is|are) the causes? (?:of|for))\b"),
        ("how", r"(?:how (?:do|can|could|should|would|might|may|will|must) (?:i|we|you|one|someone|people)\b"
         r"(?: go about)?|how to\b|(?:what|which) (?:is|are) (?:the |an? )?" + STEPS +
         r"(?:way|ways|command|method|process|procedure|syntax|formula|steps?) (?:to|for|of|that)\b|what is the way to"
         r"|what (?:can|should|must) i do to\b|what do i (?:type|do|write|need to do|have to do|run)"
         r" (?:to|so that|if i want to)\b"
         r"|is there (?:an?|any) (?:way|method|command|option) (?:to|of|for)\b|in (?:what|which) way"
         r" (?:can|do) (?:i|we|you)|where can i (?=look up|find|see|change|set|get)|(?:what|which) command\b)"),
        ("often", r"(?:how (?:often|frequently|regularly)|at (?:what|which) intervals?|how many times)\b"),
        ("long", r"(?:how long|for how long|how much time|how many (?:seconds|minutes|hours|days|weeks|months|years)"
         r"(?= (?:does|do|did|should|must|until|is|will|before))|what is the duration of)\b"),
        ("far", r"(?:how far|what is the distance|what distance)\b"),
        ("count", r"(?:how many|what is the number of|what number of)\b"),
        ("much", r"(?:how much)\b"),
        ("measure", r"how (?=big|large|small|tall|high|old|deep|wide|fast|heavy|hot|cold|long|loud|quick|strong)"),
        ("manner", r"(?:how (?=is|are|was|were|does|did|do|has|have)|in (?:what|which) way|what is it like)\b"),
        ("since", r"since when\b"),
        ("when", r"(?:when|by when|at what age"
         r"|(?:on |at |in |by |from )?(?:what|which) (?:date|day|time|year|month|weekday)"
         r"|what is the (?:[a-z]+ )?(?:time|date|day) (?:to|for|of|when))\b"),
        ("where", r"(?:where|(?:in |at )?(?:what|which) (?:place|location)|what is the location of)\b"),
        ("who", r"(?:whom|whose|who|by whom|which (?:person|people))\b"),
        ("what", r"what (?:is|are|was|were) the (?:job|role|purpose|point|function|use|idea|meaning) of\b"
         r"|what (?:good|use) (?:is|are)\b|what role (?:does|do)\b(?=.* play)"
         r"|(?:the )?(?:job|role|purpose|point) of\b"
         r"|(?:what|which|is there an?|are there any|explain|describe|define|clarify"
         r"|(?:at|by|for|from|in|on|to|under|with) (?:what|which))\b"),
        ("tell", r"(?:name|list|give me|show me|tell me|show|display|print)\b"),
        ("able", r"(?:is it (?:possible|ok|okay|all right|alright|allowed|permitted|fine)"
         r"(?: to| for me to| if i| that)?|am i (?:allowed|permitted|able) to"
         r"|(?:can|could|may|might) (?:i|we|one|you|someone)\b|(?:can|could|may)\b)"),
        ("should", r"(?:should (?:i|we)|should|do (?:i|we) (?:need|have) to|must (?:i|we)|ought (?:i|we) to)\b"),
        ("whether", r"(?:is|are|was|were|am|do|does|did|will|would|has|have|had|if|whether)\b"),
    )
)  # fmt: skip
# Kinds that may ask for the same: a command for what the question "how" asks, "what" for almost anything.
NEAR = {
    frozenset(pair)
    for pair in (
        ("how", "tell"), ("what", "tell"), ("able", "whether"), ("should", "whether"), ("able", "tell"),
        ("what", "who"), ("what", "where"), ("what", "when"), ("what", "measure"), ("what", "count"), ("what", "much"),
        ("what", "far"), ("what", "often"), ("what", "long"), ("measure", "far"), ("measure", "long"),
        ("when", "long"), ("often", "when"), ("often", "long"), ("much", "measure"), ("much", "count"),
        ("what", "manner"), ("how", "manner"), ("why", "manner"), ("what", "able"),
        ("tell", "count"), ("tell", "much"), ("tell", "measure"), ("tell", "far"), ("tell", "long"), ("tell", "often"),
        ("count", "measure"), ("count", "far"), ("how", "count"),
    )
}  # fmt: skip


MOST_CLAUSES = 3
PASSIVE_WHO = re.compile(r" by whom?$")
SUBORDINATE = frozenset({"when", "whether"})  # kinds whose words also begin a clause that asks nothing
FRONTED = re.compile(
    r"(?:in|on|at|for|by|before|after|when|if|as|during|without|from|every|so that|once|while|until)\b"
)


class Frame(NamedTuple):
    """`kind`: one of the kinds of FRAMES, or tell. `about`: what remains of the sentence."""

    kind: str
    about: str


def without_greeting(prompt: str) -> str:
    """Return a prompt without what is said before anything is asked; one that is nothing else stays as it is."""
    rest = prompt
    while match := GREETING.match(rest):
        rest = rest[match.end() :]
    return rest or prompt


def strip_frame(sentence: str) -> Frame:
    """Split a sentence, in lower case with contractions resolved, into what it asks and what it is about.

    A clause in front of the question, or behind which it stands, goes to the end: "in winter, is it open".
    """
    if passive := PASSIVE_WHO.search(sentence):
        return Frame("who", sentence[: passive.start()])
    clauses = [clause.strip() for clause in ENDING.sub("", sentence.strip()).split(",")]
    for at, clause in enumerate(clauses[:MOST_CLAUSES]):
        clause = _impolite(clause)
        for kind, pattern in FRAMES:
            if (match := pattern.match(clause)) and not (kind in SUBORDINATE and at + 1 < len(clauses) and at == 0):
                rest = [clause[match.end() :], *clauses[:at], *clauses[at + 1 :]]
                return Frame(kind, " , ".join(rest))
    if len(clauses) > 1 and FRONTED.match(clauses[0]):
        clauses = [*clauses[1:], clauses[0]]
    return Frame("tell", " , ".join([_impolite(clauses[0]), *clauses[1:]]))


def _impolite(clause: str) -> str:
    while (match := POLITE.match(clause)) and match.end() and match.end() < len(clause):
        clause = clause[match.end() :]
    return clause
