"""What an application may do on its connections behind a pooler, and what others see of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from lsn_consistency import Consistency, Token
from lsn_consistency.testing import (
    EmbeddedCluster,
    PgBouncer,
    ProgramsNotFoundError,
    find_pgbouncer,
)
from tests.cluster.harness import App, Connection, Kind, wait_until
from tests.cluster.test_given_settings import _over_pools, _own_pools
from tests.poolers.pgbouncer import SILENT, OpenThrough, backends


def _version() -> int:
    """Return the minor version of PgBouncer; without one all tests here are skipped."""
    try:
        return find_pgbouncer().version
    except ProgramsNotFoundError:
        return 0


IN_TRANSACTION_MODE = pytest.mark.parametrize("mode", ["transaction"], indirect=True)
AUTOCOMMIT = {"kwargs": {"autocommit": True}}
KNOWS_PREPARED = _version() >= 21
NOT_AUTOCOMMIT: Mapping[str, Any] = {}

_REPLAY = "pg_last_wal_replay_lsn()"
_SESSION = (
    "SELECT current_setting('default_transaction_read_only'),"
    " current_setting('default_transaction_isolation'), current_setting('transaction_isolation'),"
    " current_setting('search_path'), current_setting('statement_timeout'),"
    " (SELECT count(*) FROM pg_prepared_statements)"
)


@pytest.mark.parametrize("options", [AUTOCOMMIT, NOT_AUTOCOMMIT], ids=["autocommit", "not"])
def test_a_read_is_one_read_only_transaction_in_read_committed(
    through: OpenThrough, pg: EmbeddedCluster, table: str, options: Mapping[str, Any]
) -> None:
    """Autocommit or not, replica or primary: every statement of a block is on one backend."""
    statement = "SELECT pg_backend_pid(), current_setting('transaction_isolation'), now()::text"
    with through(pool_options=options, wait_seconds=5.0) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        for level in (Consistency.CAUSAL, Consistency.STRONG):
            with app.reading(consistency=level) as conn:
                rows = {tuple(conn.execute(statement)[0]) for _ in range(5)}
                assert [("read committed")] == [isolation for _, isolation, _ in rows]
                assert 1 == conn.value(f"SELECT count(*) FROM {table}")
                with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                    conn.execute(f"INSERT INTO {table} VALUES (2)")
    assert 1 == pg.primary.value(f"SELECT count(*) FROM {table}")


@pytest.mark.parametrize("options", [AUTOCOMMIT, NOT_AUTOCOMMIT], ids=["autocommit", "not"])
def test_a_write_block_means_the_same_behind_a_pooler(
    through: OpenThrough, pg: EmbeddedCluster, table: str, options: Mapping[str, Any]
) -> None:
    """A block commits at its end; one that raises rolls back, unless each statement commits."""
    with through(pool_options=options, wait_seconds=5.0) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        with pytest.raises(ZeroDivisionError):
            _write_and_raise(app, table)
        expected = 2 if options is AUTOCOMMIT else 1
        assert expected == app.ask(f"SELECT count(*) FROM {table}").value
    assert expected == pg.primary.value(f"SELECT count(*) FROM {table}")


def test_nothing_of_a_read_or_a_write_is_left_to_other_clients(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str
) -> None:
    """Every backend that the router has used is as new to the next client of the pooler."""
    with through(pool_options=AUTOCOMMIT, wait_seconds=5.0) as app:

        def client(number: int) -> None:
            for turn in range(5):
                app.write(f"INSERT INTO {table} VALUES (%s)", [number * 10 + turn])
                app.read(f"SELECT count(*) FROM {table}")
                app.read("SELECT 1", consistency=Consistency.STRONG)

        app.each(4, client)
        for name, node in pg.nodes.items():
            with node.connect() as direct:
                expected = direct.execute(_SESSION).fetchone()
            assert {expected} == set(_others_see(pooler, name))
        # Another client's write, on backends that served read-only transactions before.
        with psycopg.connect(pooler.conninfo_for("primary")) as other:
            other.execute(f"INSERT INTO {table} VALUES (1000)".encode())
    assert 21 == pg.primary.value(f"SELECT count(*) FROM {table}")


@pytest.mark.skipif(KNOWS_PREPARED, reason="PgBouncer 1.21 and newer know prepared statements")
@IN_TRANSACTION_MODE
def test_prepared_statements_fail_in_transaction_mode(
    through: OpenThrough, pooler: PgBouncer, table: str
) -> None:
    """The same with statements that psycopg prepares fails: what docs/poolers.md says is so."""
    pooler.configure("default_pool_size", 3)
    with through(wait_seconds=5.0, pool_options={"kwargs": {"prepare_threshold": 0}}) as app:
        assert _failures(app, table) > 0


@IN_TRANSACTION_MODE
def test_the_routers_own_pools_prepare_nothing_behind_a_pooler(
    through: OpenThrough, pooler: PgBouncer, table: str
) -> None:
    """Without any option the router's own pools work in transaction mode."""
    pooler.configure("default_pool_size", 3)
    with through(wait_seconds=5.0, pool_options={}) as app:
        assert 0 == _failures(app, table)


