"""Units of work as functions: what runs again elsewhere, and what a write leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import errors

from lsn_consistency import Consistency, NoNodeAvailableError, Reason, current_session
from lsn_consistency.events import PositionUnknown, ReadRetried
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App, Connection, wait_until


def _write_and_raise(
    app: App, table: str, before: Callable[[Connection], Any] = lambda _: None
) -> None:
    with app.writing() as conn:
        conn.execute(f"INSERT INTO {table} VALUES (1)")
        before(conn)
        raise ZeroDivisionError


def test_a_write_that_raises_rolls_back(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """An exception in the block rolls the transaction back, and the connection is used again."""
    with opened(wait_seconds=5.0) as app:
        with pytest.raises(ZeroDivisionError):
            _write_and_raise(app, table)
        with pytest.raises(psycopg.errors.UniqueViolation):
            app.write(f"INSERT INTO {table} VALUES (2), (2)")
        app.write(f"INSERT INTO {table} VALUES (3)")
        rows = app.read(f"SELECT id FROM {table}")
    assert [(3,)] == rows


def test_a_block_that_commits_and_then_raises_still_advances_the_session(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """An explicit commit counts, whatever happens after it."""
    with opened(wait_seconds=0.1) as app:
        app.wait_healthy()
        for replica in pg.replicas.values():
            replica.pause_replay()
        with app.session() as session:
            with pytest.raises(ZeroDivisionError):
                _write_and_raise(app, table, Connection.commit)
            answer = app.ask(f"SELECT count(*) FROM {table}")
            wrote = session.wrote
    assert (1, pg.primary.port, True) == (answer.value, answer.port, wrote)


def test_capture_covers_what_another_engine_committed(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """capture() after a commit that the router has not seen: the next read sees it."""
    with opened(wait_seconds=0.1) as app:
        app.wait_healthy()
        for replica in pg.replicas.values():
            replica.pause_replay()
        pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
        app.capture()
        answer = app.ask(f"SELECT count(*) FROM {table}")
    assert (1, pg.primary.port) == (answer.value, answer.port)


def test_run_read_goes_to_another_node_after_a_recovery_conflict(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """A replica that cancels the statement (40001) is not asked twice; another node answers."""
    pg.primary.execute(f"INSERT INTO {table} SELECT generate_series(1, 500)")
    first = pg.replicas["replica_1"]
    first.configure("max_standby_streaming_delay", "10ms")
    pg.wait_caught_up()
    ports: list[int] = []

    def conflicting(conn: Connection) -> int:
        ports.append(conn.port)
        before = conn.value(f"SELECT count(*) FROM {table}")
        if len(ports) == 1:
            # The snapshot needs rows that the primary removes for good.
            pg.primary.execute(f"DELETE FROM {table} WHERE id <= 250")
            pg.primary.execute(f"VACUUM {table}")
            conn.value("SELECT count(*) FROM pg_sleep(10)")
        return int(before)

    try:
        with opened(weights={"replica_1": 1000.0, "replica_2": 0.001}) as app:
            app.wait_healthy()
            count = app.run_read(_in_repeatable_read(conflicting))
    finally:
        first.configure("max_standby_streaming_delay", "30s")
    assert first.port == ports[0]
    assert 2 == len(ports)
    assert first.port != ports[1]
    assert count in (250, 500)


def _in_repeatable_read(function: Any) -> Any:
    def wrapped(conn: Connection) -> Any:
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        return function(conn)

    return wrapped


def test_run_read_goes_to_nodes_where_it_has_not_run_after_its_connection_is_ended(
    opened: OpenRouter, pg: EmbeddedCluster
) -> None:
    """Ended on each replica it runs on the other one, then on the primary; never twice on one."""
    nodes = {node.port: node for node in pg.nodes.values()}
    ports: list[int] = []

    def ended(conn: Connection) -> int:
        ports.append(conn.port)
        if conn.port != pg.primary.port:
            pid = conn.raw.info.backend_pid
            nodes[conn.port].execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        return int(conn.value("SELECT 42"))

    with opened() as app:
        app.wait_healthy()
        result = app.run_read(ended)
    assert 42 == result
    assert {replica.port for replica in pg.replicas.values()} == set(ports[:2])
    assert [pg.primary.port] == ports[2:]


def _terminate(pg: EmbeddedCluster, conn: Connection) -> None:
    node = next(node for node in pg.nodes.values() if node.port == conn.port)
    node.execute("SELECT pg_terminate_backend(%s, 5000)", [conn.raw.info.backend_pid])


def _failing_on(app: App, wrong: Callable[[Connection], Any], *, times: int = 1) -> list[int]:
    """Run a function that does something wrong at first, and return the ports where it ran."""
    ports: list[int] = []

    def function(conn: Connection) -> int:
        ports.append(conn.port)
        if len(ports) <= times:
            wrong(conn)
        return 42

    assert 42 == app.run_read(function)
    return ports


@pytest.mark.parametrize("fault", ["crash", "crash_backend"])
def test_run_read_goes_to_another_node_after_a_crash(
    opened: OpenRouter, pg: EmbeddedCluster, fault: str
) -> None:
    """A connection that is lost, mostly without a last word of the server: the event tells."""
    nodes = {node.port: node for node in pg.nodes.values()}

    def crash(conn: Connection) -> None:
        getattr(nodes[conn.port], fault)()
        conn.execute("SELECT 1")

    with opened() as app:
        app.wait_healthy()
        first, second = _failing_on(app, crash)
        retried = app.events_of(ReadRetried)
    assert first != second
    assert second in {replica.port for replica in pg.replicas.values()}
    assert [nodes[first].name] == [each.name for each in retried]
    # A backend that finds its postmaster gone may still say so.
    assert retried[0].state in (None, "57P01", "57P02")


def test_run_read_goes_to_another_node_when_its_snapshot_is_cancelled_between_statements(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """The conflict hits an idle transaction (40001, FATAL): the connection is gone as well."""
    pg.primary.execute(f"INSERT INTO {table} SELECT generate_series(1, 500)")
    for replica in pg.replicas.values():
        replica.configure("max_standby_streaming_delay", "10ms")
    pg.wait_caught_up()
    nodes = {node.port: node for node in pg.nodes.values()}

    def idle(conn: Connection) -> None:
        conn.execute(f"SELECT count(*) FROM {table}")
        replica, pid = nodes[conn.port], conn.raw.info.backend_pid
        pg.primary.execute(f"DELETE FROM {table} WHERE id <= 250")
        pg.primary.execute(f"VACUUM {table}")
        there = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}"
        wait_until(lambda: replica.value(there) == 0)
        conn.execute("SELECT 1")

    try:
        with opened() as app:
            app.wait_healthy()
            ports: list[int] = []

            def function(conn: Connection) -> int:
                ports.append(conn.port)
                if len(ports) == 1:
                    idle(conn)
                return 42

            assert 42 == app.run_read(_in_repeatable_read(function))
            states = [each.state for each in app.events_of(ReadRetried)]
    finally:
        for replica in pg.replicas.values():
            replica.configure("max_standby_streaming_delay", "30s")
    assert 2 == len(set(ports))
    assert ["40001"] == states


@pytest.mark.parametrize(
    ("statements", "state"),
    [
        (["SELECT pg_current_xact_id()"], "25006"),
        (["SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "SELECT 1"], "0A000"),
        (["SET TRANSACTION READ WRITE"], "0A000"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0].split()[-1],
)
def test_what_a_standby_refuses_runs_on_the_primary(
    opened: OpenRouter, pg: EmbeddedCluster, statements: list[str], state: str
) -> None:
    """A read that needs the primary goes there at once, not to the other replica first."""
    ports: list[int] = []

    def primarys(conn: Connection) -> None:
        with_port(conn, ports)
        for statement in statements:
            conn.execute(statement)

    with opened() as app:
        app.wait_healthy()
        app.run_read(primarys)
        route = current_session().last_route
        states = [each.state for each in app.events_of(ReadRetried)]
    assert [False, True] == [port == pg.primary.port for port in ports]
    assert [state] == states
    assert route is not None
    assert ("primary", Reason.PRIMARY_REQUIRED) == (route.name, route.reason)


def with_port(conn: Connection, ports: list[int]) -> None:
    """Note the port in a transaction of its own, so that the next one may still be set up."""
    ports.append(conn.port)
    conn.rollback()


@pytest.mark.parametrize("writing", ["SELECT nextval('run_read_numbers')", "FOR UPDATE", "INSERT"])
def test_run_read_writes_nowhere(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, writing: str
) -> None:
    """What a standby refuses because it writes is refused by the primary's read too, and raised."""
    pg.primary.execute("CREATE SEQUENCE IF NOT EXISTS run_read_numbers")
    pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
    pg.wait_caught_up()
    before = pg.primary.value("SELECT last_value::text || is_called FROM run_read_numbers")
    statement = {
        "FOR UPDATE": f"SELECT id FROM {table} FOR UPDATE",
        "INSERT": f"INSERT INTO {table} VALUES (2)",
    }.get(writing, writing)
    ports: list[int] = []

    def write(conn: Connection) -> None:
        ports.append(conn.port)
        conn.execute(statement)

    with opened() as app:
        app.wait_healthy()
        with pytest.raises(errors.ReadOnlySqlTransaction):
            app.run_read(write)
    assert [False, True] == [port == pg.primary.port for port in ports]
    after = pg.primary.value("SELECT last_value::text || is_called FROM run_read_numbers")
    assert (before, 1) == (after, pg.primary.value(f"SELECT count(*) FROM {table}"))


