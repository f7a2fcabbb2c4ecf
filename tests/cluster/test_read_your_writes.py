"""Read your writes on a real cluster: the server that answers is proven by its port."""

from __future__ import annotations

from lsn_consistency import Reason
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter


def test_with_both_replicas_paused_the_primary_serves_after_the_wait(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """Write then read, both replicas paused: the row is there, NOT_CAUGHT_UP, after the wait."""
    with opened(wait_seconds=0.3) as app:
        app.write(f"INSERT INTO {table} VALUES (0)")
        for replica in pg.replicas.values():
            replica.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        answer = app.ask(f"SELECT count(*) FROM {table}")
    assert (2, pg.primary.port) == (answer.value, answer.port)
    assert ("primary", "primary", Reason.NOT_CAUGHT_UP) == (
        answer.route.name,
        answer.route.role,
        answer.route.reason,
    )
    assert 0.3 <= answer.route.waited_seconds < 0.6
    assert 0.3 <= answer.seconds < 0.8
