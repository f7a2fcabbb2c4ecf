"""The queues of waiters against naive models: who is released, what is kept, what it costs."""

from __future__ import annotations

import heapq
import math
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
moments = st.one_of(st.integers(0, 20).map(float), st.just(math.inf))


def observed(
    lsn: int | None, system: int = 7, timeline: int | None = 1, at: float = 0.0
) -> Observation:
    """Observe a replica."""
    place = Server(system, "a", 5432, "1")
    return Observation(place, True, timeline, None if lsn is None else Lsn(lsn), at, at)


def nothing() -> None:
    """Wake nobody."""


def held(queue: PositionQueue) -> int:
    """Count the entries of those who wait and of those who gave up."""
    places = [place for places in queue._places.values() for place in places.values()]
    assert sum(map(len, queue._heaps.values())) == len(places)
    return sum(map(len, places))


@dataclass
class Waiting:
    """Hold what the models remember of each waiter, in the order in which they came."""

    positions: list[tuple[Position, Waiter]] = field(default_factory=list)
    since: dict[int, float] = field(default_factory=dict)
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

    @rule(
        system=systems,
        timeline=timelines,
        lsn=lsns,
        since=moments,
        count=st.sampled_from((1, 1, 90)),
    )
    def wait_for_position(
        self, system: int, timeline: int, lsn: int, since: float, count: int
    ) -> None:
        for _ in range(count):
            waiter = Waiter(nothing, self.positions)
            required = Position(system, timeline, Lsn(lsn))
            self.positions.add(required, waiter, since)
            self.model.positions.append((required, waiter))
            self.model.since[id(waiter)] = since

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

    @rule(
        system=systems,
        timeline=st.sampled_from((1, 2, None)),
        lsn=st.none() | lsns,
        at=st.integers(0, 25),
    )
    def fall_short(self, system: int, timeline: int | None, lsn: int | None, at: int) -> None:
        """The primary is observed: whoever waits for more than it had, by then, waits in vain."""
        seen = observed(lsn, system, timeline, float(at))
        vain = self.in_vain(seen)
        unsure = self.positions.is_unconfirmed(seen)
        released = self.positions.release_ahead(seen)
        # One who asked later may still hope, and may have been further: then nobody is looked at.
        assert set(map(id, released)) <= set(map(id, vain))
        assert released or not vain or unsure
        if at > 20:
            # Later than every read began.
            assert not unsure
            assert len(vain) == len(released)
        self.expect(released, released, seen)
        assert not self.in_vain(seen) or unsure

    def in_vain(self, seen: Observation) -> list[Waiter]:
        return [
            waiter
            for required, waiter in self.model.positions
            if (required.system_id, required.timeline) == (seen.server.system_id, seen.timeline)
            and seen.reaches(required) is False
            and self.model.since[id(waiter)] <= seen.sent_at
        ]

    @rule()
    def begin_anew(self) -> None:
        expected = [waiter for _, waiter in self.model.positions]
        self.expect(expected, self.positions.release_all(), None)

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
        assert held(self.positions) <= max(_waiters._COMPACT_ABOVE, 2 * len(self.positions))


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
        most = max(most, held(queue))
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


