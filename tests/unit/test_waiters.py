"""The three queues, one promise at a time; the sequences are in the properties."""

from __future__ import annotations

from lsn_consistency import Position
from lsn_consistency._observation import Observation, Server
from lsn_consistency._waiters import ObservationQueue, PositionQueue, TurnQueue, Waiter
from lsn_consistency.lsn import Lsn


def observed(lsn: int | None = 10, timeline: int | None = 1, at: float = 0.0) -> Observation:
    known = None if lsn is None else Lsn(lsn)
    return Observation(Server(7, "a", 5432, "1"), True, timeline, known, at, at)


def nothing() -> None:
    """Wake nobody."""


def test_a_position_is_reached_at_itself() -> None:
    """Exactly the position releases, one less does not, and each is released once."""
    queue = PositionQueue()
    waiter = Waiter(nothing, queue)
    queue.add(Position(7, 1, Lsn(10)), waiter)
    assert [] == queue.release(observed(9))
    seen = observed(10)
    assert [waiter] == queue.release(seen)
    assert waiter.seen is seen
    assert [] == queue.release(seen)
    assert not queue


def test_unknown_releases_nobody() -> None:
    """NULL, and another timeline, is not reached."""
    queue = PositionQueue()
    queue.add(Position(7, 1, Lsn(10)), Waiter(nothing, queue))
    for seen in (observed(None), observed(99, None), observed(99, 2)):
        assert [] == queue.release(seen)
    assert len(queue) == 1


def test_giving_up_twice_counts_once() -> None:
    """Also after the release."""
    queue = PositionQueue()
    first, second = Waiter(nothing, queue), Waiter(nothing, queue)
    for waiter in (first, second):
        queue.add(Position(7, 1, Lsn(10)), waiter)
    queue.discard(first)
    queue.discard(first)
    assert len(queue) == 1
    assert [second] == queue.release(observed())
    queue.discard(second)
    assert len(queue) == 0


def test_an_observation_is_late_enough_at_its_time() -> None:
    """Sent at the very moment counts, before does not."""
    queue = ObservationQueue()
    waiter = Waiter(nothing, queue)
    queue.add(5.0, waiter)
    assert [] == queue.release(observed(at=4.9))
    assert [waiter] == queue.release(observed(at=5.0))
    assert not waiter.active


def test_turns_come_in_order() -> None:
    """Who has waited longest is first; who gave up is passed over."""
    queue = TurnQueue()
    waiters = [Waiter(nothing, queue) for _ in range(3)]
    for waiter in waiters:
        queue.add(waiter)
    queue.discard(waiters[0])
    assert [waiters[1], waiters[2], None] == [queue.release_first() for _ in range(3)]