def test_the_monitors_are_known_by_their_name(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer
) -> None:
    """One client of each entry is lsn_consistency, and the pools keep the name that they have."""
    options = {"kwargs": {"application_name": "shop"}}
    with through(pool_options=options) as app:
        assert "shop" == app.read("SHOW application_name")[0][0]
        for name in pg.nodes:
            # A monitor whose server lags connects anew now and then.
            _wait_for_the_monitor(pooler, name)
            assert {"shop", "lsn_consistency"} >= set(_names(pooler, name))


@IN_TRANSACTION_MODE
def test_a_read_whose_server_dies_behind_the_pooler_runs_again(
    through: OpenThrough, pg: EmbeddedCluster, table: str
) -> None:
    """run_read, its server crashes in the middle: PgBouncer says so, and it runs elsewhere."""
    replica = pg.replicas["replica_1"]
    ran: list[int] = []

    def read(conn: Connection) -> int:
        ran.append(conn.port)
        if ran[-1] == replica.port:
            replica.crash_backend()
        return int(conn.value(f"SELECT count(*) FROM {table}"))

    with through(only="replica_1", wait_seconds=5.0) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        assert 1 == app.run_read(read)
    assert [replica.port, pg.primary.port] == ran


@IN_TRANSACTION_MODE
def test_what_follows_a_commit_inside_a_read_is_read_only_too(
    through: OpenThrough, pg: EmbeddedCluster, table: str
) -> None:
    """The transaction that a COMMIT of the user's has ended, and the one that begins after it."""
    with through(wait_seconds=5.0) as app:
        for end in (Connection.commit, Connection.rollback):
            with app.reading(consistency=Consistency.STRONG) as conn:
                conn.value("SELECT 1")
                end(conn)
                with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                    conn.execute(f"INSERT INTO {table} VALUES (1)")
        # The same connections can write again.
        app.each(8, lambda row: app.write(f"INSERT INTO {table} VALUES (%s)", [row]))
    assert 8 == pg.primary.value(f"SELECT count(*) FROM {table}")


@IN_TRANSACTION_MODE
def test_a_session_never_goes_back_behind_a_commit_inside_a_read(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str
) -> None:
    """
    One block, two transactions, and in between the entry leads to a replica that is behind.

    Nothing checks the second one; but what the first has shown is in the next read.
    """
    running, paused = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with through("replica_1", only="replica_1", wait_seconds=0.2) as app:
        paused.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        token = app.token()
        with app.session() as session:
            with app.reading(token) as conn:
                assert (1, running.port) == (conn.value(f"SELECT count(*) FROM {table}"), conn.port)
                conn.commit()
                pooler.point("replica_1", paused)
                wait_until(lambda: _port_of_a_transaction(conn) == paused.port)
            assert 1 == app.ask(f"SELECT count(*) FROM {table}").value
            assert session.token.positions


