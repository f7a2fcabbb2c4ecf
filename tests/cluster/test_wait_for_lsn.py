"""Where the server has WAIT FOR LSN, waiting reads save its monitor the polls, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lsn_consistency import Reason
from lsn_consistency._replay_wait import ReplayWait
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App, wait_until

DELAY_SECONDS = 0.4
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE query ILIKE 'wait for lsn%'"


@pytest.fixture
def pg19(pg: EmbeddedCluster) -> EmbeddedCluster:
    """Offer the cluster where its server is new enough."""
    if pg.version < 19:
        pytest.skip(f"WAIT FOR LSN came with PostgreSQL 19, this is {pg.version}")
    return pg


@contextmanager
def _logged(pg: EmbeddedCluster) -> Iterator[list[str]]:
    """Yield a list that holds, after the block, every statement that replica_1 has run in it."""
    replica = pg.replicas["replica_1"]
    log = Path(replica.log)
    replica.configure("log_statement", "all")
    began = len(log.read_text())
    statements: list[str] = []
    try:
        yield statements
    finally:
        lines = log.read_text()[began:].splitlines()
        statements += [line for line in lines if "statement:" in line or "execute" in line]
        replica.configure("log_statement", "none")


def _write_and_wait(app: App, number: int) -> None:
    with app.session():
        app.write("INSERT INTO items VALUES (%s)", [number])
        answer = app.ask("SELECT count(*) FROM items WHERE id = %s", [number])
    assert (1, Reason.CAUGHT_UP) == (answer.value, answer.route.reason)


def _probes(statements: list[str]) -> int:
    # A probe is a statement of many lines, of which the first has one word.
    return sum("select pg_catalog.pg_backend_pid()," in each for each in statements)


def _waits(statements: list[str]) -> int:
    return sum("wait for lsn" in each for each in statements)


def test_the_wait_saves_the_polls(
    opened: OpenRouter,
    pg19: EmbeddedCluster,
    table: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replica that applies later: a read waits by one statement, without it by dozens."""
    counts = {}
    nodes = {"replica_1": pg19.replicas["replica_1"].conninfo}
    for mode in ("wait", "poll"):
        with opened(replicas=nodes, wait_seconds=20.0) as app, monkeypatch.context() as patch:
            if mode == "poll":
                patch.setattr(ReplayWait, "tend", lambda self, seen: None)
            app.wait_healthy()
            pg19.replicas["replica_1"].apply_delay(DELAY_SECONDS)
            with _logged(pg19) as statements:
                for number in range(5):
                    _write_and_wait(app, number + (100 if mode == "poll" else 0))
            pg19.replicas["replica_1"].apply_delay(0)
        counts[mode] = (_probes(statements), _waits(statements))
    probes, waits = counts["wait"]
    polls, no_waits = counts["poll"]
    assert 0 == no_waits
    assert 5 <= waits <= 10
    assert 0 < 2 * probes < polls, counts


def test_many_readers_of_one_position_share_one_wait(
    opened: OpenRouter, pg19: EmbeddedCluster, table: str
) -> None:
    """The statement is the monitor's, not the reader's."""
    replica = pg19.replicas["replica_1"]
    with opened(replicas={"replica_1": replica.conninfo}, wait_seconds=20.0) as app:
        app.wait_healthy()
        replica.pause_replay()
        app.write("INSERT INTO items VALUES (1)")
        readers = app.start_each(100, lambda _: app.choose().reason)
        wait_until(lambda: len(app.cluster_state.positions) == 100)
        wait_until(lambda: replica.value(WAITING) == 1)
        seen = {replica.value(WAITING) for _ in range(20)}
        replica.resume_replay()
        reasons = {reader.result(30) for reader in readers}
    # Between two waits, of one second each, there is none for a moment.
    assert seen <= {0, 1}
    assert {Reason.CAUGHT_UP} == reasons


def test_a_smaller_position_does_not_wait_for_a_greater_one(
    opened: OpenRouter, pg19: EmbeddedCluster, table: str
) -> None:
    """A read whose position is reached first is served first."""
    replica = pg19.replicas["replica_1"]
    with opened(replicas={"replica_1": replica.conninfo}, wait_seconds=20.0) as app:
        app.wait_healthy()
        token = app.token()
        replica.pause_replay()
        app.write("INSERT INTO items VALUES (1)")
        (greater,) = app.start_each(1, lambda _: app.choose().reason)
        wait_until(lambda: replica.value(WAITING) == 1)
        smaller = app.choose(token)
        assert not greater.done()
        replica.resume_replay()
        last = greater.result(30)
    assert (Reason.CAUGHT_UP, Reason.CAUGHT_UP) == (smaller.reason, last)
    assert smaller.waited_seconds < 5.0


@pytest.mark.parametrize("fault", ["crash", "freeze", "crash_backend"])
def test_a_standby_that_fails_during_a_wait_is_left(
    opened: OpenRouter, pg19: EmbeddedCluster, table: str, fault: str
) -> None:
    """The reads end within their limits, and see their write."""
    replica = pg19.replicas["replica_1"]
    with opened(replicas={"replica_1": replica.conninfo}, wait_seconds=2.0) as app:
        app.wait_healthy()
        replica.pause_replay()
        with app.session():
            app.write("INSERT INTO items VALUES (1)")
            (reader,) = app.start_each(1, lambda _: app.ask("SELECT count(*) FROM items"))
            wait_until(lambda: replica.value(WAITING) == 1)
            getattr(replica, fault)()
            answer = reader.result(30)
    assert (1, pg19.primary.port) == (answer.value, answer.port)


def test_without_the_statement_it_is_found_out_once(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """An older server is polled, and sent nothing that it would refuse."""
    if pg.version >= 19:
        pytest.skip("this server has WAIT FOR LSN")
    nodes = {"replica_1": pg.replicas["replica_1"].conninfo}
    pg.replicas["replica_1"].apply_delay(0.1)
    with opened(replicas=nodes, wait_seconds=20.0) as app, _logged(pg) as statements:
        app.wait_healthy()
        for number in range(5):
            _write_and_wait(app, number)
    assert 0 == _waits(statements)
    assert 0 < _probes(statements)
