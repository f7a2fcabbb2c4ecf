"""
The servers that suites measure on: one primary, two replicas, one table of a thousand rows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from typing import Any, Final

from lsn_consistency import AsyncRouter, Router
from lsn_consistency.testing import EmbeddedCluster
from tests.benchmarks.findings import Bench

ROWS: Final = 1000
SELECT: Final = "SELECT name, price FROM items WHERE id = %s"
INSERT: Final = "INSERT INTO orders (item, quantity) VALUES (%s, 1)"
ITEM: Final = 7
POOL_SIZE: Final = 10
WARM_SECONDS: Final = 10.0
CONNECTIONS: Final[Mapping[str, dict[str, Any]]] = {
    "transaction": {},
    "autocommit": {"autocommit": True},
}
"""The arguments of connections by what they are: psycopg's default kind, and the other."""

_TABLES: Final = f"""
    CREATE TABLE items (id int PRIMARY KEY, name text NOT NULL, price int NOT NULL);
    INSERT INTO items SELECT each, 'item ' || each, each FROM generate_series(1, {ROWS}) AS each;
    CREATE TABLE orders (id bigserial PRIMARY KEY, item int NOT NULL, quantity int NOT NULL)
"""


@contextmanager
def servers(bench: Bench, settings: Mapping[str, str] | None = None) -> Iterator[EmbeddedCluster]:
    """
    Start the servers, and note their version and what a commit waits for in the report.
    """
    with EmbeddedCluster(replicas=2, settings=settings, progress=bench.say) as pg:
        bench.data["postgresql"] = pg.primary.value("SHOW server_version")
        for setting in ("fsync", "synchronous_commit"):
            bench.data[setting] = pg.primary.value(f"SHOW {setting}")
        pg.primary.execute(_TABLES)
        pg.wait_caught_up()
        yield pg


def nodes(pg: EmbeddedCluster) -> dict[str, Any]:
    """
    Return the arguments of a router that name the servers.
    """
    replicas = {name: replica.conninfo for name, replica in pg.replicas.items()}
    return {"primary": pg.primary.conninfo, "replicas": replicas}


@asynccontextmanager
async def async_router(**options: Any) -> AsyncIterator[AsyncRouter]:
    """
    Open a router, and yield it when nothing of it is cold.
    """
    async with AsyncRouter(**options) as router:
        async with asyncio.timeout(WARM_SECONDS):
            while not is_measured(router.snapshot()):
                await asyncio.sleep(0.01)
        yield router


@contextmanager
def blocking_router(**options: Any) -> Iterator[Router]:
    """
    Do the same without an event loop.
    """
    with Router(**options) as router:
        ends = time.monotonic() + WARM_SECONDS
        while not is_measured(router.snapshot()):
            if time.monotonic() > ends:
                raise TimeoutError(f"a lag is not known after {WARM_SECONDS:g} s")
            time.sleep(0.01)
        yield router


def is_measured(snapshot: Mapping[str, Mapping[str, Any]]) -> bool:
    """
    Tell whether a router knows the lag of every node, so that nothing is cold.
    """
    return all(node["healthy"] and node["lag_seconds"] is not None for node in snapshot.values())


async def execute_async(block: AbstractAsyncContextManager[Any], statement: str) -> None:
    """
    Run a statement for one item on the connection that a block yields.
    """
    async with block as conn:
        await conn.execute(statement, (ITEM,))


def execute(block: AbstractContextManager[Any], statement: str) -> None:
    """
    Do the same without an event loop.
    """
    with block as conn:
        conn.execute(statement, (ITEM,))
