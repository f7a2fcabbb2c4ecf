"""Reads and writes that end in the middle, at random points: nothing stays behind."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import Any

import psycopg
import pytest

from lsn_consistency import Session, Token, current_session
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App, make_table, open_router, wait_until

CANCELLED = 50
OPTIONS: dict[str, Any] = {
    "wait_seconds": 0.05,
    "max_fallback_reads": 3,
    "fallback_wait_seconds": 0.05,
    "pool_options": {"min_size": 2, "max_size": 4},
}


def _left_behind(app: App) -> dict[str, Any]:
    """Return everything that a read may hold and that is still held."""
    state = app.cluster_state
    found: dict[str, Any] = {
        "waiters of positions": len(state.positions),
        "fallback reads": state.fallback_reads,
        "waiters for the primary": len(state.fallback_turns),
    }
    for name, node in state.nodes.items():
        found[f"{name} reads"] = node.in_flight
        found[f"{name} waiters"] = len(node.waiting)
    for name, pool in app.pools.items():
        stats = pool.get_stats()
        found[f"{name} requests"] = stats.get("requests_waiting", 0)
        found[f"{name} taken"] = stats["pool_size"] - stats["pool_available"]
    return {name: count for name, count in found.items() if count}


def _assert_nothing_left(app: App) -> None:
    wait_until(lambda: not _left_behind(app), 5.0, lambda: str(_left_behind(app)))


def _shape(pg: EmbeddedCluster, shape: str) -> None:
    if shape == "paused":
        for replica in pg.replicas.values():
            replica.pause_replay()
    elif shape == "frozen":
        pg.replicas["replica_1"].freeze()
    elif shape == "stopped":
        pg.replicas["replica_1"].stop("immediate")


@pytest.mark.parametrize("shape", ["running", "paused", "frozen", "stopped"])
def test_50_cancelled_reads_leave_nothing_behind(pg: EmbeddedCluster, shape: str) -> None:
    """50 cancelled reads at random points: no leaked connection, task or waiter."""
    table = make_table(pg, "items")
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    delays = [chance.random() * chance.choice((0.002, 0.02, 0.2)) for _ in range(CANCELLED)]
    with open_router("async", pg, **OPTIONS) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        tasks = app.call(_tasks())
        _shape(pg, shape)
        with app.session():
            app.write(f"INSERT INTO {table} VALUES (2)")
            token = current_session().token
        cancelled = app.call(_cancelled_reads(app, token, delays))
        pg.heal()
        app.wait_healthy()
        _assert_nothing_left(app)
        wait_until(
            lambda: not _extra_tasks(app, tasks), describe=lambda: str(_extra_tasks(app, tasks))
        )
        answers = app.each(20, lambda _: app.run_read(lambda conn: conn.value("SELECT 42")))
    assert cancelled > CANCELLED / 4
    assert [42] * 20 == answers


async def _cancelled_reads(app: App, token: Token, delays: list[float]) -> int:
    async def read() -> None:
        with Session(token):
            async with app.router.read() as conn:
                await conn.execute("SELECT pg_sleep(0.01)")

    async def cancel_after(delay: float) -> bool:
        task = asyncio.create_task(read())
        await asyncio.sleep(delay)
        task.cancel()
        # One that hangs in the cancellation itself would be a leak as well.
        done, _ = await asyncio.wait([task], timeout=10.0)
        assert done, "a cancelled read goes on"
        if not task.cancelled():
            task.exception()
        return task.cancelled()

    outcomes = await asyncio.gather(*(cancel_after(delay) for delay in delays))
    return sum(outcomes)


def _is_inner_wait(task: asyncio.Task[Any]) -> bool:
    # On Python 3.11 asyncio.wait_for wraps what it waits for in a task, here an event of the pool's
    # scheduler, which waits for minutes.
    return getattr(task.get_coro(), "__qualname__", "") == "Event.wait"


async def _tasks() -> set[str]:
    return {
        task.get_name()
        for task in asyncio.all_tasks()
        if task is not asyncio.current_task() and not task.done() and not _is_inner_wait(task)
    }


def _extra_tasks(app: App, before: set[str]) -> set[str]:
    return set(app.call(_tasks())) - before - _pool_workers(app)


def _pool_workers(app: App) -> set[str]:
    names = {task for pool in app.pools.values() for task in (pool.name,)}
    return {name for name in app.call(_tasks()) if any(each in name for each in names)}


def test_cancelled_writes_lose_no_position(pg: EmbeddedCluster) -> None:
    """A write that is cancelled anywhere and yet committed is seen by the session's next read."""
    table = make_table(pg, "items")
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with open_router("async", pg, wait_seconds=0.05, pool_options={"max_size": 4}) as app:
        app.wait_healthy()
        for replica in pg.replicas.values():
            replica.pause_replay()
        found = app.call(_cancelled_writes(app, table, chance))
        _assert_nothing_left(app)
        committed = {row for (row,) in pg.primary.execute(f"SELECT id FROM {table}")}
        pg.heal()
    unseen = [row for row, seen in found if row in committed and not seen]
    assert [] == unseen
    assert 5 < len(committed) < CANCELLED + 1


