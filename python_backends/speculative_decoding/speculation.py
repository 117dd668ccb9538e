"""Which drafter proposes for which sequence, and how many tokens."""

import time
from bisect import bisect_right
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from speculative_decoding.acceptance_rate import AcceptanceRate
from speculative_decoding.drafter import Drafter
from speculative_decoding.followed import Followed
from speculative_decoding.options import MAX_SPECULATION_LENGTH
from speculative_decoding.prompt_lookup import NO_MATCH, Match
from speculative_decoding.sampling import Distribution
from speculative_decoding.sequence import Sequence
from speculative_decoding.speculation_length import Plan, goodputs_alone, plan_lengths, step_of
from speculative_decoding.step_costs import StepCosts

# Who drafts, each with an acceptance rate of its own: the model, or copying after a match of so many tokens or more.
Source = int
MODEL: Source = 0
LEAST_MATCHES = (2, 4, 8, 16)
FIRST_RATES = (0.7, 0.4, 0.6, 0.7, 0.8)
LONG_MATCH: Source = 2  # where nothing was measured, a match from here on is likelier to be right than the model
COPIED = (
    2  # times as many tokens may be copied as the model may draft: they cost nothing, and are right for long or not
)
KEPT_ROUNDS = 8  # for which a plan holds, while the same rows may draft as far
PROBING = 0.02  # share of the time that may go into finding out whether speculation pays again
PROBE_ROUNDS = 8  # plain rounds between two looks at the costs
MOST_PROBES = 4  # rounds' worth of time that probing may save up
SHARED_MEMORY = 0.98  # of the acceptance rates that new sequences begin with


class Drafts(NamedTuple):
    """tokens: int64 [rows, longest]. lengths: int32 [rows]. distributions: of rows judged by rejection.

    followed: what the tokens are that are ON_DEVICE.
    """

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int32]
    distributions: dict[int, list[Distribution]]
    followed: Followed | None = None

    @classmethod
    def none(cls, rows: int) -> "Drafts":
        """Return that nothing is drafted for so many rows."""
        return cls(np.zeros((rows, 0), np.int64), np.zeros(rows, np.int32), {})

    def on_host(self) -> list[list[int]]:
        """Return the tokens of each row; for what a device has of them it waits."""
        tokens = self.followed.complete(self.tokens) if self.followed else self.tokens
        return [row[:length] for row, length in zip(tokens.tolist(), self.lengths.tolist(), strict=True)]


class _Candidate(NamedTuple):
    """A sequence that may be drafted for, by whom, and how far."""

    row: int
    source: Source
    most: int
    match: Match


