"""The scheduler: first come, first served, contiguous slots, and moves that keep every sequence's slot its own."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from speculative_decoding.options import GenerationOptions
from speculative_decoding.scheduler import QueueFullError, Scheduler
from speculative_decoding.sequence import Sequence

SLOTS, MAX_WAITING = 3, 4


def sequence(priority: int = 0) -> Sequence:
    return Sequence([1], GenerationOptions(priority=priority), lambda *event: None, frozenset())


class SlotsStayTrue(RuleBasedStateMachine):
    """Any order of arrivals, prefills and departures, beside a mirror of what the models' slots hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(SLOTS, MAX_WAITING)
        self.contents: dict[int, Sequence] = {}  # slot -> whose keys and values a model has there
        self.arrived: list[Sequence] = []
        self.prefilled: list[Sequence] = []
        self.gone: set[Sequence] = set()

    @rule(priority=st.integers(1, 3), count=st.integers(1, 3))
    def arrive(self, priority: int, count: int) -> None:
        newcomers, waiting = [sequence(priority) for _ in range(count)], self.scheduler.waiting
        if waiting + count <= MAX_WAITING + SLOTS - len(self.scheduler.in_slots()):
            self.scheduler.add(*newcomers)
            self.arrived += newcomers
        else:
            with pytest.raises(QueueFullError, match=f"{MAX_WAITING} requests are waiting"):
                self.scheduler.add(*newcomers)
            assert self.scheduler.waiting == waiting

    @rule(most=st.integers(1, SLOTS))
    def prefill(self, most: int) -> None:
        begun, line = list(self.scheduler.prefilling), self.scheduler.everyone()[len(self.scheduler.in_slots()) :]
        room = min(most - len(begun), SLOTS - len(self.scheduler.in_slots()))
        newcomers = line[: max(0, room)]
        assert self.scheduler.next_prefills(most) == [*begun, *newcomers][:most]
        for newcomer in newcomers:
            self.prefilled.append(newcomer)
            self.contents[self.scheduler.in_slots().index(newcomer)] = newcomer

    @precondition(lambda self: self.scheduler.prefilling)
    @rule(data=st.data())
    def start_decoding(self, data: st.DataObject) -> None:
        self.scheduler.start_decoding(data.draw(st.integers(1, len(self.scheduler.prefilling))))

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
        in_slots = [*self.scheduler.running, *self.scheduler.prefilling]
        assert self.contents == dict(enumerate(in_slots))
        assert len(in_slots) <= SLOTS

    @invariant()
    def nobody_is_lost_or_doubled(self) -> None:
        everyone = self.scheduler.everyone()
        assert len(set(everyone)) == len(everyone)
        assert set(everyone) == set(self.arrived) - self.gone
        assert self.scheduler.idle == (not everyone)

    @invariant()
    def within_a_level_who_came_first_is_prefilled_first(self) -> None:
        for level in (1, 2, 3):
            order = [self.arrived.index(one) for one in self.prefilled if one.options.priority == level]
            assert order == sorted(order)

    @invariant()
    def who_waits_is_in_order_of_level(self) -> None:
        levels = [one.options.priority for one in self.scheduler.everyone()[len(self.scheduler.in_slots()) :]]
        assert levels == sorted(levels)


SlotsStayTrue.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSlotsStayTrue = SlotsStayTrue.TestCase


def test_a_lower_level_is_served_before_a_higher_one_and_first_come_first_served_within() -> None:
    scheduler = Scheduler(SLOTS, MAX_WAITING)
    levels = [3, 1, 2, 1]
    waiting = [sequence(level) for level in levels]
    scheduler.add(*waiting)
    served = []
    while prefilling := scheduler.next_prefills(1):
        [chosen] = prefilling
        served.append(waiting.index(chosen))
        scheduler.remove(chosen)
    assert served == [1, 3, 2, 0]


def test_nobody_is_let_in_beyond_the_capacity_and_nobody_overtakes_who_does_not_fit() -> None:
    sizes = {sequence(): size for size in (6, 5, 1)}
    scheduler = Scheduler(SLOTS, MAX_WAITING, capacity=10, size=sizes.__getitem__)
    scheduler.add(*sizes)
    first, second, third = sizes
    assert scheduler.next_prefills(3) == [first]
    assert scheduler.next_prefills(3) == [first]
    scheduler.start_decoding(1)
    assert scheduler.next_prefills(1) == []
    scheduler.remove(first)
    for expected in (second, third):
        assert scheduler.next_prefills(1) == [expected]
        scheduler.start_decoding(1)


def test_with_no_queue_there_is_room_for_as_many_as_there_are_slots() -> None:
    scheduler = Scheduler(SLOTS, 0)
    scheduler.add(*(sequence() for _ in range(SLOTS)))
    with pytest.raises(QueueFullError):
        scheduler.add(sequence())
    assert scheduler.waiting == SLOTS
