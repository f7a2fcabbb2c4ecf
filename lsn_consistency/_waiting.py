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
from typing import Any, Self

from lsn_consistency._core import Core
from lsn_consistency._observation import Observation
from lsn_consistency._waiters import Waiter


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

    __slots__ = ("_core", "_timer", "waiter")

    def __init__(self, core: Core) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self._core = core
        self._timer: asyncio.TimerHandle | None = None
        self.waiter: Waiter | None = None

    def within(self, seconds: float, context: Context) -> Self:
        """
        End after so many seconds, unless that has happened already.

        ``context`` is the timer's, which reads nothing of it: a copy for each would take memory.
        """
        if not self.done():
            wake = self.end if self.waiter is None else self.waiter.wake
            loop = self.get_loop()
            self._timer = loop.call_at(loop.time() + max(0.0, seconds), wake, context=context)
        return self

    def end(self) -> None:
        """
        Wake who awaits this, with the observation that released it or None.
        """
        if not self.done():
            self.set_result(self._leave())

    def cancel(self, msg: Any = None) -> bool:
        """
        Give up the place of a task that is cancelled.
        """
        if not self.done():
            self._leave()
        return super().cancel(msg)

    def _leave(self) -> Observation | None:
        if self._timer is not None:
            self._timer.cancel()
        if self.waiter is None:
            return None
        if self.waiter.active:
            self._core.cluster.give_up(self.waiter)
        return self.waiter.seen


class Gathering:
    """
    Let many tasks await observations of one node, with one waiter and one timer for all of them.

    Each gets an observation that was sent at its time or later; None when the node fails, or after
    ``seconds``. What a task costs is a future: one that is cancelled is merely passed over.
    """

    __slots__ = ("_context", "_core", "_name", "_seconds", "_timer", "_waiter", "_waiting")

    def __init__(self, core: Core, name: str, seconds: float, context: Context) -> None:
        self._core = core
        self._name = name
        self._seconds = seconds
        self._context = context
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
