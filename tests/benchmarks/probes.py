"""
Suite: how often a replica is asked for its position, whatever the rate of the requests.

One process has a router and is driven at a low and at a high rate. The replicas count what they
were asked (pg_stat_statements), and tell again and again what they are answering at that moment
(pg_stat_activity). The router's own statements are counted as it sends them, which tells a
monitor's probe from a read that takes its position on its own connection.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from lsn_consistency import AsyncRouter, Consistency, Reason, Session, Token
from lsn_consistency.testing import EmbeddedCluster
from tests.benchmarks import stage
from tests.benchmarks.findings import Bench
from tests.benchmarks.sent import MONITOR, Asked, Sent, Watched

LOW: Final = 100.0
HIGH: Final = 5000.0
AT_ONCE: Final = 100
WAITING_AT_ONCE: Final = 1000
SETTLE_SECONDS: Final = 0.3

_Read = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Load:
    """
    Name what is asked of the router, how often a second, and by how many tasks at most.

    ``rate`` None is as often as the machine can, by all tasks at once.
    """

    what: str
    rate: float | None
    tasks: int


@dataclass(frozen=True, slots=True)
class Found:
    """
    Hold what one load gave; what was asked is that of both replicas together.
    """

    load: Load
    seconds: float
    reads: int
    asked: Asked
    served: int
    at_work: int

    @property
    def probes(self) -> float:
        """
        Return the probes of one monitor in a second.
        """
        return self.asked.by_monitors / self.seconds / 2

    @property
    def positions(self) -> float:
        """
        Return the statements that asked for a position, whoever sent them, for one read.
        """
        return (self.asked.by_monitors + self.asked.by_reads) / self.reads


_RYW: Final = "read(), READ_YOUR_WRITES"
_CAUSAL: Final = "read(), CAUSAL"
_CHOOSE: Final = "choose(), READ_YOUR_WRITES"
_WAITING: Final = "choose() that waits, replay paused"


def run(bench: Bench) -> None:
    """
    Measure the probes.
    """
    settings = {"shared_preload_libraries": "pg_stat_statements"}
    with stage.servers(bench, settings) as pg, ExitStack() as stack:
        pg.primary.execute("CREATE EXTENSION pg_stat_statements")
        pg.wait_caught_up()
        watched = stack.enter_context(Watched(list(pg.replicas.values())))
        sent = stack.enter_context(Sent())
        found = asyncio.run(_all(bench, pg, watched, sent))
    _report(bench, found)


async def _all(bench: Bench, pg: EmbeddedCluster, watched: Watched, sent: Sent) -> list[Found]:
    found: list[Found] = []

    async def measure(read: _Read, *loads: Load) -> None:
        for load in loads:
            found.append(await _measure(load, read, bench.rounds(10, 3), watched, sent))
            bench.say(_line(found[-1]))

    pools = {"min_size": stage.POOL_SIZE, "kwargs": {"autocommit": True}}
    async with stage.async_router(**stage.nodes(pg), pool_options=pools) as router:
        token = await router.token()
        pg.wait_caught_up()
        await measure(_reading(router, token, Consistency.READ_YOUR_WRITES), *_at_rates(_RYW))
        causal = _reading(router, token, Consistency.CAUSAL)
        await measure(causal, *_at_rates(_CAUSAL), *_together(_CAUSAL))
        await measure(_choosing(router, token, Reason.CAUGHT_UP), *_at_rates(_CHOOSE))
    # A replica whose lag exceeds the bound is not waited for.
    patient = {"max_lag_seconds": 600.0, "pin_seconds": 600.0}
    async with stage.async_router(**stage.nodes(pg), **patient, pool_options=pools) as router:
        for replica in pg.replicas.values():
            replica.pause_replay()
        pg.primary.execute("INSERT INTO orders (item, quantity) VALUES (1, 1)")
        waiting = _choosing(router, await router.token(), Reason.NOT_CAUGHT_UP)
        await measure(waiting, Load(_WAITING, LOW, AT_ONCE), Load(_WAITING, HIGH, WAITING_AT_ONCE))
    return found


def _at_rates(what: str) -> list[Load]:
    return [Load(what, LOW, AT_ONCE), Load(what, HIGH, AT_ONCE)]


def _together(what: str) -> list[Load]:
    return [Load(what, None, 1), Load(what, None, AT_ONCE)]


async def _measure(load: Load, read: _Read, seconds: float, watched: Watched, sent: Sent) -> Found:
    # Reads begin before and go on after what is measured, so that none of the numbers is of a
    # time with less of them.
    ended = asyncio.Event()
    done = [0]
    driving = asyncio.create_task(_drive(load, read, ended, done))
    await asyncio.sleep(SETTLE_SECONDS)
    with watched.at_work() as seen:
        before, served, reads = sent.asked(), watched.served(), done[0]
        began = time.monotonic()
        await asyncio.sleep(seconds)
        taken = time.monotonic() - began
        asked, served, reads = sent.since(before), watched.served() - served, done[0] - reads
    ended.set()
    await driving
    return Found(load, taken, reads, asked, served, max(seen))


async def _drive(load: Load, read: _Read, ended: asyncio.Event, done: list[int]) -> None:
    began, tickets = time.monotonic(), 0

    async def reader() -> None:
        nonlocal tickets
        while not ended.is_set():
            if load.rate is not None:
                due = began + tickets / load.rate
                tickets += 1
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            await read()
            done[0] += 1

    await asyncio.gather(*(reader() for _ in range(load.tasks)))


# What is asked of the router


def _reading(router: AsyncRouter, token: Token, level: Consistency) -> _Read:
    async def read() -> None:
        with Session(token) as session:
            async with router.read(consistency=level) as conn:
                await conn.execute(stage.SELECT, (stage.ITEM,))
            assert session.last_route is not None
            assert not session.last_route.is_primary, session.last_route

    return read


def _choosing(router: AsyncRouter, token: Token, expected: Reason) -> _Read:
    async def choose() -> None:
        with Session(token):
            route = await router.choose(consistency=Consistency.READ_YOUR_WRITES)
        assert route.reason is expected, route

    return choose


# What was found


def _report(bench: Bench, found: list[Found]) -> None:
    by_load = {(each.load.what, each.load.rate, each.load.tasks): each for each in found}
    bench.find(
        "probes.in_flight",
        "probes in flight at once to one replica, the most",
        max(each.asked.most_in_flight for each in found),
        "probes",
        at_most=1.0,
    )
    bench.find(
        "probes.at_work",
        f"probes of {MONITOR} that a replica was seen to answer at once, the most",
        max(each.at_work for each in found),
        "probes",
        at_most=1.0,
    )
    for key, what, tasks, bar in (
        ("read_your_writes", _RYW, AT_ONCE, 1.2),
        ("choose", _CHOOSE, AT_ONCE, 1.2),
        ("waiting", _WAITING, WAITING_AT_ONCE, 1.2),
        ("causal", _CAUSAL, AT_ONCE, None),
    ):
        low, high = by_load[what, LOW, AT_ONCE], by_load[what, HIGH, tasks]
        bench.find(
            f"probes.{key}",
            f"{what}: probes a second at {_rate(high)} reads a second over {_rate(low)}",
            high.probes / low.probes,
            at_most=bar,
        )
    for key, tasks, about in (("alone", 1, "alone"), ("crowd", AT_ONCE, f"{AT_ONCE} at once")):
        bench.find(
            f"probes.causal.{key}",
            f"position statements for a read at CAUSAL, {about}",
            by_load[_CAUSAL, None, tasks].positions,
            "statements",
        )
    _table(bench, found)


def _table(bench: Bench, found: list[Found]) -> None:
    bench.table(
        "What a replica is asked",
        [
            "load",
            "reads a second",
            "probes a second",
            "in flight",
            "of reads themselves, a second",
            "for one read",
            "counted by the replicas",
        ],
        [
            [
                f"{each.load.what}, {_asked_for(each.load)}",
                _rate(each),
                f"{each.probes:.1f}",
                f"{each.asked.most_in_flight}",
                f"{each.asked.by_reads / each.seconds:.0f}",
                f"{each.positions:.3f}",
                f"{each.served} of {each.asked.by_monitors + each.asked.by_reads}",
            ]
            for each in found
        ],
        note=f"Probes are a monitor's, of one replica. {HIGH:.0f} reads a second are what is asked "
        "for; beside it stands what one process reached. A read at CAUSAL asks by itself when it "
        "is alone on its replica, otherwise all that end together share a probe of the monitor. "
        "Connections are in autocommit mode. Waiting choices wait for wait_seconds, 0.1 s.",
    )


def _asked_for(load: Load) -> str:
    if load.rate is None:
        return "one after the other" if load.tasks == 1 else f"{load.tasks} at once"
    return f"{load.rate:.0f} a second"


def _rate(found: Found) -> str:
    return f"{found.reads / found.seconds:,.0f}"


def _line(found: Found) -> str:
    return (
        f"{found.load.what}, {_asked_for(found.load)}: {_rate(found)} reads a second, "
        f"{found.probes:.1f} probes a second, {found.asked.most_in_flight} in flight "
        f"({found.at_work} seen at work), {found.positions:.3f} statements a read"
    )