def test_with_the_primary_down_what_needs_it_says_so(
    opened: OpenRouter, pg: EmbeddedCluster
) -> None:
    """The routing error comes with the refusal of the replica as its cause."""

    def primarys(conn: Connection) -> None:
        conn.execute("SELECT pg_current_xact_id()")

    with opened(wait_seconds=0.1) as app:
        app.wait_healthy()
        pg.primary.stop("immediate")
        app.wait_for(lambda nodes: not nodes["primary"]["healthy"])
        with pytest.raises(NoNodeAvailableError) as raised:
            app.run_read(primarys)
    assert isinstance(raised.value.__cause__, errors.ReadOnlySqlTransaction)


def test_a_read_that_a_promotion_overtakes_runs_on_the_new_primary(
    opened: OpenRouter, pg: EmbeddedCluster
) -> None:
    """
    A transaction that began before the promotion stays read-only (25006) and is run again.

    The router finds the new primary by that failure: it did not have to look before.
    """
    nodes = {node.port: node for node in pg.nodes.values()}

    def promoted(conn: Connection) -> None:
        pg.primary.stop("immediate")
        nodes[conn.port].promote()
        conn.execute("CREATE TABLE never (id int)")

    with opened(poll_interval=30.0, max_lag_seconds=120.0, pin_seconds=120.0) as app:
        app.wait_healthy()
        first, second = _failing_on(app, promoted)
        route = current_session().last_route
    assert first == second
    assert route is not None
    assert ("primary", Reason.PRIMARY_REQUIRED) == (route.role, route.reason)


