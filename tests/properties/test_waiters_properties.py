"""The queues of waiters against naive models: who is released, what is kept, what it costs."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lsn_consistency import Position, _waiters
from lsn_consistency._observation import Observation, Server
from lsn_consistency._waiters import ObservationQueue, PositionQueue, TurnQueue, Waiter
from lsn_consistency.lsn import Lsn

systems = st.sampled_from((7, 8))
timelines = st.sampled_from((1, 2))
lsns = st.integers(0, 20)


def observed(
    lsn: int | None, system: int = 7, timeline: int | None = 1, at: float = 0.0
) -> Observation:
    """Observe a replica."""
    place = Server(system, "a", 5432, "1")
    return Observation(place, True, timeline, None if lsn is None else Lsn(lsn), at, at)


def nothing() -> None:
    """Wake nobody."""


@dataclass
class Waiting:
    """Hold what the models remember of each waiter, in the order in which they came."""

    positions: list[tuple[Position, Waiter]] = field(default_factory=list)
    observations: list[tuple[float, Waiter]] = field(default_factory=list)
    turns: list[Waiter] = field(default_factory=list)
    gone: list[Waiter] = field(default_factory=list)


class QueueMachine(RuleBasedStateMachine):
    """
    Add, give up and release in any order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.positions = PositionQueue()
        self.observations = ObservationQueue()
        self.turns = TurnQueue()
        self.model = Waiting()

    @rule(system=systems, timeline=timelines, lsn=lsns, count=st.sampled_from((1, 1, 90)))
    def wait_for_position(self, system: int, timeline: int, lsn: int, count: int) -> None:
        for _ in range(count):
            waiter = Waiter(nothing, self.positions)
            required = Position(system, timeline, Lsn(lsn))
            self.positions.add(required, waiter)
            self.model.positions.append((required, waiter))

    @rule(after=lsns)
    def wait_for_observation(self, after: int) -> None:
        waiter = Waiter(nothing, self.observations)
        self.observations.add(after, waiter)
        self.model.observations.append((after, waiter))

    @rule()
    def wait_for_turn(self) -> None:
        waiter = Waiter(nothing, self.turns)
        self.turns.add(waiter)
        self.model.turns.append(waiter)

    @rule(index=st.integers(0, 200), count=st.sampled_from((1, 1, 80)))
    def give_up(self, index: int, count: int) -> None:
        """Giving up twice, or after the release, changes nothing."""
        for number in range(count):
            model = self.model
            every = [w for _, w in model.positions] + [w for _, w in model.observations]
            every += model.turns + model.gone[-5:]
            if not every:
                return
            waiter = every[(index + number) % len(every)]
            waiter.queue.discard(waiter)
            self.forget([waiter])

    @rule(system=systems, timeline=st.sampled_from((1, 2, None)), lsn=st.none() | lsns)
    def reach(self, system: int, timeline: int | None, lsn: int | None) -> None:
        seen = observed(lsn, system, timeline)
        expected = [w for required, w in self.model.positions if seen.reaches(required) is True]
        self.expect(expected, self.positions.release(seen), seen)

    @rule(at=lsns)
    def observe(self, at: int) -> None:
        seen = observed(1, at=at)
        expected = [waiter for after, waiter in self.model.observations if at >= after]
        self.expect(expected, self.observations.release(seen), seen)

    @rule()
    def fail(self) -> None:
        expected = [waiter for _, waiter in self.model.observations]
        self.expect(expected, self.observations.release_all(), None)

    @rule()
    def take_turn(self) -> None:
        first = self.turns.release_first()
        assert first is (self.model.turns[0] if self.model.turns else None)
        if first is not None:
            self.expect([first], [first], None)

    def expect(
        self, expected: list[Waiter], released: list[Waiter], seen: Observation | None
    ) -> None:
        assert sorted(map(id, expected)) == sorted(map(id, released))
        assert [seen] * len(released) == [waiter.seen for waiter in released]
        self.forget(released)

    def forget(self, waiters: list[Waiter]) -> None:
        gone = set(map(id, waiters))
        model = self.model
        model.positions = [each for each in model.positions if id(each[1]) not in gone]
        model.observations = [each for each in model.observations if id(each[1]) not in gone]
        model.turns = [each for each in model.turns if id(each) not in gone]
        model.gone += waiters
        assert not any(waiter.active for waiter in waiters)

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.model.positions) == len(self.positions)
        assert len(self.model.observations) == len(self.observations)
        assert len(self.model.turns) == len(self.turns)

    @invariant()
    def those_who_wait_are_active(self) -> None:
        model = self.model
        waiting = [w for _, w in model.positions] + [w for _, w in model.observations]
        assert all(waiter.active for waiter in waiting + model.turns)

    @invariant()
    def memory_follows_those_who_wait(self) -> None:
        held = sum(map(len, self.positions._heaps.values()))
        assert held <= max(_waiters._COMPACT_ABOVE, 2 * len(self.positions))


TestQueues = QueueMachine.TestCase
TestQueues.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestQueues = pytest.mark.timeout(120)(TestQueues)


def test_the_least_position_is_released_first() -> None:
    """Those who wait for the least position are woken first, and equals in their order."""
    queue = PositionQueue()
    waiters = [Waiter(nothing, queue) for _ in range(4)]
    for lsn, waiter in zip((30, 10, 20, 10), waiters, strict=True):
        queue.add(Position(7, 1, Lsn(lsn)), waiter)
    assert [waiters[1], waiters[3], waiters[2]] == queue.release(observed(29))
    assert [waiters[0]] == queue.release(observed(30))


def test_memory_is_bounded_while_a_replica_is_paused_for_ever() -> None:
    """A million waits that time out while nothing is replayed leave nothing behind."""
    queue = PositionQueue()
    lasting = Waiter(nothing, queue)
    queue.add(Position(7, 1, Lsn(5)), lasting)
    most = 0
    for lsn in range(20_000):
        waiter = Waiter(nothing, queue)
        queue.add(Position(7, 1 + lsn % 3, Lsn(10 + lsn)), waiter)
        queue.discard(waiter)
        most = max(most, sum(map(len, queue._heaps.values())))
    assert most <= _waiters._COMPACT_ABOVE + 1
    assert [lasting] == queue.release(observed(5))


def test_a_release_touches_only_the_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """An observation that releases three of ten thousand looks at three."""
    queue = PositionQueue()
    for lsn in range(10_000):
        queue.add(Position(7, 1, Lsn(lsn)), Waiter(nothing, queue))
    popped: list[Any] = []
    heappop = heapq.heappop

    def counted(heap: list[Any]) -> Any:
        popped.append(1)
        return heappop(heap)

    monkeypatch.setattr(heapq, "heappop", counted)
    assert len(queue.release(observed(2))) == 3
    assert len(popped) == 3
    assert queue.release(observed(2)) == []
    assert len(popped) == 3


def test_giving_up_costs_little_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand who wait and give up one after the other do not rebuild the heap each time."""
    queue = PositionQueue()
    rebuilt: list[int] = []
    heapify = heapq.heapify

    def counted(heap: list[Any]) -> None:
        rebuilt.append(len(heap))
        heapify(heap)

    monkeypatch.setattr(heapq, "heapify", counted)
    waiters = [Waiter(nothing, queue) for _ in range(10_000)]
    for lsn, waiter in enumerate(waiters):
        queue.add(Position(7, 1, Lsn(lsn)), waiter)
    for waiter in waiters:
        queue.discard(waiter)
    assert sum(rebuilt) <= 10_000
    assert len(queue) == 0
