"""Monotonic reads: a session never sees an older state than the one it has seen."""

from __future__ import annotations

import threading
from collections import Counter
from typing import NamedTuple

import pytest

from lsn_consistency import Consistency, Lsn, Token, current_session
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import Answer, App, wait_until

DROPPED_TABLES = 1000
SIGHTS = 5


def test_a_session_that_read_from_one_replica_never_reads_an_older_state_from_another(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """
    Monotonic reads at CAUSAL: the replica that is behind what was seen serves nothing.

    The session only reads; another client writes. Its first replica then stops.
    """
    ahead, behind = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with opened(wait_seconds=0.2, max_lag_seconds=30.0, pin_seconds=30.0) as app:
        behind.pause_replay()
        pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
        wait_until(lambda: ahead.value(f"SELECT count(*) FROM {table}") == 1)
        with app.session():
            first = app.ask(f"SELECT count(*) FROM {table}", node=ahead.name)
            others = [app.ask(f"SELECT count(*) FROM {table}") for _ in range(10)]
            ahead.stop()
            without = app.ask(f"SELECT count(*) FROM {table}")
    assert (1, ahead.port) == (first.value, first.port)
    assert {(1, ahead.port)} == {(answer.value, answer.port) for answer in others}
    assert (1, pg.primary.port) == (without.value, without.port)


def test_a_session_that_read_from_the_primary_does_not_go_back_on_a_replica(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """Monotonic reads: what a fallback read saw on the primary counts as well."""
    with opened(wait_seconds=0.1, max_lag_seconds=30.0, pin_seconds=30.0) as app:
        app.wait_healthy()
        for replica in pg.replicas.values():
            replica.pause_replay()
        pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
        counts = []
        with app.session():
            counts.append(app.ask(f"SELECT count(*) FROM {table}", node="primary"))
            counts += [app.ask(f"SELECT count(*) FROM {table}") for _ in range(3)]
    assert [(1, pg.primary.port)] * 4 == [(answer.value, answer.port) for answer in counts]


def test_reads_never_go_back_while_both_replicas_and_the_primary_move(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """Monotonic reads under load, each read a new choice."""
    pg.primary.execute(f"INSERT INTO {table} VALUES (0)")
    pg.wait_caught_up()
    done = threading.Event()

    def write() -> None:
        with pg.primary.connect() as conn:
            while not done.wait(0.001):
                conn.execute(f"UPDATE {table} SET value = value + 1".encode())

    thread = threading.Thread(target=write, name="scenario load")
    thread.start()
    try:
        with opened(wait_seconds=2.0) as app:
            seen = app.each(3, lambda _: _wandering_reads(app, table, 150))
    finally:
        done.set()
        thread.join()
    ports = Counter(port for reads in seen for _, port in reads)
    assert {replica.port for replica in pg.replicas.values()} <= set(ports)
    for reads in seen:
        values = [value for value, _ in reads]
        assert sorted(values) == values


def _wandering_reads(app: App, table: str, count: int) -> list[tuple[int, int]]:
    found = []
    with app.session() as session:
        for _ in range(count):
            # Without a node of its own the session may be sent anywhere.
            session.node = None
            answer = app.ask(f"SELECT value FROM {table}")
            found.append((answer.value, answer.port))
    return found


class SeenEarly(NamedTuple):
    """
    Hold how a row was seen: the replay position before it and at its sight, and what came then.
    """

    before: Lsn
    at_sight: Lsn
    again: Answer
    token: Token


def see_early(opened: OpenRouter, pg: EmbeddedCluster, table: str) -> SeenEarly:
    """Read a row whose commit a replica is still replaying, then lose that replica."""
    ahead, behind = pg.replicas["replica_1"], pg.replicas["replica_2"]
    names = ", ".join(f"many_{number}" for number in range(DROPPED_TABLES))
    pg.primary.execute(
        "DO $$ BEGIN FOR n IN 0 .. "
        f"{DROPPED_TABLES - 1} LOOP EXECUTE format('CREATE TABLE many_%s ()', n); END LOOP; END $$"
    )
    with (
        opened(wait_seconds=0.05, max_lag_seconds=60.0, pin_seconds=60.0) as app,
        pg.primary.connect(autocommit=False) as writer,
        ahead.connect() as witness,
    ):
        writer.execute(f"INSERT INTO {table} VALUES (1)".encode())
        writer.execute(f"DROP TABLE {names}".encode())
        pg.wait_caught_up()
        behind.pause_replay()
        before = behind.replay_lsn()
        committing = app.start_each(1, lambda _: writer.commit())
        with app.session() as session:
            app.read("SELECT 1", node=ahead.name, consistency=Consistency.EVENTUAL)
            count = 0
            while not count:
                count = app.ask(f"SELECT count(*) FROM {table}", node=ahead.name).value
            replayed = witness.execute("SELECT pg_last_wal_replay_lsn()::text").fetchone()
            ahead.stop("immediate")
            again = app.ask(f"SELECT count(*) FROM {table}")
            token = session.token
        committing[0].result(10)
    assert replayed is not None
    return SeenEarly(before, Lsn.parse(replayed[0]), again, token)


def test_a_commit_that_is_seen_before_its_position_is_replayed_is_not_unseen(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """
    Monotonic reads: replay shows a commit that drops many tables long before its position
    covers it (facts 3); a session that saw it needs more than the replay position.
    """
    for _ in range(SIGHTS):
        seen = see_early(opened, pg, table)
        assert (1, pg.primary.port) == (seen.again.value, seen.again.port)
        assert [True] == [each.lsn > seen.before for each in seen.token.positions.values()]
        if seen.before == seen.at_sight:
            # The situation was there: the row was seen while the position was still the old one.
            return
        pg.heal()
        pg.primary.execute(f"TRUNCATE {table}")
    pytest.fail(f"in {SIGHTS} attempts no commit was seen before its position was replayed")


def test_read_your_writes_does_not_advance_on_reads(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """READ_YOUR_WRITES: own writes only; reads leave the token alone, also on the primary."""
    level = Consistency.READ_YOUR_WRITES
    with opened(consistency=level, wait_seconds=5.0) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        token = current_session().token
        pg.primary.execute(f"INSERT INTO {table} VALUES (2)")
        answers = [app.ask(f"SELECT count(*) FROM {table}") for _ in range(3)]
        app.ask("SELECT 1", node="primary")
        unchanged = current_session().token
        app.ask("SELECT 1", consistency=Consistency.CAUSAL)
        moved = current_session().token
    assert token.positions
    assert token == unchanged
    assert min(answer.value for answer in answers) >= 1
    assert token.merge(moved) == moved != token


def test_causal_reads_advance_past_what_they_saw(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """CAUSAL: a token taken after a read makes another client see at least as much."""
    with opened(wait_seconds=5.0, max_lag_seconds=30.0, pin_seconds=30.0) as app:
        ahead, behind = pg.replicas["replica_1"], pg.replicas["replica_2"]
        behind.pause_replay()
        pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
        wait_until(lambda: ahead.value(f"SELECT count(*) FROM {table}") == 1)
        with app.session() as session:
            app.ask("SELECT 1", node=ahead.name)
            token = session.token
        with app.session(token):
            answers = [app.ask(f"SELECT count(*) FROM {table}") for _ in range(10)]
    assert {(1, ahead.port)} == {(answer.value, answer.port) for answer in answers}
