"""Units of work as functions: what runs again elsewhere, and what a write leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App, Connection


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

    with opened() as app:
        with pytest.raises(psycopg.errors.QueryCanceled):
            app.run_read(slow)
        with pytest.raises(psycopg.errors.UndefinedColumn):
            app.run_read(wrong)
    assert ["slow", "wrong"] == calls
