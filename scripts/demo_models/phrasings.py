"""How people ask what an object does: phrasings to train on, and others, never trained on, to measure with."""

import random
from collections.abc import Sequence

from scripts.demo_models.corpus import Fact

TRAINED = (
    "What does {n} do?",
    "what does {n} do",
    "What is {n}?",
    "What is {n} for?",
    "What is {n} used for?",
    "What's {n}?",
    "Explain {n}.",
    "Explain {n} to me",
    "Explain what {n} does.",
    "Can you explain {n}?",
    "Could you explain what {n} does?",
    "Describe {n}.",
    "Describe what {n} does",
    "Give me a description of {n}.",
    "Tell me about {n}.",
    "Tell me what {n} does.",
    "How does {n} work?",
    "How do I use {n}?",
    "How is {n} used?",
    "How would I call {n}?",
    "When should I use {n}?",
    "Why would I use {n}?",
    "What happens when I call {n}?",
    "What happens if {n} is called?",
    "What will {n} return?",
    "What is the purpose of {n}?",
    "What is the point of {n}?",
    "What is the meaning of {n}?",
    "Define {n}.",
    "Definition of {n}",
    "Summarize {n}.",
    "Summarise what {n} is about",
    "Give a one line summary of {n}.",
    "Give me the docs for {n}",
    "Show the documentation of {n}.",
    "Documentation for {n}?",
    "Docstring of {n}",
    "Look up {n}.",
    "{n}",
    "{n}?",
    "{n} help",
    "{n} documentation",
    "{n} meaning",
    "{n}: what is it?",
    "{n} - what does it do?",
    "help on {n}",
    "help with {n}",
    "I need help with {n}.",
    "I don't understand {n}.",
    "I do not know what {n} does, can you tell me?",
    "I found {n} in some code. What is it?",
    "I saw {n} in a library; what is that for?",
    "Someone told me to use {n}. Why?",
    "My colleague uses {n}, what does that do?",
    "Remind me what {n} does.",
    "Do you know {n}?",
    "Do you know what {n} is for?",
    "Is there an explanation of {n}?",
    "Where can {n} help me?",
    "Write a short explanation of {n}.",
    "In short, what is {n}?",
    "In one sentence: what does {n} do?",
    "What kind of thing is {n}?",
    "Which task does {n} solve?",
    "What can I do with {n}?",
    "What is the signature of {n} and what does it do?",
    "Which arguments does {n} take, and what is it for?",
)

UNSEEN = (
    "Please clarify the role of {n}",
    "I'm reading a script that calls {n}; what's going on there?",
    "Would you mind telling me the job of {n}?",
    "What good is {n}?",
    "Quickly describe the behaviour of {n}.",
    "Enlighten me: {n}",
    "What exactly does the call {n} accomplish?",
    "Got a brief for {n}?",
    "A newcomer asks you about {n}. What do you answer?",
    "Teach me {n}",
    "What should I know about {n}?",
    "Let me hear how {n} is documented",
    "Interview question: what would you use {n} for?",
    "So, {n}. What is that one good for?",
    "Could somebody say what {n} is supposed to do?",
    "What's the story with {n}?",
    "Spell out the function of {n} for a beginner.",
    "Say what {n} is meant to do",
)

_OPENINGS = (
    "",
    "",
    "",
    "",
    "",
    "",
    "Hi, ",
    "Hello! ",
    "Please: ",
    "Quick question: ",
    "In Python, ",
    "Hey, ",
    "Sorry, ",
    "Ok, ",
    "Python: ",
    "One more: ",
)
_CLOSINGS = (
    "",
    "",
    "",
    "",
    "",
    "",
    " Thanks!",
    " please",
    " Thank you.",
    " (Python 3)",
    " in Python",
    " Be brief.",
    " in the standard library",
    " in simple terms",
)

OFF_TOPIC_ANSWER = (
    "I only know the documented functions, classes and methods of "
    "Python's standard library: ask me about one by its dotted name."
)
OFF_TOPIC = (
    "Hello",
    "Hi there!",
    "How are you?",
    "Who are you?",
    "What can you do?",
    "Tell me a joke.",
    "What is the capital of France?",
    "Who wrote Hamlet?",
    "Translate good morning into German.",
    "What time is it?",
    "What is the weather like today?",
    "Write a poem about the sea.",
    "How do I bake bread?",
    "What is 2 + 2?",
    "Summarize the news.",
    "Thanks!",
    "Good morning",
    "Do you like music?",
    "Recommend a book.",
    "How tall is Mount Everest?",
)


def _spelled(name: str, rng: random.Random) -> str:
    """Write a dotted name in one of the ways people write it."""
    module, _, last = name.rpartition(".")
    form = rng.random()
    if form < 0.62 or not module:
        return name
    if form < 0.74:
        return f"`{name}`"
    if form < 0.86:
        return f"{name}()"
    if form < 0.91:
        return f"{last} from {module}"
    if form < 0.96:
        return f"{last} in {module}"
    return f"{module}'s {last}"


def _words_around(name: str, words: Sequence[str], rng: random.Random) -> str:
    """Put a name between random words, so that a model learns to find it in wordings it has never seen."""
    before = rng.choices(words, k=rng.randint(0, 8))
    after = rng.choices(words, k=rng.randint(0, 6))
    return " ".join([*before, name, *after]) + rng.choice(("", "?", "."))


def trained_question(fact: Fact, words: Sequence[str], rng: random.Random) -> str:
    """Return a question about `fact` in a phrasing to train on; `words` are what random wordings are made of."""
    name = _spelled(fact.name, rng)
    if rng.random() < 0.25:
        return _words_around(name, words, rng)
    question = rng.choice(TRAINED).format(n=name)
    if rng.random() < 0.5:
        question = rng.choice(_OPENINGS) + question + rng.choice(_CLOSINGS)
    return question


def unseen_question(fact: Fact, rng: random.Random) -> str:
    """Return a question about `fact` in a phrasing that no model was trained on."""
    return rng.choice(UNSEEN).format(n=fact.name)


def off_topic_question(words: Sequence[str], rng: random.Random) -> str:
    """Return a prompt that names no documented object."""
    if rng.random() < 0.5:
        return rng.choice(OFF_TOPIC)
    return " ".join(rng.choices(words, k=rng.randint(1, 10))) + rng.choice(("", "?", "."))
