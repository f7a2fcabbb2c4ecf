"""Tasks that await observations of one node together, with one waiter and one timer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from lsn_consistency._waiting import Gathering
from tests.unit.test_monitor import World

LONG = 60.0


def gathered(
    scenario: Callable[[World, Gathering], Coroutine[Any, Any, Any]], seconds: float = LONG
) -> Any:
    """Run a scenario; nobody may be left waiting after it."""
    world = World()

    async def run() -> Any:
        found = await scenario(world, Gathering(world.core, "a", seconds))
        assert 0 == len(world.core.cluster.nodes["a"].waiting)
        return found

    return asyncio.run(run())


async def done(*awaited: Awaitable[Any]) -> list[bool]:
    """Tell which are done, once the loop has run."""
    await asyncio.sleep(0)
    return [asyncio.ensure_future(each).done() for each in awaited]


def test_an_observation_is_for_all_who_began_before_it_was_sent() -> None:
    """One waiter stands for them; who began later gets the next one."""

    async def scenario(world: World, gathering: Gathering) -> None:
        now = world.now
        early = [gathering.join(now + step) for step in (0.1, 0.0, 0.2)]
        late = gathering.join(now + 5.0)
        assert 1 == len(world.core.cluster.nodes["a"].waiting)
        world.now = now + 1.0
        world.core.observed("a", first := world.seen(1))
        assert [True, True, True, False] == await done(*early, late)
        assert [first] * 3 == [each.result() for each in early]
        world.now = now + 6.0
        world.core.observed("a", second := world.seen(2))
        assert second is await late

    gathered(scenario)


def test_a_failure_ends_all_waits_without_an_observation() -> None:
    """Unknown is not caught up."""

    async def scenario(world: World, gathering: Gathering) -> list[Any]:
        awaited = [gathering.join(world.now + step) for step in (0.0, 9.0)]
        world.core.failed("a", ConnectionError("gone"))
        return await asyncio.gather(*awaited)

    assert [None, None] == gathered(scenario)


def test_each_wait_ends_with_its_own_time() -> None:
    """The time of the first is not that of those who came later."""

    async def scenario(world: World, gathering: Gathering) -> float:
        loop = asyncio.get_running_loop()
        first = gathering.join(world.now)
        began = loop.time()
        await asyncio.sleep(0.03)
        second = gathering.join(world.now)
        assert await first is None
        assert not second.done()
        assert await second is None
        return loop.time() - began

    assert 0.08 <= gathered(scenario, seconds=0.05)


def test_who_is_cancelled_is_passed_over() -> None:
    """At once, and the others wait on; nothing is left of a gathering that all have left."""

    async def scenario(world: World, gathering: Gathering) -> None:
        tasks = [asyncio.ensure_future(gathering.join(world.now)) for _ in range(3)]
        tasks[0].cancel()
        tasks[2].cancel()
        assert [True, False, True] == await done(*tasks)
        world.now += 1.0
        world.core.observed("a", seen := world.seen(1))
        assert seen is await tasks[1]
        last = gathering.join(world.now + 1.0)
        last.cancel()
        world.now += 2.0
        world.core.observed("a", world.seen(2))
        assert last.cancelled()
        again = gathering.join(world.now)
        world.core.observed("a", newest := world.seen(3))
        assert newest is await again

    gathered(scenario)
