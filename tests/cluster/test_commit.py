"""COMMIT and the question for the position in one round trip: what becomes of either of them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from threading import Timer, get_ident
from typing import Any

import psycopg
import pytest
from psycopg import pq

from lsn_consistency import (
    Consistency,
    Lsn,
    _connections,
    _endings,
    _protocol,
    _sql,
    _wire,
    _writes,
    current_session,
)
from lsn_consistency._core import Core, Facts
from lsn_consistency.events import PositionUnknown
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App, open_router, wait_until

NOBODY = "nobody_at_all"
WAITING = """
    SELECT count(*) FROM pg_stat_activity
    WHERE wait_event = 'SyncRep' AND application_name = 'lsn_commit_test'
"""


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[_protocol.CommitAndAsk]:
    """Collect every exchange that takes the position together with its commit."""
    made: list[_protocol.CommitAndAsk] = []

    class Counted(_protocol.CommitAndAsk):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(_wire, "CommitAndAsk", Counted)
    return made


@pytest.fixture
def children(pg: EmbeddedCluster, table: str) -> Iterator[str]:
    """Make a table whose foreign key is checked at COMMIT."""
    pg.primary.execute("DROP TABLE IF EXISTS children")
    pg.primary.execute(
        f"CREATE TABLE children (parent int REFERENCES {table} DEFERRABLE INITIALLY DEFERRED)"
    )
    yield "children"
    pg.primary.execute("DROP TABLE children")


@contextmanager
def _standby_that_never_answers(pg: EmbeddedCluster) -> Iterator[None]:
    # Every COMMIT then waits for it.
    pg.primary.configure("synchronous_standby_names", NOBODY)
    try:
        yield
    finally:
        pg.primary.configure("synchronous_standby_names", "")


def _asked(pg: EmbeddedCluster, statement: str) -> Any:
    with pg.primary.connect() as conn:
        row = conn.execute(statement.encode()).fetchone()
    assert row is not None
    return row[0]


def test_the_position_covers_the_commit(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, together: list[Any]
) -> None:
    """Synchronous or not: the position is beyond where the commit's record begins."""
    with opened() as app:
        for number, mode in enumerate(("on", "off", "local") * 20):
            with app.session():
                with app.writing() as conn:
                    conn.execute(f"SET LOCAL synchronous_commit = {mode}")
                    conn.execute(f"INSERT INTO {table} VALUES ({number})")
                    before = conn.value("SELECT pg_current_wal_insert_lsn()::text")
                (position,) = current_session().token.positions.values()
                answer = app.ask(f"SELECT max(id) FROM {table}")
            assert number == answer.value
            after = _asked(pg, "SELECT pg_current_wal_insert_lsn()::text")
            assert Lsn.parse(before) < position.lsn <= Lsn.parse(after)
        assert 60 <= len(together)
        assert [] == app.events_of(PositionUnknown)


def test_what_the_commit_checks_is_raised_as_psycopg_does(
    opened: OpenRouter, pg: EmbeddedCluster, children: str, together: list[Any]
) -> None:
    """A deferred constraint fails: its error, an open connection, and a position all the same."""
    with opened(pool_options={"max_size": 1, "min_size": 1}) as app, app.session():
        app.write(f"INSERT INTO {children} SELECT NULL")
        kept = current_session().token
        with app.writing() as conn:
            raw = conn.raw
        with pytest.raises(psycopg.errors.ForeignKeyViolation, match="children"):
            app.write(f"INSERT INTO {children} VALUES (77)")
        assert 2 == len(together)
        assert not raw.closed
        assert pq.TransactionStatus.IDLE == raw.pgconn.transaction_status
        assert pq.PipelineStatus.OFF == raw.pgconn.pipeline_status
        assert current_session().token.pin_until is None
        assert kept != current_session().token
        with app.writing() as conn:
            assert raw is conn.raw
    assert 1 == _asked(pg, f"SELECT count(*) FROM {children}")


