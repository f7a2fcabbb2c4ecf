"""
A replica that crashes and comes back in the past, behind a pooler that keeps its clients.

Without a pooler a crash breaks every connection, so what was observed since a connection was made
is about this life of the server. PgBouncer keeps the clients' connections and makes new ones to
the server, so that rule says nothing: each read has to ask. Here the replica does not only come
back in the past, it stays there: what it had applied lies between its last restartpoint and the
commits that it now delays.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, Literal

import psycopg
import pytest

from lsn_consistency import _sql
from lsn_consistency.testing import EmbeddedCluster, PgBouncer, Replica
from lsn_consistency.testing.pgbouncer import PoolMode
from tests.cluster.harness import App, Kind, wait_until
from tests.cluster.test_crashes import SETTINGS as CRASH_SETTINGS
from tests.cluster.test_crashes import Clients, Watch
from tests.poolers.pgbouncer import SETTINGS, SILENT, clients, open_through

Crash = Literal["server", "backend"]

ROWS = 200_000
PAST_BYTES = 8 * 1024 * 1024
DELAY_SECONDS = 3600.0

CONNECTIONS = 4


@pytest.fixture(scope="module")
def crashing() -> Iterator[EmbeddedCluster]:
    """Run a cluster whose replica writes back nothing by itself."""
    with EmbeddedCluster(replicas=1, settings=CRASH_SETTINGS) as cluster:
        cluster.primary.execute("CREATE TABLE bulk (id int)")
        cluster.primary.execute("CREATE TABLE items (id int PRIMARY KEY)")
        yield cluster


@pytest.fixture
def replica(crashing: EmbeddedCluster) -> Iterator[Replica]:
    """Offer a replica that will come back at its restartpoint, 200 000 rows ago."""
    only = crashing.replicas["replica_1"]
    crashing.primary.execute("TRUNCATE items, bulk")
    crashing.primary.execute("CHECKPOINT")
    crashing.wait_caught_up()
    only.execute("CHECKPOINT")
    # Only commits are delayed: this one holds up everything behind it.
    crashing.primary.execute("INSERT INTO items VALUES (0)")
    crashing.primary.execute(f"INSERT INTO bulk SELECT generate_series(1, {ROWS})")
    crashing.wait_caught_up()
    yield only
    only.start()
    only.apply_delay(0)
    crashing.wait_caught_up()


@pytest.fixture
def pooler(mode: PoolMode, crashing: EmbeddedCluster) -> Iterator[PgBouncer]:
    """Run a PgBouncer before both nodes of that cluster."""
    with PgBouncer(crashing.nodes, mode, settings=SETTINGS) as running:
        yield running


class PatientClients(Clients):
    """Clients that read again when PgBouncer ends their connection in the middle of a read."""

    def _read(self, statement: str, least: int) -> None:
        wait_until(lambda: self._has_read(statement, least))

    def _has_read(self, statement: str, least: int) -> bool:
        try:
            super()._read(statement, least)
        except psycopg.OperationalError:
            return False
        return True


@pytest.mark.parametrize(
    ("mode", "crash"),
    [("transaction", "server"), ("transaction", "backend"), ("session", "server")],
    indirect=["mode"],
)
def test_a_replica_that_stays_in_the_past_behind_a_pooler_is_not_read(
    kind: Kind, crash: Crash, crashing: EmbeddedCluster, replica: Replica, pooler: PgBouncer
) -> None:
    """
    Crashed, back in the past, every client's connection kept by PgBouncer: 0 stale reads.

    The negative control is a client that has checked its connection, which did not break.
    """
    with (
        open_through(kind, crashing, pooler, crashing.nodes, wait_seconds=0.1, **SILENT) as app,
        closing(psycopg.connect(pooler.conninfo_for("replica_1"), autocommit=True)) as control,
    ):
        app.write("INSERT INTO items VALUES (1)")
        crashing.wait_caught_up()
        assert {(2, replica.port)} == set(_read_at_once(app))
        assert 2 == _control_reads(control)
        connected, reached = clients(pooler, "replica_1"), replica.replay_lsn()
        _crash_into_the_past(replica, crash)
        assert reached - replica.replay_lsn() > PAST_BYTES
        if pooler.pool_mode == "transaction":
            assert 0 == _control_reads(control)
            assert connected == clients(pooler, "replica_1")
        during = [answer for _ in range(5) for answer in _read_at_once(app)]
        assert {(2, crashing.primary.port)} == set(during)
        replica.apply_delay(0)
        crashing.wait_caught_up()
        wait_until(lambda: replica.port in {port for _, port in _read_at_once(app)})
        assert {2} == {rows for rows, _ in _read_at_once(app)}


@pytest.mark.parametrize("mode", ["transaction"], indirect=True)
def test_a_router_that_takes_the_pooler_for_a_server_reads_the_past(
    kind: Kind,
    crashing: EmbeddedCluster,
    replica: Replica,
    pooler: PgBouncer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The negative control: the same without the one rule for poolers serves stale reads."""
    _blind(monkeypatch)
    with open_through(kind, crashing, pooler, crashing.nodes, wait_seconds=0.1, **SILENT) as app:
        assert not any(node["pooled"] for node in app.snapshot().values())
        app.write("INSERT INTO items VALUES (1)")
        crashing.wait_caught_up()
        assert {(2, replica.port)} == set(_read_at_once(app))
        _crash_into_the_past(replica, "server")
        assert {(0, replica.port)} == set(_read_at_once(app))


