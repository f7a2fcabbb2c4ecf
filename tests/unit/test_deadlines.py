"""Waits of tasks that end when their time is over: those of one millisecond share a timer."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from lsn_consistency._waiting import AsyncWaiting, Deadlines
from tests.unit.test_monitor import World

LONG = 60.0


class Waits:
    """Waits for positions of one world, and the timers that they take."""

    def __init__(self) -> None:
        self.world = World()
        self.deadlines = Deadlines()
        self.loop = asyncio.get_running_loop()
        self.timers: list[asyncio.TimerHandle] = []
        self._call_at = self.loop.call_at

    def begin(self, seconds: float) -> AsyncWaiting:
        """Begin to wait for the first observation of a node."""
        cluster = self.world.core.cluster
        waiting = AsyncWaiting(self.world.core)
        waiting.waiter = cluster.wait_for_observation("a", self.world.now, waiting.end)
        return waiting.within(seconds, self.deadlines)

    def call_at(self, *args: Any, **options: Any) -> asyncio.TimerHandle:
        """Set a timer, and note it."""
        self.timers.append(timer := self._call_at(*args, **options))
        return timer

    @property
    def still(self) -> int:
        """How many timers are still set."""
        return sum(not timer.cancelled() for timer in self.timers)


def played(
    scenario: Callable[[Waits], Coroutine[Any, Any, None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a scenario; nobody may be left waiting after it."""

    async def run() -> None:
        waits = Waits()
        monkeypatch.setattr(waits.loop, "call_at", waits.call_at)
        await scenario(waits)
        assert 0 == len(waits.world.core.cluster.nodes["a"].waiting)

    asyncio.run(run())


def test_each_wait_ends_at_its_time_and_gives_up_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before, and not with those whose time comes later."""

    async def scenario(waits: Waits) -> None:
        began = waits.loop.time()
        late, early, over = waits.begin(0.08), waits.begin(0.03), waits.begin(-1.0)
        assert await over is None
        assert not early.done()
        assert await early is None
        assert waits.loop.time() - began >= 0.03
        assert not late.done()
        assert await late is None
        assert waits.loop.time() - began >= 0.08

    played(scenario, monkeypatch)


def test_waits_that_end_in_one_millisecond_share_a_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cancelled when the last of them has ended, by an observation or a cancellation."""

    async def scenario(waits: Waits) -> None:
        now = waits.loop.time()
        with monkeypatch.context() as frozen:
            frozen.setattr(waits.loop, "time", lambda: now)
            cancelled, *others = [waits.begin(LONG) for _ in range(100)]
            assert 1 == len(waits.timers)
            waits.begin(LONG + 0.01).cancel()
            assert 2 == len(waits.timers)
        cancelled.cancel()
        assert 1 == waits.still
        waits.world.now += 1.0
        waits.world.core.observed("a", seen := waits.world.seen(1))
        assert [seen] * 99 == [each.result() for each in others]
        assert 0 == waits.still
        # A new one in the same millisecond has a timer of its own.
        again = waits.begin(0.0)
        assert await again is None

    played(scenario, monkeypatch)


def test_a_wait_that_has_ended_is_not_kept_until_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others that end in the same millisecond go on waiting."""

    async def scenario(waits: Waits) -> None:
        now = waits.loop.time()
        monkeypatch.setattr(waits.loop, "time", lambda: now)
        going_on = waits.begin(LONG)
        cancelled = waits.begin(LONG)
        gone = weakref.ref(cancelled)
        cancelled.cancel()
        del cancelled
        await asyncio.sleep(0)
        gc.collect()
        assert gone() is None
        assert not going_on.done()
        going_on.cancel()

    played(scenario, monkeypatch)


def test_what_was_released_before_its_time_was_told_sets_no_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a place is free by the time that somebody would wait for it."""

    async def scenario(waits: Waits) -> None:
        waiting = AsyncWaiting(waits.world.core)
        waiting.end()
        assert await waiting.within(LONG, waits.deadlines) is None
        assert [] == waits.timers

    played(scenario, monkeypatch)
