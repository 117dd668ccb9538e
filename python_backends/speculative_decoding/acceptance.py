"""Which drafted tokens stand."""

from collections.abc import Callable
from collections.abc import Sequence as Row

import numpy as np

from speculative_decoding.adjustments import Adjustments
from speculative_decoding.decoder import Logits
from speculative_decoding.noise import Stream, key_of, uniform
from speculative_decoding.paged_logits import Choices, PagedLogits
from speculative_decoding.sampling import Distribution, sample, wishes_of
from speculative_decoding.sequence import Sequence
from speculative_decoding.speculation import Drafts

Choose = Callable[[int], int]  # the target's choice after the committed tokens and so many drafted ones


def accept_drafts(sequences: Row[Sequence], drafts: Drafts, logits: Logits) -> list[list[int]]:
    """Return the tokens to commit for each row: 1 to k + 1 of k drafted, given the target's logits.

    logits: [rows, longest + 1, vocabulary], after the last committed token and after each drafted one.
    """
    if isinstance(logits, PagedLogits):
        return _accept_on_device(sequences, drafts, logits)
    drafted, is_bare = drafts.on_host(), [sequence.options.is_bare for sequence in sequences]
    likeliest = logits.argmax(-1).tolist() if any(is_bare) else []
    return [
        accept(drafted[row], likeliest[row].__getitem__)
        if is_bare[row]
        else _accept_row(sequence, drafted[row], drafts.distributions.get(row, []), logits[row])
        for row, sequence in enumerate(sequences)
    ]


def _accept_on_device(sequences: Row[Sequence], drafts: Drafts, logits: PagedLogits) -> list[list[int]]:
    """Accept where the logits are, what is judged by rejection excepted."""
    accepted: list[list[int]] = [[]] * len(sequences)
    if not all(sequence.by_rejection for sequence in sequences):
        chosen = choose_on_device(sequences, drafts, logits)
        standing = chosen.standing.tolist()
        accepted = [tokens[: stands + 1] for tokens, stands in zip(chosen.tokens.tolist(), standing, strict=True)]
    rejecting = [row for row, sequence in enumerate(sequences) if sequence.by_rejection]
    drafted = drafts.on_host() if rejecting else []
    for row in rejecting:
        accepted[row] = _accept_row(sequences[row], drafted[row], drafts.distributions.get(row, []), logits[row])
    return accepted


def choose_on_device(sequences: Row[Sequence], drafts: Drafts, logits: PagedLogits) -> Choices:
    """Return the target's choices at every place of each row; of rows judged by rejection they mean nothing.

    They are those that are made on the host, but for rounding. Only adjustments need to know what is drafted.
    """
    if all(sequence.options.is_bare for sequence in sequences):
        return logits.choose(None)
    width = logits.shape[1]
    wishes = wishes_of([sequence.sampler for sequence in sequences], width)
    adjusted = [row for row, one in enumerate(sequences) if one.sampler.looks_back and not one.by_rejection]
    if not adjusted:
        return logits.choose(wishes)
    each: list[Adjustments | None] = [None] * len(sequences)
    drafted = drafts.on_host()
    for row in adjusted:
        each[row] = sequences[row].sampler.adjustments(drafted[row])
    together = Adjustments.together(each, width)
    return logits.choose(wishes, together if len(together.entries) else None)


def _accept_row(sequence: Sequence, drafted: list[int], proposed: list[Distribution], logits: Logits) -> list[int]:
    """Return the tokens of one row to commit, given its logits [at least k + 1, vocabulary]."""
    sampler = sequence.sampler
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
        if uniform(key_of(seed, here, Stream.ACCEPT)) * draft.of(token) < target.of(token):
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
        return sample(distribution.tokens, np.log(distribution.probabilities), key_of(seed, position, stream))