async def _cancelled_writes(app: App, table: str, chance: random.Random) -> list[tuple[int, bool]]:
    async def write(row: int) -> None:
        async with app.router.write() as conn:
            await conn.execute(f"INSERT INTO {table} VALUES (%s)", [row])

    found = []
    for row in range(CANCELLED):
        with Session():
            # Shares the session, which the task's context inherits.
            task = asyncio.create_task(write(row))
            await asyncio.sleep(chance.random() * 0.006)
            task.cancel()
            await asyncio.wait([task], timeout=10.0)
            async with app.router.read() as conn:
                cursor = await conn.execute(f"SELECT count(*) FROM {table} WHERE id = %s", [row])
                (count,) = await cursor.fetchone()
        found.append((row, count == 1))
    return found


class _StopItError(Exception):
    pass


INTERRUPTIONS: tuple[type[BaseException], ...] = (_StopItError, KeyboardInterrupt, SystemExit)


def _interrupted(entered: Any, number: int, error: type[BaseException]) -> None:
    with entered() as conn:
        if number % 2:
            conn.execute("SELECT 1")
        if number % 5 == 0:
            conn.execute("SELECT nonsense")
        raise error


def test_50_interrupted_blocks_leave_nothing_behind(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """Blocks that are left by any exception at random points: no leaked connection or waiter."""
    chance = random.Random(7)
    with opened(**OPTIONS) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        for number in range(CANCELLED):
            error = INTERRUPTIONS[number % len(INTERRUPTIONS)]
            entered = app.writing if chance.random() < 0.3 else app.reading
            with pytest.raises((error, psycopg.Error)):
                _interrupted(entered, number, error)
        _assert_nothing_left(app)
        interrupted = current_session().token.pin_until
        with app.session():
            answers = [app.read("SELECT 42") for _ in range(20)]
    assert interrupted is not None
    assert [[(42,)]] * 20 == answers


def test_reads_that_give_up_waiting_leave_nothing_behind(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """Full pools, full primary, replicas that never get there: every waiter leaves."""
    options = {
        **OPTIONS,
        "connect_timeout": 0.2,
        "pool_options": {"min_size": 1, "max_size": 1, "timeout": 0.3},
    }
    with opened(**options) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        for replica in pg.replicas.values():
            replica.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (2)")
        token = current_session().token
        threads = threading.active_count()

        def read(_: int) -> str:
            with app.session(token):
                try:
                    app.ask("SELECT pg_sleep(0.1)")
                except Exception as error:
                    return type(error).__name__
            return "served"

        began = time.monotonic()
        outcomes = app.each(40, read)
        took = time.monotonic() - began
        _assert_nothing_left(app)
        wait_until(lambda: threading.active_count() <= threads)
    assert set(outcomes) <= {"served", "FallbackLimitError", "PoolTimeout"}
    assert "FallbackLimitError" in outcomes
    assert took < 5.0


def test_an_async_generator_that_is_thrown_away_gives_its_connection_back(
    pg: EmbeddedCluster,
) -> None:
    """A read inside a generator that nobody finishes, as in a streamed response cut off."""
    with open_router("async", pg, **OPTIONS) as app:

        async def abandon() -> None:
            async def rows() -> Any:
                async with app.router.read() as conn:
                    yield await (await conn.execute("SELECT 1")).fetchone()
                    yield None

            for _ in range(10):
                stream = rows()
                await anext(stream)
                await stream.aclose()

        app.call(abandon())
        _assert_nothing_left(app)


def test_a_read_that_is_cancelled_as_it_ends_hands_its_connection_on(pg: EmbeddedCluster) -> None:
    """Who waits for it gets it, though the pool was still at it when the task was cancelled."""
    options: dict[str, Any] = {"pool_options": {"min_size": 1, "max_size": 1}}
    with open_router("async", pg, **options) as app:
        app.call(_cancelled_while_handing_on(app))
        _assert_nothing_left(app)


async def _cancelled_while_handing_on(app: App) -> None:
    pool = app.router._pools["replica_1"]
    put, ends, handing = pool.putconn, asyncio.Event(), asyncio.Event()

    async def slowly(conn: Any) -> None:
        # As when another task holds the lock of the pool.
        handing.set()
        await asyncio.sleep(0)
        await put(conn)

    async def read() -> None:
        async with app.router.read(node="replica_1"):
            await ends.wait()

    async def next_read() -> None:
        async with app.router.read(node="replica_1") as conn:
            await conn.execute("SELECT 1")

    first = asyncio.create_task(read())
    while pool.get_stats().get("pool_available") != 0:
        await asyncio.sleep(0)
    second = asyncio.create_task(next_read())
    while not pool.get_stats().get("requests_waiting"):
        await asyncio.sleep(0)
    pool.putconn = slowly
    ends.set()
    await handing.wait()
    first.cancel()
    pool.putconn = put
    await asyncio.wait_for(second, 5)
    with pytest.raises(asyncio.CancelledError):
        await first
