"""
A pooler that has no server connection left: everybody waits within the limits, nobody for ever.

The monitors need a server connection for each probe, as every read and write does. So a pool that
is used up for longer than a probe may take looks like a server that is down.
"""

from __future__ import annotations

from contextlib import closing

import psycopg
import pytest

from lsn_consistency.testing import EmbeddedCluster, PgBouncer
from lsn_consistency.testing.pgbouncer import PoolMode
from tests.cluster.harness import Answer, App, wait_until
from tests.poolers.pgbouncer import OpenThrough

TIMEOUTS = {"probe_timeout": 0.3, "connect_timeout": 1.0, "wait_seconds": 5.0}
LIMIT_SECONDS = 5.0
CLIENTS = 20
TURNS = 5

MODES: tuple[PoolMode, ...] = ("transaction",)
pytestmark = pytest.mark.parametrize("mode", MODES, indirect=True)


@pytest.mark.parametrize("size", [1, 2])
def test_many_clients_share_a_single_server_connection(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str, size: int
) -> None:
    """20 clients, one or two server connections per node: every write and read, 0 stale."""
    pooler.configure("default_pool_size", size)
    with through(wait_seconds=10.0, probe_timeout=20.0) as app:

        def client(number: int) -> list[int]:
            found = []
            for turn in range(TURNS):
                with app.session():
                    row = number * TURNS + turn
                    app.write(f"INSERT INTO {table} VALUES (%s)", [row])
                    found += app.read(f"SELECT count(*) FROM {table} WHERE id = {row}")[0]
            return found

        found = app.each(CLIENTS, client)
        assert dict.fromkeys(pg.nodes, True) == {
            name: node["healthy"] for name, node in app.snapshot().items()
        }
    assert [[1] * TURNS] * CLIENTS == found


@pytest.mark.parametrize("query_wait_timeout", [0, 1])
def test_reads_leave_a_replica_whose_pool_is_used_up(
    through: OpenThrough,
    pg: EmbeddedCluster,
    pooler: PgBouncer,
    table: str,
    query_wait_timeout: int,
) -> None:
    """A transaction holds the only connection: other reads go elsewhere, and back when it ends."""
    pooler.configure("default_pool_size", 1)
    pooler.configure("query_wait_timeout", query_wait_timeout)
    replica = pg.replicas["replica_1"]
    with through("replica_1", **TIMEOUTS) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        with app.session(), app.reading(node="replica_1") as held:
            held.value("SELECT 1")
            app.wait_for(lambda nodes: not nodes["replica_1"]["healthy"])
            answers = [_ask(app, table) for _ in range(10)]
            assert replica.port == held.port
        wait_until(lambda: replica.port == _ask(app, table).port)
    assert {1} == {answer.value for answer in answers}
    assert replica.port not in {answer.port for answer in answers}
    assert max(answer.seconds for answer in answers) < LIMIT_SECONDS


def test_a_write_that_holds_the_only_connection_delays_the_others_within_limits(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str
) -> None:
    """One long write: proven reads go on at the replicas, another write raises, then all works."""
    pooler.configure("default_pool_size", 1)
    with through("primary", **TIMEOUTS) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        token = app.token()
        with app.session(), app.writing() as held:
            held.execute(f"INSERT INTO {table} VALUES (2)")
            with app.session(), pytest.raises(psycopg.OperationalError, match="no answer within"):
                app.write(f"INSERT INTO {table} VALUES (3)")
            with app.session(token):
                answers = [app.ask(f"SELECT count(*) FROM {table}") for _ in range(10)]
        with app.session():
            app.write(f"INSERT INTO {table} VALUES (4)")
            assert 3 == app.ask(f"SELECT count(*) FROM {table}").value
    assert {1} == {answer.value for answer in answers}
    assert pg.primary.port not in {answer.port for answer in answers}
    assert max(answer.seconds for answer in answers) < LIMIT_SECONDS


def test_a_pooler_that_accepts_no_more_clients_is_left_alone(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str
) -> None:
    """max_client_conn leaves no place for the pool or the monitor: reads go elsewhere."""
    pooler.configure("max_client_conn", 1)
    with (
        closing(_the_only_client(pooler)),
        through("replica_1", ready=False, **TIMEOUTS) as app,
    ):
        for row in range(10):
            with app.session():
                app.write(f"INSERT INTO {table} VALUES (%s)", [row])
                answer = app.ask(f"SELECT count(*) FROM {table}")
            assert row + 1 == answer.value
            assert pg.replicas["replica_1"].port != answer.port
            assert answer.seconds < LIMIT_SECONDS
        pooler.configure("max_client_conn", 100)
        wait_until(lambda: pg.replicas["replica_1"].port == _ask(app, table).port, 20)


def _the_only_client(pooler: PgBouncer) -> psycopg.Connection:
    """Take the one place, as soon as the admin console has left it."""
    taken: list[psycopg.Connection] = []

    def take() -> bool:
        try:
            taken.append(psycopg.connect(pooler.conninfo_for("replica_1")))
        except psycopg.OperationalError:
            return False
        return True

    wait_until(take)
    return taken[0]


def _ask(app: App, table: str) -> Answer:
    """Read as a client of its own that has seen everything so far."""
    with app.session(app.token()):
        return app.ask(f"SELECT count(*) FROM {table}")
