"""Words and a pair model together: words judge prompts that look alike, the model those that do not.

The model has learned what near misses look like, and takes any small difference for one that matters. So it is not
asked where the words are the same, may object where they are said to ask the same, and must be sure where they are not.
Words typed wrong are put right before.
"""

import math
from collections.abc import Callable, Iterator, Sequence

from semantic_cache.verifier.verifier import Verdict, Verifier

# The least logits to serve. With these 2.3% of near misses in groups that the model was not trained on, which are as
# hard as their authors could make them, are served, and none of the tune split of perf/data.
AGREED, REFUSED = -2.0, 2.0
MOST_ASKED = 3  # candidates of a lookup that the model looks at

Score = Callable[[str, str], float | None]  # a pair's logit, None for a pair too long to be read
Mend = Callable[[str, str], tuple[str, str]]  # two prompts without their slips of the key


class PairVerifier:
    """Judges candidates by their words and the pair model. `version` is part of every partition."""

    def __init__(self, words: Verifier, score: Score, model: str, mend: Mend) -> None:
        """`model` names the pair model and its version."""
        self._words = words
        self._score = score
        self._mend = mend
        self.version = f"{words.version} {model} {AGREED} {REFUSED} mended"

    def verdicts(self, prompt: str, candidates: Sequence[tuple[str, float]]) -> Iterator[Verdict]:
        """Judge stored prompts with their cosines, the most similar first: as many as the model may be asked about.

        Raises what the model raises.
        """
        for stored, similarity in candidates[:MOST_ASKED]:
            asked, known = self._mend(prompt, stored)
            if asked == known:
                yield Verdict(None, 1.0, is_settled=True)
                continue
            words = self._words.judge(asked, known, similarity)
            yield words if words.is_settled else self._weighed(words, asked, known)

    def _weighed(self, words: Verdict, prompt: str, stored: str) -> Verdict:
        logit = self._score(prompt, stored)
        if logit is None:
            return words
        margin = logit - (REFUSED if words.refusal else AGREED)
        return Verdict(None if margin >= 0 else words.refusal or "unlike", 1 / (1 + math.exp(-margin)))
