"""Which drafter proposes for which sequence, and how many tokens."""

import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from speculative_decoding.acceptance_rate import AcceptanceRate
from speculative_decoding.drafter import Drafter
from speculative_decoding.prompt_lookup import NO_MATCH, Match
from speculative_decoding.sampling import Distribution
from speculative_decoding.sequence import Sequence, Source
from speculative_decoding.speculation_length import plan_lengths
from speculative_decoding.step_costs import StepCosts

LONG_MATCH = 4  # tokens of agreement from which copying is likelier to be right than the draft model
FIRST_RATES: dict[Source, float] = {"model": 0.7, "prompt_lookup": 0.6}
FILL_TOKENS = 64  # of prompts and plain rounds that the draft model takes in between two of the target's steps
PROBING = 0.02  # share of the time that may go into finding out whether speculation pays again
PROBE_ROUNDS = 8  # plain rounds between two looks at the costs
MOST_PROBES = 4  # rounds' worth of time that probing may save up
SHARED_MEMORY = 0.98  # of the acceptance rates that new sequences begin with


class Drafts(NamedTuple):
    """tokens: int64 [rows, longest]. lengths: int32 [rows]. distributions: of rows judged by rejection."""

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int32]
    distributions: dict[int, list[Distribution]]


class _Candidate(NamedTuple):
    """A sequence that may be drafted for, by whom, and how far."""

    row: int
    source: Source
    most: int
    match: Match


class Speculation:
    """Proposes drafts for a batch. Without `costs` every draft is as long as it may be."""

    def __init__(self, drafter: Drafter | None, most: int, costs: StepCosts | None) -> None:
        self._drafter = drafter
        self._most = most
        self._costs = costs
        self._rates = {source: AcceptanceRate(rate, SHARED_MEMORY) for source, rate in FIRST_RATES.items()}
        self._sources: dict[Sequence, Source] = {}  # of this round's drafts
        self._probing_s = 0.0  # that may be spent
        self._plain_rounds = 0
        self._is_probe = False

    def draft(self, running: list[Sequence], room: int) -> Drafts:
        """Return what is proposed, `room` tokens at most for each of the sequences in slots 0, 1, ..."""
        self._sources, self._is_probe = {}, False
        candidates = [self._candidate(row, sequence, room) for row, sequence in enumerate(running)]
        lengths = np.zeros(len(running), np.int32)
        wanted = [candidate for candidate in candidates if candidate]
        if wanted:
            planned = self._plan(wanted, running)
            for candidate, length in zip(wanted, planned.tolist(), strict=True):
                lengths[candidate.row] = length
        if not lengths.any():
            return Drafts(np.zeros((len(running), 0), np.int64), lengths, {})
        return self._propose(running, wanted, lengths)

    def record(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Learn from how many of a sequence's drafted tokens stood."""
        if drafted:
            source = self._sources[sequence]
            sequence.rates[source].update(drafted, accepted)
            self._rates[source].update(drafted, accepted)

    def record_round(self, drafts: Drafts, seconds: float, verify_s: float) -> None:
        """Learn from what a round took, and its part after drafting, and account for what probing costs."""
        if not self._costs:
            return
        rows, longest = drafts.tokens.shape
        self._costs.verify.observe(rows, longest, verify_s)
        if self._is_probe:
            self._probing_s -= max(0.0, seconds - float(self._costs.verify.row(rows)[0]))
        elif not longest:
            self._plain_rounds += 1
            self._probing_s = min(self._probing_s + PROBING * seconds, MOST_PROBES * seconds)

    def _candidate(self, row: int, sequence: Sequence, room: int) -> _Candidate | None:
        """Return who would draft for a sequence: `auto` copies when the match is long, and else asks the model."""
        options = sequence.options
        most = self._most if options.speculation_length is None else options.speculation_length
        most = min(most, room, options.max_tokens - sequence.answered - 1)
        drafter = options.drafter
        if most <= 0 or drafter == "none":
            return None
        match = NO_MATCH if drafter == "model" else sequence.lookup.find()
        if match.length and (drafter == "prompt_lookup" or match.length >= LONG_MATCH or not self._drafter):
            return _Candidate(row, "prompt_lookup", most, match)
        if drafter == "prompt_lookup" or not self._drafter:
            return None
        return _Candidate(row, "model", most, match)

    def _plan(self, wanted: list[_Candidate], running: list[Sequence]) -> NDArray[np.int32]:
        """Return how many tokens to draft for each candidate."""
        if not self._costs:
            return np.array([candidate.most for candidate in wanted], np.int32)
        rates = [self._rate(running[candidate.row], candidate.source).value for candidate in wanted]
        most = [candidate.most for candidate in wanted]
        by_model = [candidate.source == "model" for candidate in wanted]
        rows = len(running)
        draft, verify = self._costs.draft.row(rows), self._costs.verify.row(rows)
        idle = rows - len(wanted)  # rows that are not drafted for give one token whatever the others do
        plan = plan_lengths(rates, most, by_model, draft, verify, idle)
        if not plan.lengths.any() and self._plain_rounds >= PROBE_ROUNDS:
            self._plain_rounds = 0
            probe = plan_lengths(rates, most, by_model, draft, verify, idle, probe=True)
            self._is_probe = self._probing_s >= probe.seconds - plan.seconds
            return probe.lengths if self._is_probe else plan.lengths
        return plan.lengths

    def _rate(self, sequence: Sequence, source: Source) -> AcceptanceRate:
        """Return a sequence's estimate, which begins as what others have shown."""
        if source not in sequence.rates:
            sequence.rates[source] = AcceptanceRate(self._rates[source].value)
        return sequence.rates[source]

    def _propose(self, running: list[Sequence], wanted: list[_Candidate], lengths: NDArray[np.int32]) -> Drafts:
        by_model = np.zeros_like(lengths)
        for candidate in wanted:
            self._sources[running[candidate.row]] = candidate.source
            self._rate(running[candidate.row], candidate.source)
            if candidate.source == "model":
                by_model[candidate.row] = lengths[candidate.row]
        self._drop_unprepared(running, by_model, lengths)
        tokens = np.zeros((len(running), int(lengths.max())), np.int64)
        distributions: dict[int, list[Distribution]] = {}
        if self._drafter and by_model.any():
            started = time.perf_counter()
            proposals = self._drafter.propose(running, by_model)
            rows, longest = proposals.tokens.shape
            tokens[:rows, :longest] = proposals.tokens
            distributions = proposals.distributions
            if self._costs:
                self._costs.draft.observe(rows, longest, time.perf_counter() - started)
        for candidate in wanted:
            length = int(lengths[candidate.row])
            if candidate.source == "prompt_lookup" and length:
                copied = running[candidate.row].lookup.propose(candidate.match, length)
                tokens[candidate.row, :length] = copied
                distributions[candidate.row] = [_certain(token) for token in copied]
        return Drafts(tokens, lengths, distributions)

    def _drop_unprepared(
        self, running: list[Sequence], by_model: NDArray[np.int32], lengths: NDArray[np.int32]
    ) -> None:
        """Have the draft model take in what it lacks, and draft nothing where that is more than a round may cost."""
        budget = FILL_TOKENS
        for row in np.flatnonzero(by_model).tolist():
            assert self._drafter is not None
            most = max(1, budget)
            taken = self._drafter.fill(row, running[row].tokens, most)
            budget -= taken
            if taken >= most:
                by_model[row] = lengths[row] = 0


def _certain(token: int) -> Distribution:
    return Distribution(np.array([token]), np.ones(1))