def test_a_statement_for_standbys_runs_elsewhere_when_its_node_is_promoted(
    opened: OpenRouter, pg: EmbeddedCluster
) -> None:
    """55000 is the node's fault only where its role has changed."""
    nodes = {node.port: node for node in pg.nodes.values()}

    def promoted(conn: Connection) -> None:
        pg.primary.stop("immediate")
        nodes[conn.port].promote()
        conn.execute("SELECT pg_is_wal_replay_paused()")

    with opened() as app:
        app.wait_healthy()
        ports = _failing_on(app, promoted)
        states = [each.state for each in app.events_of(ReadRetried)]
    assert 2 == len(ports)
    assert ["55000"] == states


def test_a_primary_is_not_asked_twice(opened: OpenRouter, pg: EmbeddedCluster, table: str) -> None:
    """A conflict of transactions (40001) and a lost connection on the primary are raised."""
    pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
    ports: list[int] = []

    def conflicting(conn: Connection) -> None:
        ports.append(conn.port)
        conn.rollback()
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ WRITE")
        conn.execute(f"SELECT value FROM {table}")
        pg.primary.execute(f"UPDATE {table} SET value = value + 1")
        conn.execute(f"UPDATE {table} SET value = value + 1")

    def lost(conn: Connection) -> None:
        ports.append(conn.port)
        _terminate(pg, conn)
        conn.execute("SELECT 1")

    with opened(wait_seconds=5.0) as app:
        app.wait_healthy()
        with pytest.raises(errors.SerializationFailure):
            app.run_read(conflicting, Consistency.STRONG)
        with pytest.raises(psycopg.OperationalError):
            app.run_read(lost, Consistency.STRONG)
        assert [] == app.events_of(ReadRetried)
    assert [pg.primary.port] * 2 == ports
    assert 1 == pg.primary.value(f"SELECT value FROM {table}")


