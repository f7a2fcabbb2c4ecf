"""
Negative controls: routers with a known mistake are caught, and beside them the library is not.

Each runs the clients of `tests.faults.workload` over a control and over the library at the same
time, on the same cluster under the same faults, until the checker has caught the control. A
checker that finds nothing there would find nothing in a nemesis run either.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest

from lsn_consistency import AsyncRouter, Lsn
from lsn_consistency.testing import EmbeddedCluster, Report, check
from tests.faults.controls import (
    Control,
    LagOnly,
    RandomReplica,
    TextOrder,
    TokenRouter,
    TrustedObservations,
    WritePosition,
)
from tests.faults.workload import Library, Workload

pytestmark = pytest.mark.cluster

ASYNCHRONOUS = "-c synchronous_commit=off"
LAST_OF_SEVEN_DIGITS = Lsn.parse("0/F000000")
FIRST_OF_EIGHT_DIGITS = Lsn.parse("0/10000000")

CAUGHT = 10
"""This many violations of a control are enough."""

REPLICA_READS = 100
"""This many reads of the library that replicas served prove something."""

MANY: dict[str, Any] = {"clients": 30, "think_seconds": 0.1, "session_length": 100}
"""Many clients whose sessions outlive a crash."""

PAST_SECONDS = 10.0
LIMIT_SECONDS = 60.0
ROUND_SECONDS = 0.5
SEED = 20

Fault = Callable[[EmbeddedCluster], object]
_runs = count(1)
"""All runs share a table, and a replica may show what was there long ago: each has own keys."""


@dataclass(frozen=True)
class Verdict:
    """
    Hold what the checker says of a control, and of the library under the same faults.
    """

    control: Report
    library: Report
    replica_reads: int
    unanswered: int

    def assert_caught(self, *rules: str) -> None:
        """
        Assert that the control broke these rules at least, and that the library broke none.
        """
        broken = {violation.rule for violation in self.control.violations}
        assert set(rules) <= broken, str(self.control)
        self.assert_library()

    def assert_library(self) -> None:
        """
        Assert that the library used the replicas, answered every read, and broke no rule.
        """
        assert self.library.ok, str(self.library)
        assert self.replica_reads >= REPLICA_READS
        assert 0 == self.unanswered


def judge(
    pg: EmbeddedCluster,
    kind: type[Control],
    *,
    options: str = "",
    faults: Sequence[Fault] = (),
    enough: int = CAUGHT,
    **choices: Any,
) -> Verdict:
    """
    Run a control and the library until the control is caught and replicas have served both.

    ``options`` are settings of the clients' connections, ``choices`` options of the `Workload`.
    ``faults`` come in turn, again and again; meanwhile the clients of the control think, so that
    it is judged by what they see afterwards, and those of the library go on. ``enough`` is the
    number of violations at which the control is caught.
    """
    nodes = {name: node.conninfo_for("app", options=options) for name, node in pg.nodes.items()}
    primary = nodes.pop("primary")

    async def run() -> Verdict:
        router = AsyncRouter(primary=primary, replicas=nodes)
        async with aclosing(kind(primary, nodes, SEED)) as control, router:
            number = next(_runs)
            wrong = Workload(control, f"control {number}", seed=SEED, **choices)
            right = Workload(Library(router), f"library {number}", seed=SEED, **choices)
            async with wrong.running(), right.running():
                await _until_caught(pg, wrong, right, faults, enough)
            replica_reads = right.served_by("replica")
            return Verdict(
                check(wrong.history), check(right.history), replica_reads, right.unanswered
            )

    return asyncio.run(run())


async def _until_caught(
    pg: EmbeddedCluster, wrong: Workload, right: Workload, faults: Sequence[Fault], enough: int
) -> None:
    ends = time.monotonic() + LIMIT_SECONDS
    for turn in count():
        await asyncio.sleep(ROUND_SECONDS)
        if faults:
            async with wrong.held():
                await asyncio.to_thread(faults[turn % len(faults)], pg)
        caught = len(check(wrong.history).violations) >= enough
        served = min(map(_replica_reads, (wrong, right))) >= REPLICA_READS
        if (caught and served and turn) or time.monotonic() > ends:
            return


def _replica_reads(workload: Workload) -> int:
    return workload.served_by("replica")


def test_a_random_replica_is_caught(pg: EmbeddedCluster) -> None:
    """Whoever reads from any replica, one of which has paused, misses what it wrote and saw."""
    pg.replicas["replica_1"].pause_replay()
    verdict = judge(pg, RandomReplica)
    verdict.assert_caught("read_your_writes", "monotonic_reads")


def test_a_small_lag_in_time_is_caught(pg: EmbeddedCluster) -> None:
    """A replica that is half a second behind is within the bound, and stale after every write."""
    pg.replicas["replica_1"].apply_delay(0.5)
    verdict = judge(pg, LagOnly)
    verdict.assert_caught("read_your_writes", "monotonic_reads")


def test_the_write_position_after_an_asynchronous_commit_is_caught(pg: EmbeddedCluster) -> None:
    """What is committed and not yet written lies behind ``pg_current_wal_lsn()``."""
    verdict = judge(pg, WritePosition, options=ASYNCHRONOUS)
    verdict.assert_caught("read_your_writes")


def test_positions_compared_as_text_are_caught(pg: EmbeddedCluster) -> None:
    """A replica that stands at ``0/F...`` takes itself for being past ``0/10000000``."""
    _switch_until(pg, LAST_OF_SEVEN_DIGITS)
    assert pg.replicas["replica_1"].replay_lsn() < FIRST_OF_EIGHT_DIGITS
    pg.replicas["replica_1"].pause_replay()
    _switch_until(pg, FIRST_OF_EIGHT_DIGITS)
    verdict = judge(pg, TextOrder)
    verdict.assert_caught("read_your_writes", "monotonic_reads")


def test_observations_trusted_over_a_crash_are_caught(pg: EmbeddedCluster) -> None:
    """A replica comes back from a crash in the past, and what it had shown says nothing then."""
    verdict = judge(pg, TrustedObservations, faults=CRASHES, **MANY)
    verdict.assert_caught("monotonic_reads")


@pytest.mark.parametrize("fault", ["pause", "asynchronous", "crash"])
def test_it_is_the_mistake_that_is_caught(pg: EmbeddedCluster, fault: str) -> None:
    """The same router without a mistake breaks no rule under the same faults."""
    if fault == "pause":
        pg.replicas["replica_1"].pause_replay()
    verdict = judge(
        pg,
        TokenRouter,
        options=ASYNCHRONOUS if fault == "asynchronous" else "",
        faults=CRASHES if fault == "crash" else (),
        enough=0,
        **(MANY if fault == "crash" else {}),
    )
    assert verdict.control.ok, str(verdict.control)
    verdict.assert_library()


def _switch_until(pg: EmbeddedCluster, lsn: Lsn) -> None:
    """
    Go on to new segments of the log until the primary has reached a position, and the replicas.
    """
    with pg.primary.connect() as conn:
        while True:
            conn.execute("SELECT pg_logical_emit_message(true, 'something to switch', '')")
            row = conn.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
            if row is not None and Lsn.parse(row[0]) >= lsn:
                break
            conn.execute("SELECT pg_switch_wal()")
    pg.wait_caught_up()


def _crash_into_the_past(pg: EmbeddedCluster) -> None:
    """
    Let a replica come back from a crash without what it applied in the last seconds.

    The delay does nothing to what it has applied already, but it does after the crash, when the
    replica applies that again.
    """
    replica = pg.replicas["replica_1"]
    replica.apply_delay(PAST_SECONDS)
    replica.crash_backend()


def _catch_up(pg: EmbeddedCluster) -> None:
    """
    Let that replica apply everything.
    """
    pg.replicas["replica_1"].apply_delay(0)
    pg.wait_caught_up()


CRASHES: Sequence[Fault] = (_crash_into_the_past, _catch_up)
