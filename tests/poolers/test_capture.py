"""The position of a write that went through a pooler, and of reads that did."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psycopg
import pytest

from lsn_consistency.testing import EmbeddedCluster, PgBouncer
from tests.cluster.harness import App
from tests.poolers.pgbouncer import OpenThrough

WORKERS = 4
WRITES = {"transaction": 400, "session": 100}

Answers = list[tuple[int, int]]
"""How many rows each read found, and the port of its server."""


@pytest.fixture
def _soon_flushed(pg: EmbeddedCluster) -> Iterator[None]:
    """Flush asynchronous commits as on any server, only sooner: a read waits for it."""
    pg.primary.configure("wal_writer_delay", "10ms")
    yield
    pg.primary.configure("wal_writer_delay", "200ms")


@pytest.mark.usefixtures("_soon_flushed")
def test_asynchronous_commits_through_a_pooler_are_all_read(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str
) -> None:
    """
    400 writes with synchronous_commit=off, each read with its token, one replica paused: 0 stale.

    The negative control reads the same rows through the same pooler as a token taken from
    pg_current_wal_lsn() would allow: stale in many.
    """
    writes = WRITES[pooler.pool_mode]
    running, paused = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with through(wait_seconds=10.0) as app:
        paused.pause_replay()

        def client(number: int) -> tuple[Answers, int]:
            rows = range(number * writes, number * writes + writes // WORKERS)
            return _write_and_read(app, pooler, table, rows)

        found = app.each(WORKERS, client)
    answers = [answer for each, _ in found for answer in each]
    assert [(1, running.port)] * writes == answers
    # How many depends on how soon the WAL writer gets its turn.
    assert sum(stale for _, stale in found) > 0


@pytest.mark.usefixtures("_soon_flushed")
def test_a_delayed_replica_behind_a_pooler_is_never_read_too_soon(
    through: OpenThrough, pg: EmbeddedCluster, table: str
) -> None:
    """Every commit is applied 0.1 s late: no read misses its write, and the replica serves."""
    delayed = pg.replicas["replica_1"]
    with through(only="replica_1", wait_seconds=10.0, max_lag_seconds=9.0, pin_seconds=9.0) as app:
        delayed.apply_delay(0.1)

        def client(number: int) -> Answers:
            answers = []
            for row in range(number * 100, number * 100 + 5):
                with app.session():
                    _insert(app, table, row)
                    answers.append(_count(app, table, row))
            return answers

        answers = [answer for each in app.each(WORKERS, client) for answer in each]
    assert [(1, delayed.port)] * WORKERS * 5 == answers


@pytest.mark.usefixtures("_soon_flushed")
def test_what_was_read_through_a_pooler_is_there_in_the_next_read(
    through: OpenThrough, pg: EmbeddedCluster, table: str
) -> None:
    """A client that writes nothing, one of the replicas paused: it never reads an older state."""
    with through(wait_seconds=10.0) as app:
        pg.replicas["replica_2"].pause_replay()
        pairs = []
        for row in range(12):
            _insert(app, table, row)
            with app.session() as first:
                seen, _ = _count(app, table)
            with app.session(first.token):
                pairs.append((seen, _count(app, table)[0]))
    assert [] == [(before, after) for before, after in pairs if after < before]


def _write_and_read(app: App, pooler: PgBouncer, table: str, rows: range) -> tuple[Answers, int]:
    """Return what each read gave, and how many rows the control did not see."""
    answers: Answers = []
    stale = 0
    primary = psycopg.connect(pooler.conninfo_for("primary"), autocommit=True)
    replica = psycopg.connect(pooler.conninfo_for("replica_1"), autocommit=True)
    with primary, replica:
        primary.prepare_threshold = replica.prepare_threshold = None
        for row in rows:
            with app.session():
                _insert(app, table, row)
                stale += not _control_sees(primary, replica, table, row)
                answers.append(_count(app, table, row))
    return answers, stale


def _control_sees(
    primary: psycopg.Connection, replica: psycopg.Connection, table: str, row: int
) -> bool:
    """Read as soon as the replica has replayed the primary's write position."""
    written = _one(primary, "SELECT pg_current_wal_lsn()::text")
    ends = time.monotonic() + 10
    while not _one(replica, f"SELECT pg_last_wal_replay_lsn() >= '{written}'"):
        assert time.monotonic() < ends
        time.sleep(0.001)
    return bool(_one(replica, f"SELECT count(*) FROM {table} WHERE id = {row}"))


def _insert(app: App, table: str, row: int) -> None:
    with app.writing() as conn:
        conn.execute("SET LOCAL synchronous_commit = off")
        conn.execute(f"INSERT INTO {table} VALUES (%s)", [row])


def _count(app: App, table: str, row: int | None = None) -> tuple[int, int]:
    condition = "true" if row is None else f"id = {row}"
    answer = app.ask(f"SELECT count(*) FROM {table} WHERE {condition}")
    return answer.value, answer.port


def _one(conn: psycopg.Connection, statement: str) -> object:
    row = conn.execute(statement.encode()).fetchone()
    assert row is not None
    return row[0]
