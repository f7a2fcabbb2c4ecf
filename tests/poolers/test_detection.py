"""A pooler is seen, wherever it stands, and whatever becomes of its own connections."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from lsn_consistency.testing import EmbeddedCluster, PgBouncer
from tests.cluster.harness import App, wait_until
from tests.poolers.pgbouncer import OpenThrough, backends, clients

EVERYWHERE = ("primary", "replica_1", "replica_2")
PLACES = (EVERYWHERE, ("primary",), ("replica_1",), ("replica_1", "replica_2"))


@pytest.mark.parametrize("pooled", PLACES, ids=" and ".join)
def test_exactly_the_nodes_behind_the_pooler_are_known_as_such(
    through: OpenThrough, pg: EmbeddedCluster, pooled: Collection[str]
) -> None:
    """PgBouncer before some nodes: these are pooled, and the others are not."""
    expected = {name: name in pooled for name in pg.nodes}
    with through(*pooled) as app:
        assert expected == {name: node["pooled"] for name, node in app.snapshot().items()}
        assert expected == {name: _backend_differs(app, name) for name in pg.nodes}
        assert {name: node.port for name, node in pg.nodes.items()} == {
            name: app.where(node=name) for name in pg.nodes
        }


def test_a_pooler_is_still_seen_after_it_has_changed_all_its_connections(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer
) -> None:
    """Servers reconnected, then the pooler started anew: every node is pooled all the time."""
    with through() as app:
        before = _pids(app, pg)
        pooler.admin("RECONNECT")
        # In session mode a client keeps its backend for as long as it stays.
        if pooler.pool_mode == "transaction":
            wait_until(lambda: not before & _pids(app, pg))
            assert not before & {pid for name in EVERYWHERE for pid in backends(pooler, name)}
        assert dict.fromkeys(EVERYWHERE, True) == _pooled(app)
        known = {name: clients(pooler, name) for name in EVERYWHERE}
        pooler.kill()
        pooler.start()
        wait_until(lambda: all(node["healthy"] for node in app.snapshot().values()))
        assert dict.fromkeys(EVERYWHERE, True) == _pooled(app)
        assert not before & _pids(app, pg)
        assert all(not known[name] & clients(pooler, name) for name in EVERYWHERE)


@pytest.mark.parametrize("mode", ["transaction"], indirect=True)
def test_backends_that_live_shortly_change_nothing(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str
) -> None:
    """server_lifetime=0, a backend for each transaction: 20 writes and reads, 0 stale."""
    pooler.configure("server_lifetime", 0)
    with through(wait_seconds=5.0) as app:
        answers = []
        for number in range(20):
            app.write(f"INSERT INTO {table} VALUES (%s)", [number])
            with app.reading() as conn:
                rows = conn.value(f"SELECT count(*) FROM {table}")
                answers.append((rows, conn.value("SELECT pg_backend_pid()"), conn.port))
        assert dict.fromkeys(EVERYWHERE, True) == _pooled(app)
    assert list(range(1, 21)) == [rows for rows, _, _ in answers]
    assert 20 == len({(port, pid) for _, pid, port in answers})
    assert pg.primary.port not in {port for _, _, port in answers}


def _backend_differs(app: App, name: str) -> bool:
    with app.reading(node=name) as conn:
        return bool(conn.raw.info.backend_pid != conn.value("SELECT pg_backend_pid()"))


def _pids(app: App, pg: EmbeddedCluster) -> set[int]:
    found = set()
    for name in pg.nodes:
        with app.reading(node=name) as conn:
            found.add(conn.value("SELECT pg_backend_pid()"))
    return found


def _pooled(app: App) -> dict[str, bool]:
    return {name: node["pooled"] for name, node in app.snapshot().items()}
