"""Read your writes: what a session wrote is there, wherever its reads go."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from lsn_consistency import Reason, current_session
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App, Connection

WORKERS = 4
WRITES = 400


def test_with_both_replicas_paused_the_primary_serves_after_the_wait(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """Write then read, both replicas paused: the row is there, NOT_CAUGHT_UP, after the wait."""
    with opened(wait_seconds=0.3) as app:
        app.write(f"INSERT INTO {table} VALUES (0)")
        for replica in pg.replicas.values():
            replica.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        answer = app.ask(f"SELECT count(*) FROM {table}")
    assert (2, pg.primary.port) == (answer.value, answer.port)
    assert ("primary", "primary", Reason.NOT_CAUGHT_UP) == (
        answer.route.name,
        answer.route.role,
        answer.route.reason,
    )
    assert 0.3 <= answer.route.waited_seconds < 0.6
    assert 0.3 <= answer.seconds < 0.8


def test_the_running_replica_serves_and_the_paused_one_never(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """One replica paused, one running: the running one serves, the paused one never."""
    paused, running = pg.replicas["replica_1"], pg.replicas["replica_2"]
    answers: list[tuple[int, int]] = []
    with opened(wait_seconds=5.0) as app:
        paused.pause_replay()
        for number in range(40):
            app.write(f"INSERT INTO {table} VALUES (%s)", [number])
            for _ in range(3):
                # Each is another client with the same token, so no session keeps its node.
                with app.session(current_session().token):
                    answer = app.ask(f"SELECT count(*) FROM {table}")
                answers.append((answer.value, answer.port))
    assert [(number + 1, running.port) for number in range(40) for _ in range(3)] == answers


def test_a_write_in_a_session_with_a_replica_of_its_own_leaves_that_replica(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """A session keeps its node until it advances past it: then it leaves a paused one at once."""
    with opened(wait_seconds=5.0) as app:
        ports = {node.port: node for node in pg.replicas.values()}
        kept = ports.pop(app.where())
        kept.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        answer = app.ask(f"SELECT count(*) FROM {table}")
    assert (1, next(iter(ports))) == (answer.value, answer.port)


def test_400_asynchronous_commits_are_all_read(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """
    400 writes with synchronous_commit=off, each read with its token: 0 stale.

    The negative control reads the same rows from the same servers as a token taken from
    pg_current_wal_lsn() would allow: stale in most.
    """
    # As on any server, only sooner: a read waits for the WAL writer.
    pg.primary.configure("wal_writer_delay", "10ms")
    try:
        with opened(wait_seconds=5.0) as app:
            found = app.each(WORKERS, lambda worker: _write_and_read(app, pg, table, worker))
    finally:
        pg.primary.configure("wal_writer_delay", "200ms")
    answers = [answer for answers, _ in found for answer in answers]
    stale_by_write_position = sum(stale for _, stale in found)
    replica_ports = {replica.port for replica in pg.replicas.values()}
    assert WRITES == len(answers)
    assert [] == [answer for answer in answers if answer[0] != 1]
    assert replica_ports == {port for _, port in answers}
    assert stale_by_write_position > WRITES / 4


def _write_and_read(
    app: App, pg: EmbeddedCluster, table: str, worker: int
) -> tuple[list[tuple[int, int]], int]:
    """Return count and port of each read, and how many rows the control did not see."""
    answers: list[tuple[int, int]] = []
    stale = 0
    control = list(pg.replicas.values())[worker % len(pg.replicas)]
    with pg.primary.connect() as primary, control.connect() as replica:
        for number in range(WRITES // WORKERS):
            row = worker * WRITES + number
            with app.session():
                with app.writing() as conn:
                    conn.execute("SET LOCAL synchronous_commit = off")
                    conn.execute(f"INSERT INTO {table} VALUES (%s)", [row])
                stale += not _control_sees(primary, replica, table, row)
                answer = app.ask(f"SELECT count(*) FROM {table} WHERE id = %s", [row])
                answers.append((answer.value, answer.port))
    return answers, stale


def _control_sees(
    primary: psycopg.Connection[Any], replica: psycopg.Connection[Any], table: str, row: int
) -> bool:
    """Read as soon as the replica has replayed the primary's write position."""
    written = _one(primary, "SELECT pg_current_wal_lsn()::text")
    while not _one(replica, f"SELECT pg_last_wal_replay_lsn() >= '{written}'"):
        time.sleep(0.001)
    return bool(_one(replica, f"SELECT count(*) FROM {table} WHERE id = {row}"))


def _one(conn: psycopg.Connection[Any], statement: str) -> Any:
    row = conn.execute(statement.encode()).fetchone()
    assert row is not None
    return row[0]


ISOLATIONS = ("server default", "attribute", "set transaction", "begin")


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_read_in_repeatable_read_sees_the_write_before_it(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, isolation: str
) -> None:
    """
    Reads inside REPEATABLE READ after a write are not stale, while the replicas replay.

    The snapshot of such a transaction is its first statement's: had that been the check, the
    read would see what was there before the check (facts 3).
    """
    options: dict[str, Any] = {"kwargs": {"autocommit": isolation == "begin"}}
    nodes = {name: node.conninfo for name, node in pg.nodes.items()}
    if isolation == "server default":
        setting = r"-c default_transaction_isolation=repeatable\ read"
        nodes = {name: make_conninfo(info, options=setting) for name, info in nodes.items()}
    answers = []
    primary = nodes.pop("primary")
    with (
        _load(pg, "load"),
        opened(primary=primary, replicas=nodes, wait_seconds=5.0, pool_options=options) as app,
    ):
        for number in range(50):
            app.write(f"INSERT INTO {table} VALUES (%s)", [number])
            with app.reading() as conn:
                _begin(conn, isolation)
                level = conn.value("SHOW transaction_isolation")
                count = conn.value(f"SELECT count(*) FROM {table}")
                answers.append((count, level, conn.port == pg.primary.port))
                if isolation == "begin":
                    conn.execute("COMMIT")
    assert [(number + 1, "repeatable read", False) for number in range(50)] == answers


def _begin(conn: Connection, isolation: str) -> None:
    if isolation == "attribute":
        conn.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
    elif isolation == "set transaction":
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    elif isolation == "begin":
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")


@contextmanager
def _load(pg: EmbeddedCluster, name: str) -> Iterator[None]:
    """Keep the replicas replaying commits of others for the time of the block."""
    pg.primary.execute(f"CREATE TABLE IF NOT EXISTS {name} (id int)")
    done = threading.Event()

    def write() -> None:
        with pg.primary.connect() as conn:
            while not done.is_set():
                conn.execute(f"INSERT INTO {name} SELECT generate_series(1, 20)".encode())

    thread = threading.Thread(target=write, name="scenario load")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
