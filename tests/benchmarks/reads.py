"""
Suite: a read by primary key, from checkout to return, against psycopg_pool and hasql.

All take a connection of a pool of the same kind and size, run the same statement in a transaction
of psycopg's default kind, and give the connection back. The replicas have no other work.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from lsn_consistency import AsyncRouter, Consistency, Router, Session, Token
from lsn_consistency.testing import EmbeddedCluster
from tests.benchmarks import stage
from tests.benchmarks.findings import Bench
from tests.benchmarks.measuring import Comparison, compare, compare_async

POOL_SIZE: Final = 10
CONCURRENT: Final = 100
LEVELS: Final = {
    "read_your_writes": Consistency.READ_YOUR_WRITES,
    "causal": Consistency.CAUSAL,
}
WARM_SECONDS: Final = 10.0


def run(bench: Bench) -> None:
    """
    Measure reads that are alone, and reads of a hundred tasks at once.
    """
    with stage.servers(bench) as pg:
        asyncio.run(_async(bench, pg))
        _blocking(bench, pg)


async def _async(bench: Bench, pg: EmbeddedCluster) -> None:
    conninfo = pg.replicas["replica_1"].conninfo
    async with (
        _router(pg) as router,
        AsyncConnectionPool(conninfo, min_size=POOL_SIZE, open=False) as pool,
        _hasql(pg) as others,
    ):
        await pool.wait()
        token = await router.token()
        with Session(token):
            ways: dict[str, Callable[[], Awaitable[Any]]] = {
                "psycopg_pool": lambda: _pooled(pool),
                "hasql": lambda: _hasql_read(others),
                "round trip": lambda: _round_trip(pool),
                **{name: _reading(router, level) for name, level in LEVELS.items()},
            }
            alone = bench.add(
                await compare_async(
                    "async read, alone",
                    ways,
                    rounds=bench.rounds(21, 7),
                    number=bench.rounds(300, 150),
                )
            )
        _judge_alone(bench, alone)
        crowds = {
            name: _crowd(way)
            for name, way in {
                "psycopg_pool": lambda: _pooled(pool),
                "hasql": lambda: _hasql_read(others),
                **{name: _in_session(router, level, token) for name, level in LEVELS.items()},
            }.items()
        }
        crowd = bench.add(
            await compare_async(
                f"async reads, {CONCURRENT} at once",
                crowds,
                rounds=bench.rounds(21, 7),
                number=bench.rounds(10, 5),
            )
        )
        _judge_crowd(bench, crowd)


def _judge_alone(bench: Bench, alone: Comparison) -> None:
    bench.find(
        "reads.alone.read_your_writes",
        "async read at READ_YOUR_WRITES / psycopg_pool",
        alone.ratios("read_your_writes", "psycopg_pool"),
        at_most=1.15,
    )
    bench.find(
        "reads.alone.hasql",
        "async read at READ_YOUR_WRITES / hasql",
        alone.ratios("read_your_writes", "hasql"),
        at_most=0.6,
    )
    bench.find(
        "reads.alone.causal",
        "async read at CAUSAL / psycopg_pool",
        alone.ratios("causal", "psycopg_pool"),
    )
    trips = [
        extra / trip
        for extra, trip in zip(
            alone.extras("causal", "psycopg_pool"),
            alone.series["round trip"].rounds,
            strict=True,
        )
    ]
    bench.find(
        "reads.alone.causal.time",
        "what CAUSAL adds to an async read, in round trips of SELECT 1",
        trips,
        "round trips",
    )


def _judge_crowd(bench: Bench, crowd: Comparison) -> None:
    bench.find(
        "reads.crowd.read_your_writes",
        f"{CONCURRENT} async reads at READ_YOUR_WRITES / psycopg_pool",
        crowd.ratios("read_your_writes", "psycopg_pool"),
    )
    bench.find(
        "reads.crowd.causal",
        f"{CONCURRENT} async reads at CAUSAL / psycopg_pool",
        crowd.ratios("causal", "psycopg_pool"),
        at_most=1.3,
    )


def _blocking(bench: Bench, pg: EmbeddedCluster) -> None:
    conninfo = pg.replicas["replica_1"].conninfo
    router = Router(**stage.nodes(pg), pool_options={"min_size": POOL_SIZE})
    with router, ConnectionPool(conninfo, min_size=POOL_SIZE, open=False) as pool:
        pool.wait()
        _warm(router)
        with Session(router.token()):
            compared = bench.add(
                compare(
                    "blocking read, alone",
                    {
                        "psycopg_pool": lambda: _pooled_blocking(pool),
                        **{name: _reading_blocking(router, each) for name, each in LEVELS.items()},
                    },
                    rounds=bench.rounds(21, 7),
                    seconds=0.1,
                )
            )
    for name in LEVELS:
        bench.find(
            f"reads.blocking.{name}",
            f"blocking read at {name.upper()} / psycopg_pool",
            compared.ratios(name, "psycopg_pool"),
        )


@asynccontextmanager
async def _router(pg: EmbeddedCluster) -> AsyncIterator[AsyncRouter]:
    router = AsyncRouter(**stage.nodes(pg), pool_options={"min_size": POOL_SIZE})
    async with router:
        async with asyncio.timeout(WARM_SECONDS):
            while not stage.is_measured(router.snapshot()):
                await asyncio.sleep(0.01)
        yield router


def _warm(router: Router) -> None:
    ends = time.monotonic() + WARM_SECONDS
    while not stage.is_measured(router.snapshot()) and time.monotonic() < ends:
        time.sleep(0.01)


@asynccontextmanager
async def _hasql(pg: EmbeddedCluster) -> AsyncIterator[Any]:
    from hasql.psycopg3 import PoolManager

    # Each return of a connection in a transaction is worth a warning to psycopg_pool: in the
    # peer's favour nobody writes it.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
    parts = [conninfo_to_dict(node.conninfo) for node in pg.nodes.values()]
    hosts = ",".join(f"{each['host']}:{each['port']}" for each in parts)
    dsn = f"postgresql://{parts[0]['user']}@{hosts}/{parts[0]['dbname']}"
    manager = PoolManager(dsn, pool_factory_kwargs={"min_size": POOL_SIZE, "max_size": POOL_SIZE})
    await manager.ready(masters_count=1, replicas_count=2, timeout=WARM_SECONDS)
    try:
        yield manager
    finally:
        await manager.close()


async def _pooled(pool: AsyncConnectionPool) -> Any:
    async with pool.connection() as conn:
        return await (await conn.execute(stage.SELECT, (7,))).fetchone()


async def _round_trip(pool: AsyncConnectionPool) -> Any:
    # The pool's connection is autocommit here: one statement, one round trip.
    async with pool.connection() as conn:
        await conn.set_autocommit(True)
        began = time.perf_counter()
        await conn.execute("SELECT 1")
        taken = time.perf_counter() - began
        await conn.set_autocommit(False)
    return taken


async def _hasql_read(manager: Any) -> Any:
    async with manager.acquire_replica() as conn:
        return await (await conn.execute(stage.SELECT, (7,))).fetchone()


def _reading(router: AsyncRouter, level: Consistency) -> Callable[[], Awaitable[Any]]:
    async def read() -> Any:
        async with router.read(consistency=level) as conn:
            return await (await conn.execute(stage.SELECT, (7,))).fetchone()

    return read


def _in_session(
    router: AsyncRouter, level: Consistency, token: Token
) -> Callable[[], Awaitable[Any]]:
    read = _reading(router, level)

    async def read_in_session() -> Any:
        with Session(token):
            return await read()

    return read_in_session


def _crowd(way: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    async def crowd() -> None:
        await asyncio.gather(*(way() for _ in range(CONCURRENT)))

    return crowd


def _pooled_blocking(pool: ConnectionPool) -> Any:
    with pool.connection() as conn:
        return conn.execute(stage.SELECT, (7,)).fetchone()


def _reading_blocking(router: Router, level: Consistency) -> Callable[[], Any]:
    def read() -> Any:
        with router.read(consistency=level) as conn:
            return conn.execute(stage.SELECT, (7,)).fetchone()

    return read
