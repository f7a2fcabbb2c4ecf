"""
Suite: how many round trips a read and a write take, and how many of them are ours.

Everything goes through relays that count what the servers answer, the probes of the monitors
included, which therefore come only when they are asked for. The counts are exact.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Final

from psycopg_pool import AsyncConnectionPool, ConnectionPool

from lsn_consistency import Consistency, Session
from tests.benchmarks import stage
from tests.benchmarks.findings import Bench
from tests.benchmarks.wire import CountingRelay

REPEATED: Final = 20
# psycopg prepares a statement when it has run five times.
_WARM: Final = 8
# One connection a pool, so that what is warm is known; lags that are known once stay good.
_ONE: Final = {"min_size": 1, "max_size": 1}
_STILL: Final = {"poll_interval": 600.0, "max_lag_seconds": 1200.0, "pin_seconds": 1200.0}

_READ: Final = "read of psycopg_pool"
_WRITE: Final = "write of psycopg_pool"
_BARS: Final = (
    ("read_your_writes", "read() at READ_YOUR_WRITES", _READ, 0.0),
    ("causal", "read() at CAUSAL, alone", _READ, 1.0),
    ("write", "write()", _WRITE, 1.0),
)


class Servers:
    """
    Hold the servers behind their relays.
    """

    def __init__(self, relays: Mapping[str, CountingRelay]) -> None:
        self._relays = relays

    @property
    def nodes(self) -> dict[str, Any]:
        """
        Return the arguments of a router that name the relays.
        """
        replicas = {name: each.conninfo for name, each in self._relays.items()}
        return {"primary": replicas.pop("primary"), "replicas": replicas}

    def answers(self) -> int:
        """
        Return how many round trips have ended.
        """
        return sum(each.round_trips for each in self._relays.values())


def run(bench: Bench) -> None:
    """
    Count the round trips of blocking and async use, on connections of both kinds.
    """
    with stage.servers(bench) as pg, ExitStack() as stack:
        relays = {n: stack.enter_context(CountingRelay(s.conninfo)) for n, s in pg.nodes.items()}
        servers = Servers(relays)
        found = {}
        for kind, kwargs in stage.CONNECTIONS.items():
            options = {**_ONE, "kwargs": kwargs}
            found[f"blocking, {kind}"] = _blocking(servers, options, pg.wait_caught_up)
            found[f"async, {kind}"] = asyncio.run(_async(servers, options, pg.wait_caught_up))
    for key, title, reference, bar in _BARS:
        bench.find(
            f"round_trips.{key}",
            f"round trips that {title} adds, the most of {len(found)} ways to use it",
            max(trips[title] - trips[reference] for trips in found.values()),
            "round trips",
            at_most=bar,
        )
    ways = [_READ, *(title for _, title, reference, _ in _BARS if reference == _READ)]
    ways += [_WRITE, *(title for _, title, reference, _ in _BARS if reference == _WRITE)]
    bench.table(
        "Round trips",
        ["connections", *ways],
        [[each, *(f"{trips[way]:g}" for way in ways)] for each, trips in found.items()],
        note="As the servers answered them. BEGIN and COMMIT are round trips of their own on a "
        "connection that is not in autocommit mode.",
    )


def _blocking(
    servers: Servers, options: dict[str, Any], catch_up: Callable[[], object]
) -> dict[str, float]:
    nodes = servers.nodes
    replica = ConnectionPool(nodes["replicas"]["replica_1"], open=False, **options)
    primary = ConnectionPool(nodes["primary"], open=False, **options)
    opened = stage.blocking_router(**nodes, **_STILL, pool_options=options)
    with opened as router, replica, primary, Session():
        ways = _ways(router, replica, primary)
        found = {}
        for name, (block, statement) in ways.items():
            for _ in range(_WARM):
                stage.execute(block(), statement)
            catch_up()
            stage.execute(block(), statement)
            began = servers.answers()
            for _ in range(REPEATED):
                stage.execute(block(), statement)
            found[name] = (servers.answers() - began) / REPEATED
    return found


async def _async(
    servers: Servers, options: dict[str, Any], catch_up: Callable[[], object]
) -> dict[str, float]:
    nodes = servers.nodes
    replica = AsyncConnectionPool(nodes["replicas"]["replica_1"], open=False, **options)
    primary = AsyncConnectionPool(nodes["primary"], open=False, **options)
    opened = stage.async_router(**nodes, **_STILL, pool_options=options)
    async with opened as router, replica, primary:
        with Session():
            found = {}
            for name, (block, statement) in _ways(router, replica, primary).items():
                for _ in range(_WARM):
                    await stage.execute_async(block(), statement)
                catch_up()
                await stage.execute_async(block(), statement)
                began = servers.answers()
                for _ in range(REPEATED):
                    await stage.execute_async(block(), statement)
                found[name] = (servers.answers() - began) / REPEATED
    return found


def _ways(router: Any, replica: Any, primary: Any) -> dict[str, tuple[Callable[[], Any], str]]:
    """Return what yields a connection, and the statement to run on it."""
    read_your_writes, causal, write = (title for _, title, _, _ in _BARS)
    ryw = Consistency.READ_YOUR_WRITES
    return {
        _READ: (replica.connection, stage.SELECT),
        read_your_writes: (lambda: router.read(consistency=ryw), stage.SELECT),
        causal: (lambda: router.read(consistency=Consistency.CAUSAL), stage.SELECT),
        _WRITE: (primary.connection, stage.INSERT),
        write: (router.write, stage.INSERT),
    }