def test_many_who_wait_for_one_position_cost_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a write that many read, all are released by one step of the heap, in their order."""
    queue = PositionQueue()
    waiters = [Waiter(nothing, queue) for _ in range(10_000)]
    for waiter in waiters:
        queue.add(Position(7, 1, Lsn(5)), waiter)
    queue.discard(waiters[1])
    popped: list[Any] = []
    heappop = heapq.heappop

    def counted(heap: list[Any]) -> Any:
        popped.append(1)
        return heappop(heap)

    monkeypatch.setattr(heapq, "heappop", counted)
    assert [waiters[0], *waiters[2:]] == queue.release(observed(5))
    assert [1] == popped
    assert 0 == len(queue)


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


# What the primary does not have


class Watched(dict[int, Any]):
    """Count how often all places of a queue are looked at."""

    looks = 0

    def items(self) -> Any:
        Watched.looks += 1
        return super().items()


def test_nobody_is_looked_at_while_nothing_is_lost() -> None:
    """Every probe of the primary comes by here: ten thousand who wait cost it nothing."""
    queue = PositionQueue()
    for lsn in range(10_000):
        queue.add(Position(7, 1, Lsn(lsn)), Waiter(nothing, queue), float(lsn))
    queue._places = {key: Watched(places) for key, places in queue._places.items()}
    Watched.looks = 0
    none_lost = ((9_999, 20_000.0), (50_000, 20_000.0), (5, 9_998.0), (None, 20_000.0))
    for reached, at in none_lost:
        assert [] == queue.release_ahead(observed(reached, at=at))
    for elsewhere in (observed(5, 8, at=2e4), observed(5, 7, 2, 2e4), observed(5, 7, None, 2e4)):
        assert [] == queue.release_ahead(elsewhere)
    assert 0 == Watched.looks
    assert 9_994 == len(queue.release_ahead(observed(5, at=9_999.0)))
    assert Watched.looks > 0
    assert 6 == len(queue)


def test_who_gave_up_is_looked_for_once() -> None:
    """A furthest position that nobody waits for any more does not make every probe look."""
    queue = PositionQueue()
    waiters = [Waiter(nothing, queue) for _ in range(3)]
    for lsn, waiter in zip((10, 20, 30), waiters, strict=True):
        queue.add(Position(7, 1, Lsn(lsn)), waiter, 1.0)
    queue.discard(waiters[2])
    assert [waiters[1]] == queue.release_ahead(observed(15, at=2.0))
    queue._places = {key: Watched(places) for key, places in queue._places.items()}
    Watched.looks = 0
    assert [] == queue.release_ahead(observed(15, at=3.0))
    assert 0 == Watched.looks
    assert [waiters[0]] == queue.release(observed(10))


@pytest.mark.parametrize(
    ("lsn", "at", "released", "unconfirmed"),
    [
        (99, 4.9, False, True),
        (99, 5.0, True, False),
        (100, 4.9, False, False),
        (100, 5.0, False, False),
        (None, 4.9, False, False),
        (None, 5.0, False, False),
    ],
)
def test_the_fences_of_what_is_lost(
    lsn: int | None, at: float, released: bool, unconfirmed: bool
) -> None:
    """One byte short is short, and the moment in which the read began is late enough."""
    queue = PositionQueue()
    waiter = Waiter(nothing, queue)
    queue.add(Position(7, 1, Lsn(100)), waiter, 5.0)
    seen = observed(lsn, at=at)
    assert unconfirmed is queue.is_unconfirmed(seen)
    assert ([waiter] if released else []) == queue.release_ahead(seen)
    assert released is (waiter.seen is seen)
    assert released is not waiter.active


def test_one_who_knows_no_moment_is_never_released_in_vain() -> None:
    """Without ``since`` nothing is known of the primary: only a server that has it releases."""
    queue = PositionQueue()
    lasting, other = Waiter(nothing, queue), Waiter(nothing, queue)
    queue.add(Position(7, 1, Lsn(100)), lasting)
    assert not queue.is_unconfirmed(observed(5, at=1.0))
    queue.add(Position(7, 1, Lsn(50)), other, 2.0)
    assert queue.is_unconfirmed(observed(5, at=1.0))
    assert [other] == queue.release_ahead(observed(5, at=3.0))
    assert not queue.is_unconfirmed(observed(5, at=1.0))
    assert [] == queue.release_ahead(observed(5, at=3.0))
    assert [lasting] == queue.release(observed(100))


def test_nobody_is_unconfirmed_where_nobody_waits() -> None:
    """The primary is not probed for those who are gone."""
    queue = PositionQueue()
    waiter = Waiter(nothing, queue)
    queue.add(Position(7, 1, Lsn(100)), waiter, 5.0)
    queue.discard(waiter)
    assert not queue.is_unconfirmed(observed(5, at=1.0))
    again = Waiter(nothing, queue)
    queue.add(Position(7, 1, Lsn(100)), again, 5.0)
    assert queue.is_unconfirmed(observed(5, at=1.0))
    assert [again] == queue.release_all()
    assert not queue.is_unconfirmed(observed(5, at=1.0))
    assert (None, False, 0) == (again.seen, again.active, len(queue))
    assert [] == queue.release_all()
