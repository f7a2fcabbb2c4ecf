"""
How a read or a write waits for a waiter to be released: a thread, or a task.

And how a task does to its end what a cancellation must not cut off.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Coroutine, Generator
from contextvars import Context
from types import coroutine
from typing import Any, Final, Self

from lsn_consistency._core import Core
from lsn_consistency._observation import Observation
from lsn_consistency._waiters import Waiter

_TICKS_A_SECOND: Final = 1000


def wait(core: Core, waiter: Waiter, event: threading.Event, seconds: float) -> None:
    """
    Wait until a waiter sets its event, for some seconds at most; then its place is given up.
    """
    try:
        event.wait(max(0.0, seconds))
    finally:
        core.cluster.give_up(waiter)


class AsyncWaiting(asyncio.Future[Observation | None]):
    """
    Be awaited until a waiter is released, for some seconds at most; then its place is given up.
    """

    __slots__ = ("_core", "_due", "waiter")

    def __init__(self, core: Core) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self._core = core
        self._due: _Due | None = None
        self.waiter: Waiter | None = None

    def within(self, seconds: float, deadlines: Deadlines) -> Self:
        """
        End after so many seconds, unless that has happened already.
        """
        if not self.done():
            self._due = deadlines.after(seconds)
            self._due.waits.add(self)
        return self

    def end(self) -> None:
        """
        Wake who awaits this, with the observation that released it or None.
        """
        if not self.done():
            self._leave()
            self.set_result(None if self.waiter is None else self.waiter.seen)

    def cancel(self, msg: Any = None) -> bool:
        """
        Give up the place of a task that is cancelled.
        """
        if not self.done():
            self._leave()
        return super().cancel(msg)

    def _leave(self) -> None:
        if self._due is not None:
            self._due.discard(self)
        if self.waiter is not None and self.waiter.active:
            self._core.cluster.give_up(self.waiter)


class Deadlines:
    """
    End waits when their time is over, with one timer for all that end in the same millisecond.

    So a wait ends a millisecond late at most, to which an event loop rounds its waits up anyway.
    """

    __slots__ = ("_context", "_due")

    def __init__(self) -> None:
        # A timer reads nothing of its context: a copy for each would take memory.
        self._context = Context()
        self._due: dict[int, _Due] = {}

    def after(self, seconds: float) -> _Due:
        """
        Return what ends in so many seconds.
        """
        loop = asyncio.get_running_loop()
        tick = math.ceil((loop.time() + max(0.0, seconds)) * _TICKS_A_SECOND)
        due = self._due.get(tick)
        if due is None:
            due = self._due[tick] = _Due(self._due, tick)
            at = tick / _TICKS_A_SECOND
            due.timer = loop.call_at(at, due.end, context=self._context)
        return due


class _Due:
    __slots__ = ("_every", "_tick", "timer", "waits")

    def __init__(self, every: dict[int, _Due], tick: int) -> None:
        self._every = every
        self._tick = tick
        self.timer: asyncio.TimerHandle | None = None
        self.waits: set[AsyncWaiting] = set()

    def discard(self, waiting: AsyncWaiting) -> None:
        self.waits.discard(waiting)
        if not self.waits and self.timer is not None:
            self.timer.cancel()
            self._every.pop(self._tick, None)

    def end(self) -> None:
        for waiting in list(self.waits):
            waiting.end()


class Gathering:
    """
    Let many tasks await observations of one node, with one waiter and one timer for all of them.

    Each gets an observation that was sent at its time or later; None when the node fails, or after
    ``seconds``. What a task costs is a future: one that is cancelled is merely passed over.
    """

    __slots__ = ("_context", "_core", "_name", "_seconds", "_timer", "_waiter", "_waiting")

    def __init__(self, core: Core, name: str, seconds: float) -> None:
        self._context = Context()
        self._core = core
        self._name = name
        self._seconds = seconds
        self._waiting: list[tuple[float, float, asyncio.Future[Observation | None]]] = []
        self._waiter: Waiter | None = None
        self._timer: asyncio.TimerHandle | None = None

    def join(self, after: float) -> asyncio.Future[Observation | None]:
        """
        Return what gives the first observation sent at ``after`` or later.
        """
        loop = asyncio.get_running_loop()
        awaited: asyncio.Future[Observation | None] = loop.create_future()
        self._waiting.append((after, loop.time() + self._seconds, awaited))
        if self._waiter is None:
            self._wait(loop)
        return awaited

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        # They all wait equally long: the first one's time is the first to end.
        after, ends, _ = self._waiting[0]
        self._waiter = self._core.cluster.wait_for_observation(self._name, after, self._woken)
        self._timer = loop.call_at(ends, self._expired, loop, context=self._context)

    def _woken(self) -> None:
        assert self._waiter is not None
        assert self._timer is not None
        self._timer.cancel()
        seen = self._waiter.seen
        self._release(seen, math.inf if seen is None else seen.sent_at, -math.inf)

    def _expired(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._waiter is not None
        self._core.cluster.give_up(self._waiter)
        self._release(None, -math.inf, loop.time())

    def _release(self, seen: Observation | None, sent_at: float, now: float) -> None:
        waiting, self._waiting, self._waiter = self._waiting, [], None
        for each in waiting:
            after, ends, awaited = each
            if awaited.done():
                continue
            if after <= sent_at or ends <= now:
                awaited.set_result(seen)
            else:
                self._waiting.append(each)
        if self._waiting:
            self._wait(self._waiting[0][2].get_loop())


async def known(seen: Observation | None) -> Observation | None:
    """
    Return what nobody has to wait for.
    """
    return seen


async def whole(work: Coroutine[Any, Any, None]) -> None:
    """
    Carry out ``work`` to its end, even if the task that awaits this is cancelled.

    What needs no waiting is done at once, and only the rest takes a task of its own. ``work`` must
    not care which task it runs in, as a time limit does.
    """
    try:
        awaited = work.send(None)
    except StopIteration:
        return
    await asyncio.shield(_rest(work, awaited))


@coroutine
def _rest(work: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    # What an awaitable yields is for the task that runs it; each answer goes back into ``work``.
    try:
        while True:
            try:
                answer = yield awaited
            except BaseException as error:
                awaited = work.throw(error)
            else:
                awaited = work.send(answer)
    except StopIteration:
        return
