"""A failover behind a pooler whose entries are led to the new servers, as operators do it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import psycopg
import pytest

from lsn_consistency.events import LostWrite
from lsn_consistency.exceptions import RoutingError
from lsn_consistency.testing import EmbeddedCluster, Node, PgBouncer
from tests.cluster.harness import App, Kind, open_router, wait_until
from tests.poolers.pgbouncer import SETTINGS

FOUND_SECONDS = 30.0

_rows = itertools.count()


@pytest.fixture(scope="module")
def moving() -> Iterator[EmbeddedCluster]:
    """Run a cluster whose primary moves."""
    with EmbeddedCluster(replicas=2) as cluster:
        cluster.primary.execute("CREATE TABLE items (id int PRIMARY KEY)")
        cluster.wait_caught_up()
        yield cluster


def test_a_failover_behind_the_pooler_loses_no_session(kind: Kind, moving: EmbeddedCluster) -> None:
    """
    The primary dies, the entries lead to the new one and its replicas: all rows for every token.

    No client reconnects by itself, and nothing that was there is reported as lost.
    """
    with (
        PgBouncer(_entries(moving), settings=SETTINGS) as pooler,
        open_router(
            kind,
            moving,
            primary=pooler.conninfo_for("writer"),
            replicas={name: pooler.conninfo_for(name) for name in ("reader_1", "reader_2")},
            wait_seconds=2.0,
        ) as app,
    ):
        app.wait_healthy()
        expected = _write(app, moving.leader)
        token = app.token()
        moving.wait_caught_up()
        moving.failover()
        for name, node in _entries(moving).items():
            pooler.point(name, node)
        # The session that has lived through it, and one that comes with a token from before.
        assert expected == _first_count(app)
        with app.session(token):
            assert expected == _first_count(app)
        wait_until(lambda: _writes_again(app), FOUND_SECONDS)
        roles = {"primary": "primary", "reader_1": "replica", "reader_2": "replica"}
        app.wait_for(
            lambda nodes: roles == {name: node["role"] for name, node in nodes.items()},
            FOUND_SECONDS,
        )
        app.wait_healthy(FOUND_SECONDS)
        for _ in range(10):
            with app.session():
                expected = _write(app, moving.leader)
                assert expected == _count(app, moving.leader)
        assert [] == app.events_of(LostWrite)


def _entries(cluster: EmbeddedCluster) -> dict[str, Node]:
    """Return the entries of the pooler, the primary of the moment first."""
    others = [node for node in cluster.nodes.values() if node is not cluster.leader]
    return {"writer": cluster.leader, "reader_1": others[0], "reader_2": others[1]}


def _write(app: App, leader: Node) -> int:
    """Write a row and return how many there are, by the primary's own word."""
    app.write("INSERT INTO items VALUES (%s)", [next(_rows)])
    return int(leader.value("SELECT count(*) FROM items"))


def _writes_again(app: App) -> bool:
    try:
        app.write("INSERT INTO items VALUES (%s)", [next(_rows)])
    except (psycopg.OperationalError, RoutingError):
        return False
    return True


def _first_count(app: App) -> int | None:
    """Count the rows in the first read that is served at all."""
    counts: list[int] = []

    def counted() -> bool:
        count = _count(app, None)
        if count is not None:
            counts.append(count)
        return bool(counts)

    wait_until(counted, FOUND_SECONDS)
    return counts[0]


def _count(app: App, leader: Node | None) -> int | None:
    """Count the rows in a routed read, on a replica of ``leader`` if it is given."""
    try:
        answer = app.ask("SELECT count(*) FROM items")
    except (psycopg.OperationalError, RoutingError):
        return None
    assert leader is None or leader.port != answer.port, answer.route
    return int(answer.value)
