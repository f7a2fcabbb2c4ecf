"""What the pooler tests share: a router through a pooler, and what the pooler says of itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lsn_consistency.testing import EmbeddedCluster, PgBouncer
from tests.cluster.harness import App, Kind, open_router

OpenThrough = Callable[..., AbstractContextManager[App]]

SETTINGS: Mapping[str, str] = {
    # Each transaction gets another backend than the one before it, wherever there are several.
    "server_round_robin": "1",
    "default_pool_size": "20",
}

SILENT: dict[str, Any] = {"poll_interval": 300.0, "max_lag_seconds": 3000.0, "pin_seconds": 3000.0}
"""Monitors that say nothing unless they are asked: they do not notice what happens meanwhile."""


@contextmanager
def open_through(
    kind: Kind,
    pg: EmbeddedCluster,
    pooler: PgBouncer,
    pooled: Collection[str],
    *,
    only: str | None = None,
    user: str = "postgres",
    ready: bool = True,
    **options: Any,
) -> Iterator[App]:
    """
    Open a router over a cluster; the ``pooled`` nodes by the pooler's entry of their name.

    ``only`` names the one replica that it knows; with ``ready`` every node is observed by then.
    """
    conninfos = {
        name: pooler.conninfo_for(name, user=user) if name in pooled else node.conninfo_for(user)
        for name, node in pg.nodes.items()
        if only in (None, name) or name == "primary"
    }
    primary = conninfos.pop("primary")
    with open_router(kind, pg, primary=primary, replicas=conninfos, **options) as app:
        if ready:
            app.wait_healthy()
        yield app


def clients(pooler: PgBouncer, name: str) -> set[str]:
    """Return the clients of an entry, each as PgBouncer knows it over its life."""
    return {
        f"{row['addr']}:{row['port']} since {row['connect_time']}"
        for row in pooler.admin("SHOW CLIENTS")
        if row["database"] == name
    }


def backends(pooler: PgBouncer, name: str) -> set[int]:
    """Return the process ids of the server's backends that an entry holds."""
    return {
        int(row["remote_pid"] or 0)
        for row in pooler.admin("SHOW SERVERS")
        if row["database"] == name
    }