class Speculation:
    """Proposes drafts for a batch. Without `costs` every draft is as long as it may be."""

    def __init__(self, drafter: Drafter | None, most: int, costs: StepCosts | None) -> None:
        """`most`: tokens that the model drafts, unless a request says otherwise."""
        self._drafter = drafter
        self._most = most
        self._most_copied = most_copied(most)
        self._costs = costs
        self._rates = [AcceptanceRate(rate, SHARED_MEMORY) for rate in FIRST_RATES]
        self._sources: dict[Sequence, Source] = {}  # of this round's drafts
        self._matches: dict[Sequence, Match] = {}  # of this round, used or not
        self._appeal: tuple[list[float], list[float]] | None = None  # goodputs_alone(), for one sequence
        self._plan_key: tuple[object, ...] = ()
        self._planned: Plan | None = None
        self._rounds_left = 0  # that the plan holds
        self._probing_s = 0.0  # that may be spent
        self._plain_rounds = 0
        self._is_probe = False
        self._asked_at = 0.0  # the drafter, on time.perf_counter()'s clock

    def draft(self, running: list[Sequence], room: int) -> Drafts:
        """Return what is proposed, `room` tokens at most for each of the sequences in slots 0, 1, ..."""
        self._sources, self._matches, self._is_probe = {}, {}, False
        self._look_at_costs(len(running))
        candidates = [self._candidate(row, sequence, room) for row, sequence in enumerate(running)]
        lengths = np.zeros(len(running), np.int32)
        wanted = [candidate for candidate in candidates if candidate]
        if wanted:
            planned = self._plan(wanted, running)
            for candidate, length in zip(wanted, planned.tolist(), strict=True):
                lengths[candidate.row] = length
        if not lengths.any():
            return Drafts.none(len(running))
        return self._propose(running, wanted, lengths)

    def record(self, sequence: Sequence, drafted: int, tokens: list[int]) -> None:
        """Learn from the next `tokens` of a sequence, which follow `drafted` tokens as far as those stood.

        Also how a match would have done that was not copied from: it costs nothing to find out.
        """
        source, match = self._sources.get(sequence), self._matches.get(sequence)
        if drafted and source is not None:
            self._learn(sequence, source, drafted, len(tokens) - 1)
        if match and (not drafted or source == MODEL):
            right = sequence.lookup.agreement(match, tokens)
            self._learn(sequence, _grade(match), right + (right < len(tokens)), right)

    def record_round(self, drafts: Drafts, seconds: float, verify_s: float) -> None:
        """Learn from what a round took, and its part after drafting, and account for what probing costs."""
        if not self._costs:
            return
        rows, longest = drafts.tokens.shape
        self._costs.verify.observe(rows, longest, verify_s)
        if drafts.followed:
            self._costs.draft.observe(*drafts.followed.shape, drafts.followed.ready_at() - self._asked_at)
        if self._is_probe:
            self._probing_s -= max(0.0, seconds - float(self._costs.verify.row(rows)[0]))
        elif not longest:
            self._plain_rounds += 1
            self._probing_s = min(self._probing_s + PROBING * seconds, MOST_PROBES * seconds)

    def _look_at_costs(self, rows: int) -> None:
        """See now and then what drafting costs."""
        self._rounds_left -= 1
        if self._costs and (self._rounds_left < 0 or self._plan_key[:1] != (rows,)):
            self._rounds_left, self._plan_key, self._planned = KEPT_ROUNDS, (rows,), None
            costs = self._costs.draft.row(rows), self._costs.verify.row(rows)
            self._appeal = goodputs_alone(*costs, self._most, self._most_copied) if rows == 1 else None

    def _candidate(self, row: int, sequence: Sequence, room: int) -> _Candidate | None:
        """Return who would draft for a sequence: for `auto` whoever gives more tokens a second; and how far."""
        options, asked = sequence.options, sequence.options.speculation_length
        room = min(room, options.max_tokens - sequence.answered - 1)
        most = min(self._most if asked is None else asked, room)
        if most <= 0 or options.drafter == "none":
            return None
        match = NO_MATCH if options.drafter == "model" else sequence.lookup.find()
        has_model = self._drafter is not None and options.wants_draft_model
        if match.length:
            self._matches[sequence] = match
            grade = _grade(match)
            if not has_model or self._prefers(sequence, grade):
                return _Candidate(row, grade, min(self._most_copied, room) if asked is None else most, match)
        return _Candidate(row, MODEL, most, match) if has_model else None

    def _prefers(self, sequence: Sequence, grade: Source) -> bool:
        """Whether copying after a match gives more tokens a second than the draft model.

        Alone it saves the model's time. Beside others, for whom the model drafts anyway, it must be right more often.
        """
        if not self._costs:
            return grade >= LONG_MATCH
        copied, drafted = (self._rate(sequence, source).value for source in (grade, MODEL))
        if not self._appeal:
            return copied > drafted
        copying, drafting = self._appeal
        return copying[step_of(copied)] > drafting[step_of(drafted)]

    def _plan(self, wanted: list[_Candidate], running: list[Sequence]) -> NDArray[np.int32]:
        """Return how many tokens to draft for each candidate."""
        if not self._costs:
            return np.array([candidate.most for candidate in wanted], np.int32)
        rows = len(running)
        key = (rows, *[(running[one.row], one.source, one.most) for one in wanted])
        if self._planned and key == self._plan_key and not self._is_due_to_probe(self._planned):
            return self._planned.lengths
        rates = [self._rate(running[candidate.row], candidate.source).value for candidate in wanted]
        most = [candidate.most for candidate in wanted]
        by_model = [candidate.source == MODEL for candidate in wanted]
        draft, verify = self._costs.draft.row(rows), self._costs.verify.row(rows)
        idle = rows - len(wanted)  # rows that are not drafted for give one token whatever the others do
        plan = plan_lengths(rates, most, by_model, draft, verify, idle)
        self._plan_key, self._planned = key, plan
        if self._is_due_to_probe(plan):
            self._plain_rounds = 0
            probe = plan_lengths(rates, most, by_model, draft, verify, idle, probe=True)
            self._is_probe = self._probing_s >= probe.seconds - plan.seconds
            return probe.lengths if self._is_probe else plan.lengths
        return plan.lengths

    def _is_due_to_probe(self, plan: Plan) -> bool:
        return self._plain_rounds >= PROBE_ROUNDS and not plan.lengths.any()

    def _rate(self, sequence: Sequence, source: Source) -> AcceptanceRate:
        """Return a sequence's estimate, which begins as what others have shown."""
        rate = sequence.rates.get(source)
        if rate is None:
            rate = sequence.rates[source] = AcceptanceRate(self._rates[source].value)
        return rate

    def _learn(self, sequence: Sequence, source: Source, drafted: int, accepted: int) -> None:
        self._rate(sequence, source).update(drafted, accepted)
        self._rates[source].update(drafted, accepted)

    def _propose(self, running: list[Sequence], wanted: list[_Candidate], lengths: NDArray[np.int32]) -> Drafts:
        by_model = np.zeros_like(lengths)
        for candidate in wanted:
            self._sources[running[candidate.row]] = candidate.source
            if candidate.source == MODEL:
                by_model[candidate.row] = lengths[candidate.row]
        self._drop_unprepared(running, by_model, lengths)
        tokens = np.zeros((len(running), int(lengths.max())), np.int64)
        distributions: dict[int, list[Distribution]] = {}
        followed: Followed | None = None
        if self._drafter and by_model.any():
            self._asked_at = time.perf_counter()
            proposed, distributions, followed = self._drafter.propose(running, by_model)
            rows, longest = proposed.shape
            tokens[:rows, :longest] = proposed
            if self._costs and not followed:
                self._costs.draft.observe(rows, longest, time.perf_counter() - self._asked_at)
        for candidate in wanted:
            length = int(lengths[candidate.row])
            if candidate.source != MODEL and length:
                copied = running[candidate.row].lookup.propose(candidate.match, length)
                tokens[candidate.row, :length] = copied
                if running[candidate.row].by_rejection:
                    distributions[candidate.row] = [_certain(token) for token in copied]
        return Drafts(tokens, lengths, distributions, followed)

    def _drop_unprepared(
        self, running: list[Sequence], by_model: NDArray[np.int32], lengths: NDArray[np.int32]
    ) -> None:
        """Have the draft model take in what it lacks, and draft nothing where that is more than a round may cost."""
        if not by_model.any():
            return
        assert self._drafter is not None
        drafting = np.flatnonzero(by_model).tolist()
        able = self._drafter.fill({row: running[row].tokens for row in drafting})
        for row in drafting:
            if row not in able:
                by_model[row] = lengths[row] = 0


def most_copied(drafted: int) -> int:
    """Return how many tokens may be copied where the model may draft so many."""
    return min(COPIED * drafted, MAX_SPECULATION_LENGTH)


def _grade(match: Match) -> Source:
    """Return the source that copying after a match is."""
    return bisect_right(LEAST_MATCHES, match.length)


def _certain(token: int) -> Distribution:
    return Distribution(np.array([token]), np.ones(1))
