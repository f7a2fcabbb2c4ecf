"""
The paths that `profile` looks at, each with the ways to use it.

A way runs its operation a number of times, so that calling it is not part of what is found.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager
from itertools import count
from typing import Any, Final

from psycopg_pool import AsyncConnectionPool

from lsn_consistency import AsyncRouter, Consistency, Session
from tests.benchmarks import decision, middleware, offline, stage
from tests.benchmarks.findings import Bench

TICK_SECONDS: Final = 1e-6

Run = Callable[[int], None]
Ways = dict[str, Run]


@contextmanager
def _choose() -> Iterator[Ways]:
    router = offline.blocking_router(2)
    # Under callgrind time runs fifty times as fast as the work. What is remembered for some time
    # must be remembered for as many operations as without, and for the same number in each run.
    ticks = count(time.monotonic(), TICK_SECONDS)
    offline.core_of(router).clock = ticks.__next__
    decision._held.set(decision.Held(offline.TIMELINE, offline.FIRST_LSN))
    with Session(offline.token_at(offline.LAST_LSN)) as session:
        yield {
            "the loop itself": _repeated(_nothing),
            "floor": _repeated(decision.floor),
            "choose": _repeated(router.choose),
            "choose, first of a session": _repeated(decision._fresh(router, session)),
        }


@contextmanager
def _middleware() -> Iterator[Ways]:
    ways = {**middleware._bare(), **middleware._ours()}
    yield {name: _repeated(way) for name, way in ways.items()}


def _nothing() -> None:
    return None


def _repeated(way: Callable[[], object]) -> Run:
    def run(number: int) -> None:
        for _ in range(number):
            way()

    return run


# With servers


@contextmanager
def _read() -> Iterator[Ways]:
    with _opened() as (runner, router, pools):
        replica = pools["replica_1"]
        yield {
            "psycopg_pool": _on(runner, replica.connection, stage.SELECT),
            **{
                f"read(), {level.name}": _on(runner, _reading(router, level), stage.SELECT)
                for level in (Consistency.READ_YOUR_WRITES, Consistency.CAUSAL)
            },
        }


@contextmanager
def _write() -> Iterator[Ways]:
    with _opened() as (runner, router, pools):
        yield {
            "psycopg_pool": _on(runner, pools["primary"].connection, stage.INSERT),
            "write()": _on(runner, router.write, stage.INSERT),
        }


@contextmanager
def _opened() -> Iterator[tuple[asyncio.Runner, AsyncRouter, dict[str, Any]]]:
    options: dict[str, Any] = {"min_size": stage.POOL_SIZE}
    stack = AsyncExitStack()

    async def start(nodes: dict[str, Any]) -> tuple[AsyncRouter, dict[str, Any]]:
        router = await stack.enter_async_context(stage.async_router(**nodes, pool_options=options))
        pools = {}
        for name, conninfo in {"primary": nodes["primary"], **nodes["replicas"]}.items():
            pool = AsyncConnectionPool(conninfo, open=False, **options)
            pools[name] = await stack.enter_async_context(pool)
            await pool.wait()
        return router, pools

    with stage.servers(Bench(say=lambda text: None)) as pg, asyncio.Runner() as runner:
        try:
            yield runner, *runner.run(start(stage.nodes(pg)))
        finally:
            runner.run(stack.aclose())


def _reading(router: AsyncRouter, level: Consistency) -> Callable[[], Any]:
    return lambda: router.read(consistency=level)


def _on(runner: asyncio.Runner, block: Callable[[], Any], statement: str) -> Run:
    async def repeated(number: int) -> None:
        with Session():
            for _ in range(number):
                await stage.execute_async(block(), statement)

    return lambda number: runner.run(repeated(number))


PATHS: Final[dict[str, Callable[[], AbstractContextManager[Ways]]]] = {
    "choose": _choose,
    "read": _read,
    "write": _write,
    "middleware": _middleware,
}
OFFLINE: Final = frozenset({"choose", "middleware"})
"""What needs no server."""
