"""run_read behind PgBouncer: failures look different there, and a cancellation passes through."""

from __future__ import annotations

import pytest

from lsn_consistency import Reason, current_session
from lsn_consistency.events import ReadHedged, ReadRetried
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.harness import Connection, wait_until
from tests.cluster.test_hedging import Reader, first_on, held, ready, run, sleeping
from tests.poolers.pgbouncer import OpenThrough


def test_the_loser_of_a_hedged_read_is_cancelled_through_the_pooler(
    through: OpenThrough, pg: EmbeddedCluster
) -> None:
    """The pooler hands the request on to the server that runs the statement."""
    slow, quick = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with through() as app:
        ready(app)
        reader = Reader({slow.port})
        with first_on(app, slow.name):
            port, value = run(app, reader)
        wait_until(lambda: sleeping(slow) == 0)
        wait_until(lambda: not held(app), 10.0, lambda: str(held(app)))
        with first_on(app, slow.name):
            again = run(app, Reader())
        hedged = app.events_of(ReadHedged)
    assert (quick.port, 42) == (port, value)
    assert [ReadHedged(slow.name, quick.name, True)] == hedged
    assert (slow.port, 42) == again


@pytest.mark.parametrize("fault", ["terminated", "crashed"])
def test_a_read_whose_server_goes_away_behind_the_pooler_runs_elsewhere(
    through: OpenThrough, pg: EmbeddedCluster, fault: str
) -> None:
    """What the pooler says of a lost server is a lost connection too."""
    nodes = {node.port: node for node in pg.nodes.values()}
    ports: list[int] = []

    def function(conn: Connection) -> int:
        ports.append(conn.port)
        if len(ports) == 1 and fault == "crashed":
            nodes[conn.port].crash()
        elif len(ports) == 1:
            pid = conn.value("SELECT pg_backend_pid()")
            nodes[conn.port].execute(f"SELECT pg_terminate_backend({pid}, 5000)")
        return int(conn.value("SELECT 42"))

    with through() as app:
        ready(app)
        answer = app.run_read(function)
        retried = [each.name for each in app.events_of(ReadRetried)]
    assert 42 == answer
    assert 2 == len(set(ports))
    assert [nodes[ports[0]].name] == retried


def test_what_a_standby_refuses_runs_on_the_primary_behind_the_pooler(
    through: OpenThrough, pg: EmbeddedCluster
) -> None:
    """The read needs the primary, and goes there at once."""
    ports: list[int] = []

    def function(conn: Connection) -> None:
        ports.append(conn.port)
        conn.execute("SELECT pg_current_xact_id()")

    with through() as app:
        ready(app)
        app.run_read(function)
        route = current_session().last_route
    assert [False, True] == [port == pg.primary.port for port in ports]
    assert route is not None
    assert Reason.PRIMARY_REQUIRED == route.reason
