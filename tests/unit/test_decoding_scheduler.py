"""The scheduler: first come, first served, contiguous slots, and moves that keep every sequence's slot its own."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from speculative_decoding.options import GenerationOptions
from speculative_decoding.scheduler import QueueFullError, Scheduler
from speculative_decoding.sequence import Sequence

SLOTS, MAX_WAITING = 3, 4


def sequence() -> Sequence:
    return Sequence([1], GenerationOptions(), lambda *event: None)


class SlotsStayTrue(RuleBasedStateMachine):
    """Any order of arrivals, prefills and departures, beside a mirror of what the models' slots hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(SLOTS, MAX_WAITING)
        self.contents: dict[int, Sequence] = {}  # slot -> whose keys and values a model has there
        self.arrived: list[Sequence] = []
        self.prefilled: list[Sequence] = []
        self.gone: set[Sequence] = set()

    @rule()
    def arrive(self) -> None:
        newcomer, waiting = sequence(), len(self.scheduler.waiting)
        if waiting < MAX_WAITING:
            self.scheduler.add(newcomer)
            self.arrived.append(newcomer)
        else:
            with pytest.raises(QueueFullError, match=f"{MAX_WAITING} requests are waiting"):
                self.scheduler.add(newcomer)
            assert len(self.scheduler.waiting) == waiting

    @rule()
    def prefill(self) -> None:
        free = len(self.scheduler.running) < SLOTS
        before, line = self.scheduler.prefilling, list(self.scheduler.waiting)
        chosen = self.scheduler.next_prefill()
        assert chosen is (before or (line[0] if line and free else None))
        if chosen and chosen is not before:
            self.prefilled.append(chosen)
            self.contents[len(self.scheduler.running)] = chosen

    @precondition(lambda self: self.scheduler.prefilling)
    @rule()
    def start_decoding(self) -> None:
        self.scheduler.start_decoding()

    @precondition(lambda self: self.scheduler.everyone())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        leaver = data.draw(st.sampled_from(self.scheduler.everyone()))
        slots = [slot for slot, owner in self.contents.items() if owner is leaver]
        for source, destination in self.scheduler.remove(leaver):
            self.contents[destination] = self.contents.pop(source)
            assert source != destination
        for slot in slots:
            if self.contents.get(slot) is leaver:
                del self.contents[slot]
        self.gone.add(leaver)

    @rule()
    def clear(self) -> None:
        everyone = self.scheduler.everyone()
        assert self.scheduler.clear() == everyone
        self.contents.clear()
        self.gone.update(everyone)

    @invariant()
    def each_slot_holds_its_sequence(self) -> None:
        in_slots = [*self.scheduler.running, *([self.scheduler.prefilling] if self.scheduler.prefilling else [])]
        assert self.contents == dict(enumerate(in_slots))
        assert len(in_slots) <= SLOTS

    @invariant()
    def nobody_is_lost_or_doubled(self) -> None:
        everyone = self.scheduler.everyone()
        assert len(set(everyone)) == len(everyone)
        assert set(everyone) == set(self.arrived) - self.gone
        assert self.scheduler.idle == (not everyone)

    @invariant()
    def who_came_first_is_prefilled_first(self) -> None:
        order = [self.arrived.index(chosen) for chosen in self.prefilled]
        assert order == sorted(order)


SlotsStayTrue.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSlotsStayTrue = SlotsStayTrue.TestCase
