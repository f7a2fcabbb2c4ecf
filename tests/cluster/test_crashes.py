"""
Replicas that come back from a crash in the past and serve it (facts 4).

After a crash a standby opens for reads as soon as it is consistent, which can be hundreds of
megabytes before the position that it had shown. To make that so here, the cluster of these tests
never writes back pages and makes no restartpoints, so recovery begins where the base backup ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import psycopg
import pytest

from lsn_consistency import Lsn
from lsn_consistency.testing import EmbeddedCluster, Replica
from tests.cluster.harness import App, Connection, Kind, open_router, wait_until

Crash = Literal["server", "backend"]

SETTINGS = {
    "shared_buffers": "256MB",
    "bgwriter_lru_maxpages": "0",
    "checkpoint_timeout": "1h",
    "max_wal_size": "8GB",
    "wal_keep_size": "4GB",
    # Neither may write behind the tests' back.
    "autovacuum": "off",
}
LOAD_ROWS = 1_000_000
CLIENTS = 3


@pytest.fixture(scope="module")
def crashing() -> Iterator[EmbeddedCluster]:
    """Run a cluster whose replica has much to replay after a crash."""
    with EmbeddedCluster(replicas=1, settings=SETTINGS) as cluster:
        cluster.primary.execute("CREATE TABLE bulk (id int)")
        cluster.primary.execute("CREATE TABLE items (id int PRIMARY KEY)")
        cluster.primary.execute(f"INSERT INTO bulk SELECT generate_series(1, {LOAD_ROWS})")
        cluster.wait_caught_up()
        yield cluster


@dataclass
class Watch:
    """
    Hold what the replica itself showed to somebody who asked it all the time.
    """

    positions: list[tuple[Lsn, int]] = field(default_factory=list)

    @contextmanager
    def watching(self, replica: Replica) -> Iterator[None]:
        """
        Ask the replica on one connection after the other for the time of the block.
        """
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                try:
                    with psycopg.connect(replica.conninfo, autocommit=True) as conn:
                        while not done.is_set():
                            self._ask(conn)
                except psycopg.Error:
                    time.sleep(0.001)

        thread = threading.Thread(target=watch, name="scenario watch")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _ask(self, conn: psycopg.Connection[tuple[str, int]]) -> None:
        row = conn.execute(
            "SELECT pg_last_wal_replay_lsn()::text, (SELECT count(*) FROM items)"
        ).fetchone()
        if row is not None:
            self.positions.append((Lsn.parse(row[0]), row[1]))
        time.sleep(0.002)


@dataclass
class Clients:
    """
    Clients that write, then read with their token, on and on; what they saw is in ``reads``.
    """

    app: App
    first_row: int
    reads: list[tuple[int, int, float]] = field(default_factory=list)
    stale: list[tuple[int, int]] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        """
        Run them for the time of the block; what one of them raises is raised here.
        """
        done = threading.Event()
        old = self.app.token()
        known = self.app.write("SELECT count(*) FROM items")[0][0]

        def client(number: int) -> None:
            row = self.first_row + number
            while not done.is_set():
                row += CLIENTS
                with self.app.session():
                    self.app.write("INSERT INTO items VALUES (%s)", [row])
                    self._read(f"SELECT count(*) FROM items WHERE id = {row}", 1)
                with self.app.session(old):
                    self._read("SELECT count(*) FROM items", known)

        futures = self.app.start_each(CLIENTS, client)
        try:
            yield
        finally:
            done.set()
            for future in futures:
                future.result(30)

    def _read(self, statement: str, least: int) -> None:
        count, port = self.app.run_read(lambda conn: (conn.value(statement), conn.port))
        self.reads.append((count, port, time.monotonic()))
        if count < least:
            self.stale.append((count, port))

    def served_by(self, port: int, since: float = 0.0) -> int:
        """
        Count the reads of a server since a time.
        """
        return sum(1 for _, by, when in self.reads if by == port and when >= since)


@pytest.mark.parametrize("crash", ["server", "backend"])
def test_a_replica_that_comes_back_in_the_past_is_not_used_before_it_has_caught_up(
    kind: Kind, crash: Crash, crashing: EmbeddedCluster
) -> None:
    """Replica restarted by a crash under load and serving the past: 0 stale reads."""
    replica = crashing.replicas["replica_1"]
    watch = Watch()
    with open_router(kind, crashing, wait_seconds=0.5) as app:
        clients = Clients(app, _next_row(crashing))
        with clients.running():
            wait_until(lambda: clients.served_by(replica.port) > 50)
            before = replica.replay_lsn()
            rows = crashing.primary.value("SELECT count(*) FROM items")
            crashing.wait_caught_up()
            with watch.watching(replica):
                _crash(replica, crash)
                crashing.wait_caught_up()
                wait_until(lambda: watch.positions and watch.positions[-1][0] >= before)
            back = time.monotonic()
            wait_until(lambda: clients.served_by(replica.port, back) > 50)
    assert [] == clients.stale
    # The replica really served the past, and to somebody who did not look it was stale.
    first, count = min(watch.positions)
    assert before - first > 1024 * 1024
    assert count < rows


def test_a_token_is_not_believed_on_a_connection_made_before_the_crash(
    kind: Kind, crashing: EmbeddedCluster
) -> None:
    """What the monitor saw before a crash serves nobody after it, even for a token long reached."""
    replica = crashing.replicas["replica_1"]
    counts: list[tuple[int, int]] = []
    watch = Watch()
    with open_router(kind, crashing, wait_seconds=0.0, poll_interval=0.5) as app:
        app.write("INSERT INTO items VALUES (%s)", [_next_row(crashing)])
        rows = crashing.primary.value("SELECT count(*) FROM items")
        token = app.token()
        crashing.wait_caught_up()
        app.choose(token, timeout=5.0)
        with watch.watching(replica):
            replica.crash()
            replica.start()
            while not counts or counts[-1][1] != replica.port:
                with app.session(token):
                    counts.append(app.run_read(_count_and_port))
                assert len(counts) < 20_000
    assert {rows} == {count for count, _ in counts}
    assert min(watch.positions)[1] < rows


def _count_and_port(conn: Connection) -> tuple[int, int]:
    return conn.value("SELECT count(*) FROM items"), conn.port


def _crash(replica: Replica, crash: Crash) -> None:
    if crash == "backend":
        replica.crash_backend()
    else:
        replica.crash()
        replica.start()


def _next_row(cluster: EmbeddedCluster) -> int:
    return int(cluster.primary.value("SELECT coalesce(max(id), 0) + 1000 FROM items"))
