"""
Who waits for which position or observation, and who is released by a new one.

Pure bookkeeping: `Waiter.wake` is whatever the driver gave, called once and never under a lock of
this module's user.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Final, Protocol

from lsn_consistency._observation import Observation
from lsn_consistency.lsn import Lsn, Position

_COMPACT_ABOVE: Final = 64
_NOWHERE: Final = (-1, math.inf)


class Queue(Protocol):
    """
    A place where waiters wait.
    """

    def discard(self, waiter: Waiter) -> None:
        """
        Forget a waiter that gave up; one that was released already is left alone.
        """


class Waiter:
    """
    Stand for one read, write or caller that waits; it is released once.

    ``seen`` is the observation that released it, None after a failure or a time-out. ``queue`` is
    where it waits.
    """

    __slots__ = ("active", "queue", "seen", "wake")

    def __init__(self, wake: Callable[[], object], queue: Queue) -> None:
        self.wake = wake
        self.queue = queue
        self.active = True
        self.seen: Observation | None = None


_Entry = tuple[float, Waiter]
_Key = tuple[int, int]


class PositionQueue:
    """
    Keep waiters by the position that they wait for, the least position first.

    An observation touches the waiters that it releases, not those that go on waiting.
    """

    __slots__ = ("_active", "_furthest", "_heaps", "_places", "_size")

    def __init__(self) -> None:
        # Each LSN is in the heap once, however many wait for it.
        self._heaps: dict[_Key, list[int]] = {}
        self._places: dict[_Key, dict[int, list[_Entry]]] = {}
        self._furthest: dict[_Key, tuple[int, float]] = {}
        self._active = 0
        self._size = 0

    def __len__(self) -> int:
        return self._active

    def add(self, required: Position, waiter: Waiter, since: float = math.inf) -> None:
        """
        Let ``waiter`` wait until a server reaches ``required``, which the primary had at ``since``.
        """
        system_id, timeline, lsn = required
        key = (system_id, timeline)
        places = self._places.get(key)
        if places is None:
            places, self._heaps[key] = self._places.setdefault(key, {}), []
        place = places.get(lsn)
        if place is None:
            place = places[lsn] = []
            heapq.heappush(self._heaps[key], lsn)
        place.append((since, waiter))
        if since < math.inf and lsn >= self._furthest.get(key, _NOWHERE)[0]:
            self._furthest[key] = (lsn, since)
        self._active += 1
        self._size += 1

    def discard(self, waiter: Waiter) -> None:
        """
        Forget a waiter that gave up; one that was released already is left alone.
        """
        if not waiter.active:
            return
        waiter.active = False
        self._active -= 1
        # Those who gave up keep their places until they outnumber the rest: a replica that is
        # paused for hours must not make the queue grow for hours.
        if self._size > _COMPACT_ABOVE and self._size > 2 * self._active:
            self._compact()

    def release(self, seen: Observation) -> list[Waiter]:
        """
        Take out and return the waiters whose position ``seen`` has reached.
        """
        if seen.lsn is None or seen.timeline is None:
            return []
        key = (seen.server.system_id, seen.timeline)
        heap = self._heaps.get(key)
        released: list[Waiter] = []
        while heap and heap[0] <= seen.lsn:
            place = self._places[key].pop(heapq.heappop(heap))
            self._size -= len(place)
            released += [waiter for _, waiter in place if waiter.active]
        self._release(released, seen)
        return released

    def least(self, seen: Observation) -> Lsn | None:
        """
        Return the least position that is waited for on the timeline of ``seen``; None without one.
        """
        key = (seen.server.system_id, seen.timeline or 0)
        heap = self._heaps.get(key, [])
        while heap and not any(waiter.active for _, waiter in self._places[key][heap[0]]):
            self._size -= len(self._places[key].pop(heapq.heappop(heap)))
        return Lsn(heap[0]) if heap else None

    def is_unconfirmed(self, seen: Observation) -> bool:
        """
        Tell whether a primary observed so may not have had the furthest position yet.
        """
        lsn, since = self._furthest_of(seen)
        return self._active > 0 and seen.lsn is not None and seen.lsn < lsn and seen.sent_at < since

    def release_ahead(self, seen: Observation) -> list[Waiter]:
        """
        Take out and return the waiters for what the primary, seen afterwards, does not have.

        All are looked at only when there is one for certain: never while nothing was lost.
        """
        lsn, since = self._furthest_of(seen)
        reached = seen.lsn
        if reached is None or reached >= lsn or seen.sent_at < since:
            return []
        places = self._places.get((seen.server.system_id, seen.timeline or 0), {})
        ahead = [
            waiter
            for lsn, place in places.items()
            for since, waiter in place
            if waiter.active and lsn > reached and since <= seen.sent_at
        ]
        self._release(ahead, seen)
        self._compact()
        return ahead

    def release_all(self) -> list[Waiter]:
        """
        Take out and return everybody, without an observation.
        """
        every = [place for places in self._places.values() for place in places.values()]
        waiting = [waiter for place in every for _, waiter in place if waiter.active]
        self._release(waiting, None)
        self._compact()
        return waiting

    def _release(self, waiters: list[Waiter], seen: Observation | None) -> None:
        for waiter in waiters:
            waiter.active = False
            waiter.seen = seen
        self._active -= len(waiters)

    def _furthest_of(self, seen: Observation) -> tuple[int, float]:
        return self._furthest.get((seen.server.system_id, seen.timeline or 0), _NOWHERE)

    def _compact(self) -> None:
        # Keep those who wait, and nothing of the others.
        self._places, self._heaps, self._furthest = (
            {key: kept for key, places in self._places.items() if (kept := _waiting_at(places))},
            {},
            {},
        )
        self._size = self._active
        for key, places in self._places.items():
            self._heaps[key] = list(places)
            heapq.heapify(self._heaps[key])
            known = [(lsn, since) for lsn, place in places.items() for since, _ in place]
            if known := [each for each in known if each[1] < math.inf]:
                self._furthest[key] = max(known)


def _waiting_at(places: dict[int, list[_Entry]]) -> dict[int, list[_Entry]]:
    active = {lsn: [entry for entry in place if entry[1].active] for lsn, place in places.items()}
    return {lsn: place for lsn, place in active.items() if place}


class ObservationQueue:
    """
    Keep the waiters of one node that need an observation made after a given time.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: dict[Waiter, float] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, after: float, waiter: Waiter) -> None:
        """
        Let ``waiter`` wait for an observation sent at or after ``after``.
        """
        self._waiting[waiter] = after

    def discard(self, waiter: Waiter) -> None:
        """
        Forget a waiter that gave up; one that was released already is left alone.
        """
        waiter.active = False
        self._waiting.pop(waiter, None)

    def release(self, seen: Observation) -> list[Waiter]:
        """
        Take out and return the waiters that ``seen`` is late enough for.
        """
        released = [waiter for waiter, after in self._waiting.items() if after <= seen.sent_at]
        for waiter in released:
            del self._waiting[waiter]
            waiter.active = False
            waiter.seen = seen
        return released

    def release_all(self) -> list[Waiter]:
        """
        Take out and return everybody, without an observation: the node failed.
        """
        released = list(self._waiting)
        self._waiting = {}
        for waiter in released:
            waiter.active = False
        return released


class TurnQueue:
    """
    Keep waiters in the order in which they came.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: dict[Waiter, None] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, waiter: Waiter) -> None:
        """
        Let ``waiter`` wait for its turn.
        """
        self._waiting[waiter] = None

    def discard(self, waiter: Waiter) -> None:
        """
        Forget a waiter that gave up; one that was released already is left alone.
        """
        waiter.active = False
        self._waiting.pop(waiter, None)

    def release_first(self) -> Waiter | None:
        """
        Take out and return who has waited longest.
        """
        for waiter in self._waiting:
            self.discard(waiter)
            return waiter
        return None