@IN_TRANSACTION_MODE
def test_a_check_that_refuses_leaves_no_trace(
    kind: Kind,
    pg: EmbeddedCluster,
    pooler: PgBouncer,
    table: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """
    A read that meets an older server on its connection than the monitor has seen.

    The connections go back to the application's own pools as they came: idle, able to write, and
    with no warning in the log. So do those that served.
    """
    names = ("primary", "replica_1")
    behind: Any = SimpleNamespace(
        nodes={name: SimpleNamespace(conninfo=pooler.conninfo_for(name)) for name in names}
    )
    kwargs = {"prepare_threshold": None}
    with (
        _own_pools(kind, behind, min_size=1, max_size=1, kwargs=kwargs) as (pools, call),
        _over_pools(kind, pools, call, wait_seconds=0.0, **SILENT) as app,
    ):
        app.wait_healthy()
        pg.replicas["replica_2"].pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        token = app.token()
        pg.wait_caught_up()
        assert (1, pg.replicas["replica_1"].port) == _count(app, table, token)
        pooler.point("replica_1", pg.replicas["replica_2"])
        caplog.clear()
        assert (1, pg.primary.port) == _count(app, table, token)
        for pool in pools.values():
            conn = call(pool.getconn())
            assert (None, False) == (conn.read_only, conn.autocommit)
            assert TransactionStatus.IDLE == conn.info.transaction_status
            call(pool.putconn(conn))
    assert [] == [record.getMessage() for record in caplog.records if record.name == "psycopg.pool"]


@IN_TRANSACTION_MODE
def test_servers_without_wal_functions_are_read_behind_a_pooler(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str
) -> None:
    """A role that may not ask for positions: EVENTUAL reads are the replicas', as without one."""
    pg.primary.execute(f"REVOKE EXECUTE ON FUNCTION {_REPLAY} FROM public")
    pg.wait_caught_up()
    try:
        with through(user="app") as app:
            answers = [
                app.ask(f"SELECT count(*) FROM {table}", consistency=Consistency.EVENTUAL)
                for _ in range(10)
            ]
    finally:
        pg.primary.execute(f"GRANT EXECUTE ON FUNCTION {_REPLAY} TO public")
    assert {0} == {answer.value for answer in answers}
    assert pg.primary.port not in {answer.port for answer in answers}


@pytest.mark.parametrize("mode", ["statement"], indirect=True)
def test_statement_mode_is_refused_in_words(through: OpenThrough, table: str) -> None:
    """A pooler that lets no transaction through: writes and reads raise and say so."""
    with through() as app:
        for use in (app.write, app.read):
            with pytest.raises(Exception, match="transaction blocks not al"):
                use(f"SELECT count(*) FROM {table}")


def _port_of_a_transaction(conn: Connection) -> int:
    conn.commit()
    return conn.port


def _write_and_raise(app: App, table: str) -> None:
    with app.writing() as conn:
        conn.execute(f"INSERT INTO {table} VALUES (2)")
        raise ZeroDivisionError


def _count(app: App, table: str, token: Token) -> tuple[int, int]:
    """Count the rows as a client that has this token; return the server's port as well."""
    with app.session(token):
        answer = app.ask(f"SELECT count(*) FROM {table}")
    return answer.value, answer.port


def _names(pooler: PgBouncer, name: str) -> list[str | None]:
    clients = pooler.admin("SHOW CLIENTS")
    return [row["application_name"] for row in clients if row["database"] == name]


def _wait_for_the_monitor(pooler: PgBouncer, name: str) -> None:
    wait_until(lambda: 1 == _names(pooler, name).count("lsn_consistency"))


def _failures(app: App, table: str) -> int:
    """Count the reads that fail when four clients run the same statements on and on."""
    together = threading.Barrier(4)

    def client(_: int) -> int:
        together.wait(30)
        failed = 0
        for number in range(30):
            try:
                app.read(f"SELECT count(*) FROM {table} WHERE id = %s", [number])
            except psycopg.Error:
                failed += 1
        return failed

    return sum(app.each(4, client))


def _others_see(pooler: PgBouncer, name: str) -> Iterator[tuple[Any, ...]]:
    """Hold every backend of an entry at once, and yield what each is set to."""
    with ExitStack() as stack:
        for _ in range(max(1, len(backends(pooler, name)))):
            conn = stack.enter_context(psycopg.connect(pooler.conninfo_for(name)))
            row = conn.execute(_SESSION).fetchone()
            assert row is not None
            yield row
