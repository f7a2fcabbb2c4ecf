"""
Suite: a write of one INSERT, from checkout to return, against the same in psycopg_pool.

The peer keeps no position, so whoever reads a replica next may miss what it wrote. How many round
trips the position costs is counted by the suite `round_trips`.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from typing import Any, Final

from psycopg_pool import AsyncConnectionPool, ConnectionPool

from lsn_consistency import Session
from lsn_consistency.testing import EmbeddedCluster
from tests.benchmarks import stage
from tests.benchmarks.findings import Bench
from tests.benchmarks.measuring import Comparison, compare, compare_async
from tests.benchmarks.stage import POOL_SIZE

OURS: Final = "write()"
PEER: Final = "psycopg_pool"
BY_HAND: Final = "psycopg_pool, then the position"
WITH_FSYNC: Final = "fsync"
# Many short turns: what servers do besides, like a checkpoint, hits few rounds or all their ways.
ROUNDS: Final = (61, 25)
"""Of a whole run, and of a quick one."""

FLOOR: Final = (
    "A program that asks for the position by itself, in a round trip of its own, takes {:.2f} x. "
    "Here it comes with the COMMIT; what is left is to read the answer, to judge it and to advance "
    "the session, in Python."
)
AUTOCOMMIT_FLOOR: Final = (
    "A program that asks for the position by itself takes {:.2f} x: the statement commits by "
    "itself, so the question is a second round trip, which costs as much as the first because "
    "nothing is far away and no disk is waited for."
)

_POSITION: Final = "SELECT pg_current_wal_insert_lsn()"


def run(bench: Bench) -> None:
    """
    Measure writes on connections of both kinds; in a whole run also with a disk behind them.
    """
    with stage.servers(bench) as pg:
        bench.say(f"fsync is {bench.data['fsync']}, as the cluster has it by default")
        compared = {
            f"{driver}.{kind}": each
            for kind, kwargs in stage.CONNECTIONS.items()
            for driver, each in _measure(bench, pg, kind, kwargs).items()
        }
        if not bench.quick:
            pg.primary.configure("fsync", "on")
            for driver, each in _measure(bench, pg, WITH_FSYNC, {}).items():
                compared[f"{driver}.{WITH_FSYNC}"] = each
    rows = []
    for key, each in compared.items():
        by_hand = _judge(bench, key, each)
        ours = [statistics.median(each.ratios(OURS, other)) for other in (PEER, BY_HAND)]
        rows.append([each.name, f"{by_hand:.2f}", *(f"{ratio:.2f}" for ratio in ours)])
    bench.table(
        "A write of one INSERT",
        ["connections", f"{BY_HAND} / {PEER}", f"{OURS} / {PEER}", f"{OURS} / {BY_HAND}"],
        rows,
        note="By hand is one short SELECT in autocommit mode after the commit. It names no "
        "timeline and no system, and nobody looks after it when it fails. fsync is off but where "
        "it is named; no standby is waited for.",
    )


def _measure(
    bench: Bench, pg: EmbeddedCluster, kind: str, kwargs: dict[str, Any]
) -> dict[str, Comparison]:
    return {
        "async": asyncio.run(_async(bench, pg, kind, kwargs)),
        "blocking": _blocking(bench, pg, kind, kwargs),
    }


def _judge(bench: Bench, key: str, compared: Comparison) -> float:
    """Find the ratio to the peer, and return that of the peer with a position taken by hand."""
    by_hand = statistics.median(compared.ratios(BY_HAND, PEER))
    bench.find(
        f"writes.{key}",
        f"{compared.name} / {PEER}",
        compared.ratios(OURS, PEER),
        at_most=None if key.endswith(WITH_FSYNC) else 1.3,
        floor=AUTOCOMMIT_FLOOR.format(by_hand) if "autocommit" in key else FLOOR.format(by_hand),
    )
    return by_hand


async def _async(
    bench: Bench, pg: EmbeddedCluster, kind: str, kwargs: dict[str, Any]
) -> Comparison:
    options: dict[str, Any] = {"min_size": POOL_SIZE, "kwargs": kwargs}
    async with (
        stage.async_router(**stage.nodes(pg), pool_options=options) as router,
        AsyncConnectionPool(pg.primary.conninfo, open=False, **options) as pool,
    ):
        await pool.wait()
        ways: dict[str, Callable[[], Awaitable[Any]]] = {
            PEER: lambda: stage.execute_async(pool.connection(), stage.INSERT),
            BY_HAND: lambda: _by_hand_async(pool),
            OURS: lambda: stage.execute_async(router.write(), stage.INSERT),
        }
        with Session():
            return bench.add(
                await compare_async(
                    f"async write, {kind}",
                    ways,
                    rounds=bench.rounds(*ROUNDS),
                    number=bench.rounds(60, 15),
                )
            )


def _blocking(bench: Bench, pg: EmbeddedCluster, kind: str, kwargs: dict[str, Any]) -> Comparison:
    options: dict[str, Any] = {"min_size": POOL_SIZE, "kwargs": kwargs}
    with (
        stage.blocking_router(**stage.nodes(pg), pool_options=options) as router,
        ConnectionPool(pg.primary.conninfo, open=False, **options) as pool,
    ):
        pool.wait()
        ways: dict[str, Callable[[], Any]] = {
            PEER: lambda: stage.execute(pool.connection(), stage.INSERT),
            BY_HAND: lambda: _by_hand(pool),
            OURS: lambda: stage.execute(router.write(), stage.INSERT),
        }
        with Session():
            return bench.add(
                compare(
                    f"blocking write, {kind}",
                    ways,
                    rounds=bench.rounds(*ROUNDS),
                    seconds=0.01 if bench.quick else 0.04,
                )
            )


# The least that a program does that wants the position of its write, after the commit.


async def _by_hand_async(pool: AsyncConnectionPool) -> None:
    async with pool.connection() as conn:
        await conn.execute(stage.INSERT, (stage.ITEM,))
        autocommit = conn.autocommit
        await conn.commit()
        await conn.set_autocommit(True)
        await (await conn.execute(_POSITION)).fetchone()
        await conn.set_autocommit(autocommit)


def _by_hand(pool: ConnectionPool) -> None:
    with pool.connection() as conn:
        conn.execute(stage.INSERT, (stage.ITEM,))
        autocommit = conn.autocommit
        conn.commit()
        conn.autocommit = True
        conn.execute(_POSITION).fetchone()
        conn.autocommit = autocommit