def test_a_function_that_wrote_is_not_repeated(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """A write by the router, or one that capture() is told of, happens once."""

    def writes(conn: Connection) -> None:
        app.write(f"INSERT INTO {table} (id) SELECT count(*) FROM {table}")
        _terminate(pg, conn)
        conn.execute("SELECT 1")

    def captures(conn: Connection) -> None:
        pg.primary.execute(f"INSERT INTO {table} (id) SELECT count(*) FROM {table}")
        app.capture()
        _terminate(pg, conn)
        conn.execute("SELECT 1")

    def nested(conn: Connection) -> None:
        app.run_read(lambda _: app.write(f"INSERT INTO {table} (id) SELECT count(*) FROM {table}"))
        _terminate(pg, conn)
        conn.execute("SELECT 1")

    with opened(wait_seconds=5.0) as app:
        app.wait_healthy()
        for function in (writes, captures, nested):
            with pytest.raises(psycopg.OperationalError):
                app.run_read(function)
            with app.reading(consistency=Consistency.STRONG) as conn:
                count = conn.value(f"SELECT count(*) FROM {table}")
            assert app.read(f"SELECT count(*) FROM {table}") == [(count,)]
    assert 3 == pg.primary.value(f"SELECT count(*) FROM {table}")


def test_a_run_that_is_repeated_leaves_the_session_as_it_was(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """
    With the primary down a read outlives its replica: the other one has what the session asks for.

    A position taken for the failed run, which showed nothing to anybody, would be the primary's.
    """
    with opened(wait_seconds=0.2) as app, app.session() as session:
        app.write(f"INSERT INTO {table} VALUES (1)")
        pg.wait_caught_up()
        app.wait_healthy()
        pg.primary.stop("immediate")
        app.wait_for(lambda nodes: not nodes["primary"]["healthy"])
        tokens = []

        def function(conn: Connection) -> int:
            tokens.append(session.token)
            if len(tokens) == 1:
                _terminate(pg, conn)
            return int(conn.value(f"SELECT count(*) FROM {table}"))

        count = app.run_read(function)
        unknown = app.events_of(PositionUnknown)
        pinned = session.token.pin_until
    assert 1 == count
    assert 2 == len(tokens)
    assert tokens[0] == tokens[1]
    assert ([], None) == (unknown, pinned)


def test_a_failure_that_is_raised_counts_as_seen(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """An exception can tell what the function saw, so the session does not go back behind it."""

    def seen(conn: Connection) -> None:
        raise LookupError(conn.value(f"SELECT count(*) FROM {table}"))

    with opened(wait_seconds=0.1) as app:
        app.wait_healthy()
        pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
        pg.wait_caught_up()
        app.wait_healthy()
        with app.session() as session:
            with pytest.raises(LookupError, match="1"):
                app.run_read(seen)
            assert session.token.positions


def test_run_read_runs_a_function_that_fails_by_itself_only_once(opened: OpenRouter) -> None:
    """What is not the node's fault is raised: an error in SQL, a time-out, an exception."""
    calls: list[str] = []

    def slow(conn: Connection) -> None:
        calls.append("slow")
        conn.execute("SET LOCAL statement_timeout = 20")
        conn.execute("SELECT pg_sleep(5)")

    def wrong(conn: Connection) -> None:
        calls.append("wrong")
        conn.execute("SELECT nonsense")

    def primarys(conn: Connection) -> None:
        calls.append("primary's")
        conn.execute("SELECT pg_current_wal_lsn()")

    def elsewhere(conn: Connection) -> None:
        # The error of another connection has no SQLSTATE either.
        calls.append("elsewhere")
        conn.execute("SELECT 1")
        psycopg.connect("host=127.0.0.1 port=1")

    with opened() as app:
        app.wait_healthy()
        with pytest.raises(errors.QueryCanceled):
            app.run_read(slow)
        with pytest.raises(errors.UndefinedColumn):
            app.run_read(wrong)
        with pytest.raises(errors.ObjectNotInPrerequisiteState):
            app.run_read(primarys)
        with pytest.raises(psycopg.OperationalError):
            app.run_read(elsewhere)
    assert ["slow", "wrong", "primary's", "elsewhere"] == calls


def test_a_database_that_is_dropped_is_not_asked_elsewhere(
    opened: OpenRouter, pg: EmbeddedCluster
) -> None:
    """57P04 is true of every node: the function runs once."""
    pg.primary.execute("CREATE DATABASE doomed")
    pg.wait_caught_up()
    ports: list[int] = []

    def doomed(conn: Connection) -> None:
        ports.append(conn.port)
        pg.primary.execute("DROP DATABASE doomed WITH (FORCE)")
        conn.execute("SELECT pg_sleep(30)")

    nodes = {
        "primary": pg.primary.conninfo + " dbname=doomed",
        "replicas": {name: f"{node.conninfo} dbname=doomed" for name, node in pg.replicas.items()},
    }
    with opened(**nodes) as app:
        app.wait_healthy()
        with pytest.raises(errors.DatabaseDropped):
            app.run_read(doomed, Consistency.EVENTUAL)
    assert 1 == len(ports)