def test_a_backend_that_is_ended_in_its_commit(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, together: list[Any]
) -> None:
    """The driver's own error is raised, and the session has a position or is pinned."""
    with opened() as app, app.session():
        app.write(f"INSERT INTO {table} VALUES (0)")
        with _standby_that_never_answers(pg):
            (future,) = app.start_each(1, lambda _: _write_named(app, table, 1))
            wait_until(lambda: _asked(pg, WAITING) == 1)
            with pg.primary.connect() as conn:
                conn.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = 'lsn_commit_test'"
                )
            with pytest.raises(psycopg.OperationalError):
                future.result(10)
        token = current_session().token
        assert token.positions or token.pin_until
        assert 2 == len(together)
        # It is in the log and may be there: who asks sees what the primary has.
        assert (
            _asked(pg, f"SELECT count(*) FROM {table}")
            == app.ask(f"SELECT count(*) FROM {table}").value
        )


@pytest.mark.parametrize("times", [1, 2])
def test_a_cancelled_commit_is_cancelled_on_the_server(
    pg: EmbeddedCluster, table: str, together: list[Any], times: int
) -> None:
    """
    No backend waits on for a standby, holding its locks; the session is pinned.

    Cancelled once more while the server is told, the connection is closed all the same.
    """
    with open_router("async", pg) as app, app.session():
        app.write(f"INSERT INTO {table} VALUES (0)")
        with _standby_that_never_answers(pg):
            future: Future[None] = app.submit(_cancel_in_commit(app, pg, table, times))
            future.result(20)
            if times == 1:
                wait_until(lambda: _asked(pg, WAITING) == 0)
        assert current_session().token.pin_until is not None
        assert 2 == len(together)
        app.write(f"INSERT INTO {table} VALUES (2)")
        assert {0, 1, 2} == {row[0] for row in app.read(f"SELECT id FROM {table}")}


async def _cancel_in_commit(app: App, pg: EmbeddedCluster, table: str, times: int) -> None:
    used = []

    async def write() -> None:
        async with app.router.write() as conn:
            used.append(conn)
            await conn.execute("SET application_name = 'lsn_commit_test'")
            await conn.execute(f"INSERT INTO {table} VALUES (1)".encode())

    task = asyncio.create_task(write())
    while await asyncio.to_thread(_asked, pg, WAITING) != 1:
        await asyncio.sleep(0.01)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert used[0].closed


