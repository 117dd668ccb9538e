"""How many paraphrases are found, and how many near misses are served, by system."""

import random
import re
from collections.abc import Mapping, Sequence
from string import ascii_lowercase

import numpy as np
from numpy.typing import NDArray

from perf.prompt_pairs import Pair, cosines, embed_all, make_verifier  # puts python_backends on the path

from semantic_cache.cache import Judge  # isort: skip
from semantic_cache.policy import VERIFIED_THRESHOLD  # isort: skip
from semantic_cache.verifier.slips import are_neighbours  # isort: skip
from semantic_cache.verifier.verifier import Verifier  # isort: skip

SERVED = 0.5  # the least probability
THRESHOLDS = [round(0.80 + 0.01 * step, 2) for step in range(20)]

Quality = dict[str, float]


def quality(pairs: Sequence[Pair], served: Sequence[bool] | NDArray[np.bool_]) -> Quality:
    """Return recall of paraphrases, share of near misses served, and share of what is served that is right."""
    labels = np.array([pair.label for pair in pairs])
    hits = np.array(served)
    right = hits[labels == "paraphrase"]
    return {
        "recall": round(float(right.mean()), 4),
        "false_hit_rate": round(float(hits[labels == "near_miss"].mean()), 4),
        "precision": round(float(right.sum() / max(1, hits.sum())), 4),
    }


def threshold_curve(pairs: Sequence[Pair], cosines: Sequence[float]) -> dict[str, Quality]:
    """Return the quality of a similarity threshold alone."""
    return {f"threshold_{least:.2f}": quality(pairs, np.array(cosines) >= least) for least in THRESHOLDS}


def probabilities(pairs: Sequence[Pair], cosines: Sequence[float]) -> dict[str, NDArray[np.float64]]:
    """Return what ours, and words alone, think of each pair."""
    judges = {"ours": make_verifier(), "words alone": Verifier.load()}
    return {name: _judged(judge, pairs, cosines) for name, judge in judges.items()}


def verified(pairs: Sequence[Pair], found: Mapping[str, NDArray[np.float64]]) -> dict[str, Quality]:
    """Return the quality of ours as it is served, and by words alone, given probabilities()."""
    least = {"ours": SERVED, "words alone": Verifier.load().threshold}
    return {name: quality(pairs, found[name] >= least[name]) for name in least}


def verified_curve(pairs: Sequence[Pair], found: Mapping[str, NDArray[np.float64]]) -> list[Quality]:
    """Return the quality of ours at every least probability, from strict to lax, given probabilities()."""
    ours = found["ours"]
    return [quality(pairs, ours >= least) for least in np.unique(ours[ours > 0])[::-1]]


def mistyped(pairs: Sequence[Pair]) -> dict[str, float]:
    """Return how many of the pairs' first prompts are found when a word is typed wrong, and how many there are."""
    rng = random.Random(0)
    prompts = sorted({pair.first for pair in pairs})
    typed = [(prompt, slip) for prompt in prompts if (slip := _type_wrong(prompt, rng)) != prompt]
    vectors = embed_all(sorted({prompt for both in typed for prompt in both}))
    as_pairs = [Pair(prompt, slip, "paraphrase", "mistyped", "", "") for prompt, slip in typed]
    found = _judged(make_verifier(), as_pairs, cosines(as_pairs, vectors)) >= SERVED
    return {"found": round(float(found.mean()), 4), "prompts": len(typed)}


def _type_wrong(prompt: str, rng: random.Random) -> str:
    """Exchange, leave out or double a letter of a word of four or more, or hit a key beside it, each as often."""
    word = rng.choice(list(re.finditer(r"[A-Za-z]{4,}", prompt)) or [None])
    if word is None:
        return prompt
    at = rng.randrange(word.start(), word.end())
    here, kind = prompt[at], rng.choice(("exchange", "leave out", "double", "beside"))
    if kind == "exchange" and at + 1 < word.end():
        return prompt[:at] + prompt[at + 1] + here + prompt[at + 2 :]
    beside = [letter for letter in ascii_lowercase if letter != here.lower() and are_neighbours(letter, here.lower())]
    return prompt[:at] + {"leave out": "", "double": 2 * here}.get(kind, rng.choice(beside)) + prompt[at + 1 :]


def _judged(judge: Judge, pairs: Sequence[Pair], cosines: Sequence[float]) -> NDArray[np.float64]:
    return np.array(
        [
            next(judge.verdicts(pair.second, [(pair.first, cosine)])).probability
            if cosine >= VERIFIED_THRESHOLD
            else 0.0
            for pair, cosine in zip(pairs, cosines, strict=True)
        ]
    )
