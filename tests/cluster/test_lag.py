"""Bounded staleness: how old the data of a routed read is, measured by the data itself."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import psycopg
import pytest

from lsn_consistency import Consistency, Lsn, Reason
from lsn_consistency.events import LagExceeded
from lsn_consistency.testing import EmbeddedCluster, Replica
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import (
    KINDS,
    App,
    insert_lsn,
    make_table,
    open_router,
    wait_until,
    write_wal,
)

TICK_SECONDS = 0.02
MAX_LAG = 0.6
POLL = 0.15
TOLERANCE = 0.25
"""The tick, the flush delay of asynchronous commits, and a read's own time on a busy machine."""


@contextmanager
def _ticking(pg: EmbeddedCluster, table: str) -> Iterator[None]:
    """Keep the time in a row of the primary, so that a read tells how old its data is."""
    pg.primary.execute(f"ALTER TABLE {table} ALTER value TYPE float8")
    pg.primary.execute(f"INSERT INTO {table} VALUES (0, %s)", [time.monotonic()])
    pg.wait_caught_up()
    done = threading.Event()

    def tick() -> None:
        with pg.primary.connect() as conn:
            while not done.wait(TICK_SECONDS):
                conn.execute(f"UPDATE {table} SET value = %s".encode(), [time.monotonic()])

    thread = threading.Thread(target=tick, name="scenario ticks")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _ages(app: App, table: str, seconds: float, least: int = 0) -> list[tuple[float, int, float]]:
    """Read as new clients for a time, and so often: when, from which port, how old the data was."""
    found: list[tuple[float, int, float]] = []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends or len(found) < least:
        with app.session():
            asked = time.monotonic()
            answer = app.ask(f"SELECT value FROM {table}")
        found.append((asked, answer.port, asked - answer.value))
        time.sleep(0.002)
    return found


def _cut_off(replica: Replica) -> None:
    replica.stop_replication()


def _pause(replica: Replica) -> None:
    replica.pause_replay()


def _delay(replica: Replica) -> None:
    replica.apply_delay(20.0)


@pytest.mark.parametrize("fault", [_cut_off, _pause, _delay])
def test_a_replica_that_falls_behind_is_left_out_within_one_poll_of_the_bound(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, fault: Callable[[Replica], None]
) -> None:
    """
    Walreceiver stopped, replay paused or delayed while the primary writes: over the bound within
    one poll, left out; and no routed read, whenever it comes, gets data older than the bound.
    """
    behind, well = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with _ticking(pg, table), opened(max_lag_seconds=MAX_LAG, poll_interval=POLL) as app:
        before = _ages(app, table, 0.3)
        fault(behind)
        stopped = time.monotonic()
        meanwhile = _ages(app, table, stopped + MAX_LAG + POLL - time.monotonic())
        after = _ages(app, table, 0.5, least=21)
        lag = app.snapshot()[behind.name]["lag_seconds"]
    assert {behind.port, well.port} == {port for _, port, _ in before}
    assert {well.port} == {port for _, port, _ in after}
    assert [] == [age for _, _, age in before + meanwhile + after if age > MAX_LAG + TOLERANCE]
    assert lag is None or lag > MAX_LAG