@pytest.mark.parametrize(
    ("kind", "crash"), [("blocking", "server"), ("async", "backend")], indirect=["kind"]
)
@pytest.mark.parametrize("mode", ["transaction"], indirect=True)
def test_clients_go_on_through_a_pooler_while_a_replica_crashes(
    kind: Kind, crash: Crash, crashing: EmbeddedCluster, replica: Replica, pooler: PgBouncer
) -> None:
    """Writers and readers all the time, the replica is back in the past for a while: 0 stale."""
    watch = Watch()
    with open_through(kind, crashing, pooler, crashing.nodes, wait_seconds=0.02) as app:
        load = PatientClients(app, 1000)
        with load.running():
            wait_until(lambda: load.served_by(replica.port) > 50)
            rows = crashing.primary.value("SELECT count(*) FROM items")
            before = replica.replay_lsn()
            _crash_into_the_past(replica, crash)
            with watch.watching(replica):
                served = len(load.reads)
                wait_until(lambda: len(load.reads) > served + 100 and watch.positions, 30)
            replica.apply_delay(0)
            back = time.monotonic()
            wait_until(lambda: load.served_by(replica.port, back) > 50, 30)
    assert [] == load.stale
    # To somebody who did not look, the replica was far behind.
    last, count = max(watch.positions)
    assert before - last > PAST_BYTES
    assert count < rows


def _read_at_once(app: App) -> list[tuple[int, int]]:
    """Read on as many connections at once as the pool has; count and port of each."""
    together = threading.Barrier(CONNECTIONS)

    def read(_: int) -> tuple[int, int]:
        together.wait(30)
        with app.session(app.token()):
            return app.run_read(lambda conn: (conn.value("SELECT count(*) FROM items"), conn.port))

    return app.each(CONNECTIONS, read)


def _crash_into_the_past(replica: Replica, crash: Crash) -> None:
    """Crash the replica; what it had applied since its restartpoint it applies in an hour."""
    replica.apply_delay(DELAY_SECONDS)
    _crash(replica, crash)


def _crash(replica: Replica, crash: Crash) -> None:
    if crash == "backend":
        replica.crash_backend()
    else:
        replica.crash()
        replica.start()


def _control_reads(control: psycopg.Connection) -> int:
    row = control.execute("SELECT count(*) FROM items", prepare=False).fetchone()
    assert row is not None
    return int(row[0])


def _blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every backend taken for the one that the protocol has named."""
    identity, observation = _sql.read_identity, _sql.read_observation

    def read_identity(row: Sequence[str | None], _: int) -> Any:
        return identity(row, int(row[0] or 0))

    def read_observation(known: Any, row: Sequence[str | None], _: int, *times: float) -> Any:
        return observation(known, row, int(row[0] or 0), *times)

    monkeypatch.setattr(_sql, "read_identity", read_identity)
    monkeypatch.setattr(_sql, "read_observation", read_observation)