def test_an_interrupted_commit_is_cancelled_on_the_server(
    pg: EmbeddedCluster, table: str, together: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a thread waits for the answer to its COMMIT."""
    waited = _wire._wait

    def interrupted(number: int, need: Any, seconds: float | None) -> bool:
        if seconds is not None:
            return waited(number, need, seconds)
        wait_until(lambda: _asked(pg, WAITING) == 1)
        raise KeyboardInterrupt

    with open_router("blocking", pg) as app, app.session():
        app.write(f"INSERT INTO {table} VALUES (0)")
        with _standby_that_never_answers(pg):
            monkeypatch.setattr(_wire, "_wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                _write_named(app, table, 1)
            monkeypatch.setattr(_wire, "_wait", waited)
            wait_until(lambda: _asked(pg, WAITING) == 0)
        assert current_session().token.pin_until is not None
        assert {0, 1} == {row[0] for row in app.read(f"SELECT id FROM {table}")}


@pytest.mark.parametrize("mode", ["async", "blocking", "between two waits"])
def test_a_commit_that_a_cancellation_comes_too_early_for_is_awaited(
    mode: Any, pg: EmbeddedCluster, table: str, together: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that had not begun its COMMIT ignores the request: the next read sees the row."""
    backend: list[int] = []
    with open_router("async" if mode == "async" else "blocking", pg) as app, app.session():
        app.write(f"INSERT INTO {table} VALUES (0)")
        between = mode == "between two waits"
        frozen = _frozen_before(together, backend, interrupts=between)
        monkeypatch.setattr(_wire, "CommitAndAsk", frozen)
        if mode == "async":
            app.submit(_cancel_frozen(app, table, backend)).result(20)
        elif mode == "blocking":
            _interrupt_frozen(app, table, backend, monkeypatch)
        else:
            with pytest.raises(KeyboardInterrupt):
                app.write(f"INSERT INTO {table} VALUES (1)")
        assert current_session().token.pin_until is not None
        assert 2 == len(together)
        assert {0, 1} == {row[0] for row in app.read(f"SELECT id FROM {table}")}


@pytest.mark.parametrize("mode", ["async", "blocking"])
def test_an_interrupted_commit_is_not_awaited_for_ever(
    mode: Any, pg: EmbeddedCluster, table: str, together: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that answers nothing is given up after probe_timeout; the session is pinned."""
    backend: list[int] = []
    with open_router(mode, pg, probe_timeout=0.3) as app, app.session():
        app.write(f"INSERT INTO {table} VALUES (0)")
        monkeypatch.setattr(_wire, "CommitAndAsk", _frozen_before(together, backend))
        began = time.monotonic()
        try:
            if mode == "async":
                app.submit(_cancel_frozen(app, table, backend, thaws_after=4.0)).result(20)
            else:
                _interrupt_frozen(app, table, backend, monkeypatch, thaws_after=4.0)
            took = time.monotonic() - began
        finally:
            _thaw(backend[0])
        assert 0.3 <= took < 3.0
        assert current_session().token.pin_until is not None


def _thawed(backend: int, seconds: float) -> None:
    # Whatever happens meanwhile, no backend stays stopped.
    timer = Timer(seconds, _thaw, (backend,))
    timer.daemon = True
    timer.start()


def _thaw(backend: int) -> None:
    # By then it may have ended by itself.
    with suppress(ProcessLookupError):
        os.kill(backend, signal.SIGCONT)


def _frozen_before(
    together: list[Any], backend: list[int], *, interrupts: bool = False
) -> type[_protocol.CommitAndAsk]:
    class Frozen(_protocol.CommitAndAsk):
        def __init__(self, pgconn: Any, step: Any) -> None:
            super().__init__(pgconn, step)
            together.append(self)
            self.interrupts = interrupts and not backend
            if not backend:
                os.kill(pgconn.backend_pid, signal.SIGSTOP)
                backend.append(pgconn.backend_pid)

        def needs(self) -> Iterator[_protocol.Need]:
            for need in super().needs():
                if self.interrupts:
                    # As Ctrl-C does where nothing is waited for: the rest of it does not run.
                    _thawed(backend[0], 0.1)
                    raise KeyboardInterrupt
                yield need

    return Frozen


async def _cancel_frozen(
    app: App, table: str, backend: list[int], thaws_after: float = 0.1
) -> None:
    async def write() -> None:
        async with app.router.write() as conn:
            await conn.execute(f"INSERT INTO {table} VALUES (1)".encode())

    task = asyncio.create_task(write())
    while not backend:
        await asyncio.sleep(0)
    task.cancel()
    _thawed(backend[0], thaws_after)
    with pytest.raises(asyncio.CancelledError):
        await task


def _interrupt_frozen(
    app: App,
    table: str,
    backend: list[int],
    monkeypatch: pytest.MonkeyPatch,
    thaws_after: float = 0.1,
) -> None:
    waited, writer = _wire._wait, get_ident()

    def interrupted(number: int, need: Any, seconds: float | None) -> bool:
        # The monitors wait too, in threads of their own.
        if not backend or get_ident() != writer:
            return waited(number, need, seconds)
        monkeypatch.setattr(_wire, "_wait", waited)
        _thawed(backend[0], thaws_after)
        raise KeyboardInterrupt

    monkeypatch.setattr(_wire, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        app.write(f"INSERT INTO {table} VALUES (1)")


def _write_named(app: App, table: str, number: int) -> None:
    with app.writing() as conn:
        conn.execute("SET application_name = 'lsn_commit_test'")
        conn.execute(f"INSERT INTO {table} VALUES ({number})")


@pytest.mark.parametrize("forgotten", ["DEALLOCATE ALL", "DISCARD ALL"])
def test_a_question_that_was_deallocated_is_asked_all_the_same(
    opened: OpenRouter, table: str, forgotten: str
) -> None:
    """Such a connection is not prepared again: whoever did that may do it again."""
    options = {"min_size": 1, "max_size": 1, "kwargs": {"autocommit": True}}
    with opened(pool_options=options) as app, app.session():
        for number in range(4):
            with app.writing() as conn:
                conn.execute(f"INSERT INTO {table} VALUES ({number})")
                names = {row[0] for row in conn.execute("SELECT name FROM pg_prepared_statements")}
                assert (number > 0 and number < 3) is ("lsn_consistency_position" in names)
                if number == 2:
                    conn.execute(forgotten)
                raw = conn.raw
            assert current_session().token.pin_until is None
            assert number == app.ask(f"SELECT max(id) FROM {table}").value
        assert {_sql.POSITION: False} == app.router._core.facts_of(raw).prepared


class Recorded(psycopg.Connection[Any]):
    """Count the commits, as a program does that traces them."""

    commits = 0

    def commit(self) -> None:
        """Count and commit."""
        type(self).commits += 1
        super().commit()


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_connection_with_a_commit_of_its_own_keeps_it(
    pg: EmbeddedCluster,
    table: str,
    together: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    autocommit: bool,
) -> None:
    """Its block commits as its class says, and the position is asked for after that."""
    monkeypatch.setattr(Recorded, "commits", 0)
    options = {"connection_class": Recorded, "kwargs": {"autocommit": autocommit}}
    with open_router("blocking", pg, pool_options=options) as app, app.session():
        app.write(f"INSERT INTO {table} VALUES (1)")
        assert 1 == Recorded.commits
        assert 1 == app.ask(f"SELECT max(id) FROM {table}").value
    assert [] == together


def test_a_transaction_that_was_begun_in_autocommit_mode_is_committed(
    opened: OpenRouter, table: str
) -> None:
    """The end of the block commits what is open, also where a connection has mostly nothing to."""
    with opened(pool_options={"kwargs": {"autocommit": True}}) as app, app.session():
        for number in range(3):
            with app.writing() as conn:
                conn.execute("BEGIN")
                conn.execute(f"INSERT INTO {table} VALUES ({number})")
            with app.reading() as conn:
                conn.execute("BEGIN")
                assert number == conn.value(f"SELECT max(id) FROM {table}")
                raw = conn.raw
            assert pq.TransactionStatus.IDLE == raw.pgconn.transaction_status


def test_two_phase_commit_is_left_to_psycopg(pg: EmbeddedCluster, table: str) -> None:
    """A transaction that tpc_begin() has opened is not committed by the end of the block."""
    with (
        open_router("blocking", pg) as app,
        pytest.raises(psycopg.ProgrammingError, match="two-phase"),
    ):
        _write_in_two_phases(app, table)
    assert 0 == _asked(pg, f"SELECT count(*) FROM {table}")


def _write_in_two_phases(app: App, table: str) -> None:
    with app.writing() as conn:
        conn.raw.tpc_begin("lsn_consistency test")
        conn.execute(f"INSERT INTO {table} VALUES (1)")


@pytest.mark.parametrize("level", [Consistency.CAUSAL, Consistency.STRONG])
def test_after_its_commit_no_connection_is_asked_again(
    opened: OpenRouter,
    table: str,
    together: list[Any],
    level: Consistency,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A write and the reads that advance the session take the position with their COMMIT."""
    asked: list[Any] = []

    def noted(core: Core, conn: Any, facts: Facts) -> Any:
        asked.append(conn)
        return _connections.look_back(core, conn, facts)

    monkeypatch.setattr(_writes, "look_back", noted)
    monkeypatch.setattr(_endings, "look_back", noted)
    with opened() as app, app.session():
        for number in range(10):
            app.write(f"INSERT INTO {table} VALUES ({number})")
            assert number == app.ask(f"SELECT max(id) FROM {table}", consistency=level).value
    assert [] == asked
    assert 20 == len(together)
