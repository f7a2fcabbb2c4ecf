"""
Who waits for which position or observation, and who is released by a new one.

Pure bookkeeping: `Waiter.wake` is whatever the driver gave, called once and never under a lock of
this module's user.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import count
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


_Entry = tuple[int, int, float, Waiter]


class PositionQueue:
    """
    Keep waiters by the position that they wait for, the least position first.

    An observation touches the waiters that it releases, not those that go on waiting.
    """

    __slots__ = ("_active", "_furthest", "_heaps", "_order", "_size")

    def __init__(self) -> None:
        self._heaps: dict[tuple[int, int], list[_Entry]] = {}
        self._furthest: dict[tuple[int, int], tuple[int, float]] = {}
        self._order = count()
        self._active = 0
        self._size = 0

    def __len__(self) -> int:
        return self._active

    def add(self, required: Position, waiter: Waiter, since: float = math.inf) -> None:
        """
        Let ``waiter`` wait until a server reaches ``required``, which the primary had at ``since``.
        """
        key = (required.system_id, required.timeline)
        heap = self._heaps.setdefault(key, [])
        heapq.heappush(heap, (required.lsn, next(self._order), since, waiter))
        if since < math.inf and required.lsn >= self._furthest.get(key, _NOWHERE)[0]:
            self._furthest[key] = (required.lsn, since)
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
        # Entries of those who gave up stay in the heap until they outnumber the rest: a replica
        # that is paused for hours must not make the heap grow for hours.
        if self._size > _COMPACT_ABOVE and self._size > 2 * self._active:
            self._keep(lambda entry: entry[3].active)

    def release(self, seen: Observation) -> list[Waiter]:
        """
        Take out and return the waiters whose position ``seen`` has reached.
        """
        if seen.lsn is None or seen.timeline is None:
            return []
        heap = self._heaps.get((seen.server.system_id, seen.timeline))
        released: list[Waiter] = []
        while heap and heap[0][0] <= seen.lsn:
            waiter = heapq.heappop(heap)[3]
            self._size -= 1
            if waiter.active:
                self._release(waiter, seen)
                released.append(waiter)
        return released

    def least(self, seen: Observation) -> Lsn | None:
        """
        Return the least position that is waited for on the timeline of ``seen``; None without one.
        """
        heap = self._heaps.get((seen.server.system_id, seen.timeline or 0), [])
        while heap and not heap[0][3].active:
            heapq.heappop(heap)
            self._size -= 1
        return Lsn(heap[0][0]) if heap else None

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
        heap = self._heaps.get((seen.server.system_id, seen.timeline or 0), [])
        ahead = [
            waiter
            for lsn, _, since, waiter in heap
            if waiter.active and lsn > reached and since <= seen.sent_at
        ]
        for waiter in ahead:
            self._release(waiter, seen)
        self._keep(lambda entry: entry[3].active)
        return ahead

    def release_all(self) -> list[Waiter]:
        """
        Take out and return everybody, without an observation.
        """
        waiting = [entry[3] for heap in self._heaps.values() for entry in heap if entry[3].active]
        for waiter in waiting:
            self._release(waiter, None)
        self._keep(lambda entry: False)
        return waiting

    def _release(self, waiter: Waiter, seen: Observation | None) -> None:
        waiter.active = False
        waiter.seen = seen
        self._active -= 1

    def _furthest_of(self, seen: Observation) -> tuple[int, float]:
        return self._furthest.get((seen.server.system_id, seen.timeline or 0), _NOWHERE)

    def _keep(self, wanted: Callable[[_Entry], bool]) -> None:
        heaps: dict[tuple[int, int], list[_Entry]] = {}
        for key, heap in self._heaps.items():
            if kept := [entry for entry in heap if wanted(entry)]:
                heapq.heapify(kept)
                heaps[key] = kept
        self._heaps = heaps
        self._furthest = {
            key: max((lsn, since) for lsn, _, since, _ in heap if since < math.inf)
            for key, heap in heaps.items()
            if any(since < math.inf for _, _, since, _ in heap)
        }
        self._size = sum(map(len, heaps.values()))


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
