"""
Suite: a read by primary key, from checkout to return, against psycopg_pool and hasql.

All take a connection of a pool of the same kind and size, run the same statement, and give the
connection back: in a transaction, as psycopg does by default, and in autocommit mode, where the
statement is all that is sent. The replicas have no other work.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from lsn_consistency import AsyncRouter, Consistency, Router, Session, Token
from lsn_consistency.testing import EmbeddedCluster
from tests.benchmarks import stage
from tests.benchmarks.findings import Bench
from tests.benchmarks.measuring import Comparison, compare, compare_async
from tests.benchmarks.stage import POOL_SIZE, WARM_SECONDS

CONCURRENT: Final = 100
READS_EACH: Final = 3
AT_MOST_OF_HASQL: Final = 0.6
REPLICA: Final = "replica_1"
"""Whom a session that is alone and psycopg_pool read from: of two equal servers one is faster."""

TRANSACTION: Final = "in a transaction"
MODES: Final[dict[str, dict[str, Any]]] = {TRANSACTION: {}, "autocommit": {"autocommit": True}}
LEVELS: Final = {
    "read_your_writes": Consistency.READ_YOUR_WRITES,
    "causal": Consistency.CAUSAL,
}


def run(bench: Bench) -> None:
    """
    Measure reads that are alone, and reads of a hundred tasks at once.
    """
    with stage.servers(bench) as pg:
        for mode in MODES:
            asyncio.run(_async(bench, pg, mode))
        _blocking(bench, pg)


async def _async(bench: Bench, pg: EmbeddedCluster, mode: str) -> None:
    conninfo = pg.replicas[REPLICA].conninfo
    options: dict[str, Any] = {"min_size": POOL_SIZE, "kwargs": MODES[mode]}
    async with (
        stage.async_router(**stage.nodes(pg), pool_options=options) as router,
        AsyncConnectionPool(conninfo, open=False, **options) as pool,
        _hasql(pg, options) as others,
    ):
        await pool.wait()
        token = await router.token()
        peers: dict[str, Callable[[], Awaitable[Any]]] = {
            "psycopg_pool": lambda: _pooled(pool),
            "hasql": lambda: _hasql_read(others),
        }
        with Session(token) as session:
            session.node = REPLICA
            ours = {name: _reading(router, level) for name, level in LEVELS.items()}
            alone = bench.add(
                await compare_async(
                    f"async read, {mode}",
                    {**peers, **ours},
                    # Many short turns: what the machine does besides hits few rounds, or all ways.
                    rounds=bench.rounds(61, 21),
                    number=bench.rounds(100, 50),
                )
            )
        _judge_alone(bench, alone, mode)
        if mode == TRANSACTION:
            crowds = {
                **{
                    name: _crowd(way)
                    for name, way in peers.items()
                    if name != "hasql" or not bench.quick
                },
                **{
                    name: _crowd(_in_session(router, level, token))
                    for name, level in LEVELS.items()
                },
            }
            crowd = await compare_async(
                f"{CONCURRENT} tasks that read {READS_EACH} times each",
                crowds,
                rounds=bench.rounds(101, 25),
                number=1,
            )
            _judge_crowd(bench, bench.add(crowd))


def _judge_alone(bench: Bench, alone: Comparison, mode: str) -> None:
    for name in LEVELS:
        bench.find(
            f"reads.{mode}.{name}",
            f"async read at {name.upper()} over psycopg_pool, {mode}",
            alone.ratios(name, "psycopg_pool"),
            at_most=1.15 if name == "read_your_writes" else None,
            floor="Both send the same, and need the same server time. What is left is the "
            "decision, the look at what is known of the connection, and its way back, in Python.",
        )
    pool_itself = statistics.median(alone.ratios("psycopg_pool", "hasql"))
    bench.find(
        f"reads.{mode}.hasql",
        f"async read at READ_YOUR_WRITES over hasql, {mode}",
        alone.ratios("read_your_writes", "hasql"),
        at_most=AT_MOST_OF_HASQL,
        floor=f"psycopg_pool's own connection() and the same query take {pool_itself:.2f} of what "
        "hasql takes in this mode: what both send to the server outweighs the checkout. The bar "
        f"would be {AT_MOST_OF_HASQL / pool_itself:.2f} x psycopg_pool.",
    )


def _judge_crowd(bench: Bench, crowd: Comparison) -> None:
    without = statistics.median(crowd.ratios("read_your_writes", "psycopg_pool"))
    for name in LEVELS:
        bench.find(
            f"reads.crowd.{name}",
            f"{CONCURRENT} concurrent async reads at {name.upper()} over psycopg_pool",
            crowd.ratios(name, "psycopg_pool"),
            at_most=1.3 if name == "causal" else None,
            floor=f"At READ_YOUR_WRITES, which asks for no position, the same crowd takes "
            f"{without:.2f} x. The rest is a future for each read that waits for the "
            "shared probe, and the session's advance: CPU of one event loop, which 100 reads "
            "share.",
        )


def _blocking(bench: Bench, pg: EmbeddedCluster) -> None:
    conninfo = pg.replicas[REPLICA].conninfo
    with (
        stage.blocking_router(**stage.nodes(pg), pool_options={"min_size": POOL_SIZE}) as router,
        ConnectionPool(conninfo, min_size=POOL_SIZE, open=False) as pool,
    ):
        pool.wait()
        with Session(router.token()) as session:
            session.node = REPLICA
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
async def _hasql(pg: EmbeddedCluster, options: Mapping[str, Any]) -> AsyncIterator[Any]:
    from hasql.psycopg3 import PoolManager

    # Each return of a connection in a transaction is worth a warning to psycopg_pool: in the
    # peer's favour nobody writes it.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
    parts = [conninfo_to_dict(node.conninfo) for node in pg.nodes.values()]
    hosts = ",".join(f"{each['host']}:{each['port']}" for each in parts)
    dsn = f"postgresql://{parts[0]['user']}@{hosts}/{parts[0]['dbname']}"
    manager = PoolManager(dsn, pool_factory_kwargs={**options, "max_size": POOL_SIZE})
    await manager.ready(masters_count=1, replicas_count=2, timeout=WARM_SECONDS)
    try:
        yield manager
    finally:
        await manager.close()


async def _pooled(pool: AsyncConnectionPool) -> Any:
    async with pool.connection() as conn:
        return await (await conn.execute(stage.SELECT, (7,))).fetchone()


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
    async def one() -> None:
        for _ in range(READS_EACH):
            await way()

    async def crowd() -> None:
        await asyncio.gather(*(one() for _ in range(CONCURRENT)))

    return crowd


def _pooled_blocking(pool: ConnectionPool) -> Any:
    with pool.connection() as conn:
        return conn.execute(stage.SELECT, (7,)).fetchone()


def _reading_blocking(router: Router, level: Consistency) -> Callable[[], Any]:
    def read() -> Any:
        with router.read(consistency=level) as conn:
            return conn.execute(stage.SELECT, (7,)).fetchone()

    return read