def test_with_every_replica_over_the_bound_the_primary_serves_and_a_warning_tells(
    opened: OpenRouter,
    pg: EmbeddedCluster,
    table: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """LAG_EXCEEDED: every healthy replica is over max_lag_seconds: primary, one WARNING."""
    with _ticking(pg, table), opened(max_lag_seconds=MAX_LAG, poll_interval=POLL) as app:
        for replica in pg.replicas.values():
            replica.pause_replay()
        stopped = time.monotonic()
        time.sleep(MAX_LAG + POLL)
        ages = _ages(app, table, 0.5)
        with app.session():
            answer = app.ask("SELECT 1")
        events = app.events_of(LagExceeded)
    assert time.monotonic() > stopped + MAX_LAG
    assert {pg.primary.port} == {port for _, port, _ in ages}
    assert (pg.primary.port, Reason.LAG_EXCEEDED) == (answer.port, answer.route.reason)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert (1, 1) == (len(warnings), len(events))
    assert MAX_LAG == events[0].limit_seconds
    assert set(pg.replicas) == set(events[0].lag_seconds)


def test_bounded_reads_hold_their_own_bound(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """bounded(seconds): the data is at most that old, also where it is above the router's bound."""
    behind = pg.replicas["replica_1"]
    nodes = {behind.name: behind.conninfo}
    with (
        _ticking(pg, table),
        opened(replicas=nodes, max_lag_seconds=0.3, poll_interval=POLL) as app,
    ):
        app.wait_healthy()
        behind.pause_replay()
        paused = time.monotonic()
        found = []
        while time.monotonic() < paused + 1.8:
            with app.session():
                asked = time.monotonic()
                answer = app.ask(f"SELECT value FROM {table}", consistency=Consistency.bounded(1.2))
            found.append((asked - paused, answer.port, asked - answer.value))
            time.sleep(0.01)
    assert [] == [age for _, _, age in found if age > 1.2 + TOLERANCE]
    # Used for as long as it may be, and not after.
    assert {behind.port} == {port for since, port, _ in found if since < 0.7}
    assert {pg.primary.port} == {port for since, port, _ in found if since > 1.2 + TOLERANCE}


def test_a_replica_that_has_replayed_no_commit_and_is_megabytes_behind_is_not_used(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """
    A replica that has replayed no commit since its start has no replay timestamp: a lag computed
    from that is NULL, and taken for none it would serve data that is megabytes old.
    """
    behind, well = pg.replicas["replica_1"], pg.replicas["replica_2"]
    # The replica restarts where no commit is left for it to replay.
    pg.primary.execute("CHECKPOINT")
    pg.wait_caught_up()
    behind.execute("CHECKPOINT")
    behind.stop_replication()
    behind.stop()
    write_wal(pg.primary, 8)
    pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
    end = insert_lsn(pg.primary)
    behind.start()
    wait_until(lambda: well.value(f"SELECT count(*) FROM {table}") == 1)
    assert behind.value("SELECT pg_last_xact_replay_timestamp()") is None
    assert end - behind.replay_lsn() > 8 * 1024 * 1024
    with opened() as app:
        app.wait_healthy()
        counts = []
        for consistency in (None, Consistency.READ_YOUR_WRITES, Consistency.bounded(30.0)):
            for _ in range(30):
                with app.session():
                    answer = app.ask(f"SELECT count(*) FROM {table}", consistency=consistency)
                counts.append((answer.value, answer.port))
        lag = app.snapshot()[behind.name]["lag_seconds"]
        well.stop()
        with app.session():
            last = app.ask(f"SELECT count(*) FROM {table}")
    assert {(1, well.port)} == set(counts)
    assert lag is None
    assert (1, pg.primary.port) == (last.value, last.port)


@pytest.mark.slow
def test_an_idle_primary_leaves_caught_up_replicas_eligible(pg: EmbeddedCluster) -> None:
    """
    Idle primary for 10 s, replicas caught up: still eligible, lag near 0; both kinds side by side.

    The lag is how long ago the primary was looked at. Where the server itself has just written a
    record, which it does about 10 s after the last commit, that adds up over two polls.

    Then an open transaction leaves WAL that is not flushed, which no replica can have for up to
    15 s: nothing that anybody could read is missing, so they stay eligible.
    docs/limits.md names the exception, a record of which a part is flushed: the test avoids it.
    """
    table = make_table(pg, "items")
    with ExitStack() as stack:
        apps = [stack.enter_context(open_router(kind, pg, wait_seconds=0.5)) for kind in KINDS]
        # A commit flushes what connections have left, such as pages with hint bits.
        pg.primary.execute(f"INSERT INTO {table} VALUES (0)")
        pg.wait_caught_up()
        idle = [sample for _ in range(20) for sample in _idle_samples(pg, apps, 0.5)]
        sleeper = stack.enter_context(pg.primary.connect(autocommit=False))
        unflushed = []
        for _ in range(10):
            _leave_unflushed(pg, apps, sleeper, table)
            unflushed += _idle_samples(pg, apps, 0.5)
        sleeper.rollback()
    for samples in (idle, unflushed):
        assert {Reason.WITHIN_LAG} == {each.reason for each in samples}
        assert pg.primary.port not in {each.port for each in samples}
        assert max(each.lag for each in samples) < 1.5
    # Three rounds of samples take longer than two polls.
    earlier = zip(idle, idle[3 * len(apps) :], strict=False)
    still = [each for before, each in earlier if before.position == each.position]
    assert 10 < len(still)
    assert max(each.lag for each in still) < 0.8


def _leave_unflushed(
    pg: EmbeddedCluster, apps: list[App], sleeper: psycopg.Connection[Any], table: str
) -> None:
    # What was left before may do still.
    for _ in range(20):
        ahead = "SELECT pg_current_wal_insert_lsn() > pg_current_wal_flush_lsn()"
        flushed = pg.primary.value("SELECT pg_current_wal_flush_lsn()")
        replayed = {
            replica.value("SELECT pg_last_wal_replay_lsn()") for replica in pg.replicas.values()
        }
        if pg.primary.value(ahead) and replayed == {flushed}:
            return
        sleeper.commit()
        # A lag is measured from where the primary was seen: let it be seen without the next row.
        wait_until(lambda: _greatest_lag(apps) < 0.5, 10.0)
        sleeper.execute(f"INSERT INTO {table} SELECT count(*) + 1 FROM {table}".encode())
        # The walwriter flushes the whole pages of it.
        time.sleep(0.3)
    raise AssertionError("no record stayed whole in what is not flushed")


def _greatest_lag(apps: list[App]) -> float:
    lags = [node["lag_seconds"] for app in apps for node in app.snapshot().values()]
    return max(math.inf if lag is None else lag for lag in lags)


class _Sample(NamedTuple):
    reason: Reason
    port: int
    lag: float
    position: Lsn
    """Where the primary was."""


def _idle_samples(pg: EmbeddedCluster, apps: list[App], pause: float) -> list[_Sample]:
    samples = []
    for app in apps:
        with app.session():
            answer = app.ask("SELECT 1", consistency=Consistency.bounded(2.0))
        lags: list[Any] = [node["lag_seconds"] for node in app.snapshot().values()]
        position = insert_lsn(pg.primary)
        samples.append(_Sample(answer.route.reason, answer.port, max(lags), position))
    time.sleep(pause)
    return samples
