"""Which drafted tokens stand."""

from collections.abc import Callable
from collections.abc import Sequence as Row

import numpy as np

from speculative_decoding.decoder import Logits
from speculative_decoding.noise import Stream, uniform
from speculative_decoding.sampling import Distribution, sample
from speculative_decoding.sequence import Sequence

Choose = Callable[[int], int]  # the target's choice after the committed tokens and so many drafted ones


def accept_drafts(sequence: Sequence, drafted: list[int], proposed: list[Distribution], logits: Logits) -> list[int]:
    """Return the tokens to commit: 1 to k + 1 of k drafted, given the target's logits [k + 1, vocabulary].

    proposed: what each was sampled from, where drafts are judged by rejection.
    """
    sampler = sequence.sampler
    if sequence.options.is_bare:
        best = logits.argmax(-1).tolist()
        return accept(drafted, best.__getitem__)
    if sequence.by_rejection:
        return accept_by_rejection(
            drafted,
            proposed,
            lambda place: sampler.distribution(logits[place], drafted[:place]),
            sampler.seed,
            len(sequence.tokens),
        )
    return accept(drafted, lambda place: sampler.choose(logits[place], drafted[:place]))


def accept(drafted: Row[int], choose: Choose) -> list[int]:
    """Return the tokens to commit after a round: the drafted ones that the target would have chosen, then its own next.

    A drafted token stands when it equals the target's choice and all before it stood, so what is returned (1 to k + 1
    tokens of k drafted) is what decoding with the target alone gives (Leviathan et al. 2023, for choices that are a
    function of what is before them).
    """
    committed = []
    for place, token in enumerate(drafted):
        committed.append(choose(place))
        if committed[-1] != token:
            return committed
    return [*committed, choose(len(drafted))]


def accept_by_rejection(
    drafted: Row[int],
    proposed: Row[Distribution],
    wanted: Callable[[int], Distribution],
    seed: int,
    position: int,
) -> list[int]:
    """Return the tokens to commit: 1 to k + 1 of k drafted, distributed as the target's own (Leviathan et al. 2023).

    drafted[i] was sampled from proposed[i]; wanted(i) is the target's distribution there. It stands with probability
    min(1, p / q), else a sample of max(0, p - q) takes its place. `position` is that of the first drafted token.
    """
    committed: list[int] = []
    for place, (token, draft) in enumerate(zip(drafted, proposed, strict=True)):
        target, here = wanted(place), position + place
        if uniform(seed, here, Stream.ACCEPT) * draft.of(token) < target.of(token):
            committed.append(token)
        else:
            return [*committed, _sample(_residual(target, draft), seed, here, Stream.RESIDUAL)]
    return [*committed, _sample(wanted(len(drafted)), seed, position + len(drafted), Stream.CHOICE)]


def _residual(target: Distribution, draft: Distribution) -> Distribution:
    """Return max(0, p - q), normalized."""
    left = target.probabilities.copy()
    shared, ours, theirs = np.intersect1d(target.tokens, draft.tokens, assume_unique=True, return_indices=True)
    if len(shared):
        left[ours] -= draft.probabilities[theirs]
    left = np.maximum(left, 0)
    total = left.sum()
    if total == 0:  # p equals q but for rounding: a rejection has no probability to speak of
        return target
    return Distribution(target.tokens, left / total)


def _sample(distribution: Distribution, seed: int, position: int, stream: Stream) -> int:
    with np.errstate(divide="ignore"):
        return sample(distribution.tokens, np.log(distribution.probabilities), seed, position, stream)
