"""
The stage of a nemesis run: a cluster whose every connection can be disturbed, and who leads it.

A proxy stands before each server for the clients, and a second one for the replicas that stream
from it. The stage knows which server is the primary at the moment; the servers are never asked,
so a frozen one is no hindrance.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType

from lsn_consistency.lsn import Lsn
from lsn_consistency.testing import EmbeddedCluster, EmbeddedNode, TcpProxy
from lsn_consistency.testing._workspace import wait_until

TABLE = "entries"
CAUGHT_UP_SECONDS = 60.0
STREAM_SECONDS = 2.0

# What the clients write: each value is written once, to one key.
_SCHEMA = f"""
    CREATE TABLE {TABLE} (value bigint PRIMARY KEY, key bigint NOT NULL);
    CREATE INDEX ON {TABLE} (key, value);
    GRANT ALL ON {TABLE} TO app
"""
_RECEIVED = "SELECT greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())::text"
GRANTS = {
    "none": "",
    # A standby tells its timeline only to those who may read all statistics.
    "statistics": "GRANT pg_read_all_stats TO app",
    "replication": "GRANT pg_read_all_stats TO app; ALTER ROLE app REPLICATION",
}
_SETTINGS = {
    # Pages are hardly written back and restartpoints are rare, so a replica that crashes comes
    # back far in the past.
    "shared_buffers": "64MB",
    "bgwriter_lru_maxpages": "0",
    "checkpoint_timeout": "1h",
    "max_wal_size": "4GB",
    # A fast stop waits for replicas to receive everything, and a black hole swallows it for ever.
    "wal_sender_timeout": "5s",
    "wal_receiver_timeout": "5s",
}


class Stage:
    """
    Hold the cluster and its proxies; all methods block.
    """

    def __init__(
        self,
        pg: EmbeddedCluster,
        proxies: Mapping[str, TcpProxy],
        streams: Mapping[str, TcpProxy],
    ) -> None:
        self.pg = pg
        self.proxies = proxies
        self.streams = streams
        self.stopping = threading.Event()

    @property
    def primary(self) -> EmbeddedNode:
        """
        Return the primary of the moment.
        """
        return self.pg.leader

    @property
    def followers(self) -> tuple[EmbeddedNode, ...]:
        """
        Return the replicas of the present primary, in the order of their names.
        """
        leader = self.primary
        return tuple(node for _, node in sorted(self.pg.nodes.items()) if node is not leader)

    def conninfo(self, name: str) -> str:
        """
        Return how clients reach a server: as app, through its proxy.
        """
        return self.proxies[name].conninfo_for("app")

    def stream(self, node: EmbeddedNode) -> TcpProxy:
        """
        Have a replica stream through a proxy from now on, until `Node.start_replication`.

        A replica whose primary is away, or that is paused, does so later.
        """
        proxy = self.streams[self.primary.name]
        node.configure("primary_conninfo", proxy.conninfo)
        wait_until(lambda: node.receiver_state() == "streaming", STREAM_SECONDS)
        return proxy

    def hold(self, seconds: float) -> None:
        """
        Let time pass; returns early when the run is being ended.
        """
        self.stopping.wait(seconds)

    def wait_settled(self) -> None:
        """
        Wait until every replica has replayed what the primary has by now.
        """
        self.pg.wait_caught_up(CAUGHT_UP_SECONDS)

    def written(self, after: int) -> set[int]:
        """
        Return the values above ``after`` that the primary has.
        """
        rows = self.primary.execute(f"SELECT value FROM {TABLE} WHERE value > %s", [after])
        return {value for (value,) in rows}

    def reached(self, *, promoted: bool) -> Lsn | None:
        """
        Return the furthest that a replica has received; after a promotion, where it happened.
        """
        if promoted:
            return max(self.switch_points().values())
        asked = [node for node in self.followers if node.running and not node.frozen]
        return max((Lsn.parse(node.value(_RECEIVED)) for node in asked), default=None)

    def switch_points(self) -> Mapping[int, Lsn]:
        """
        Return where each earlier timeline ended, from the history file of the primary.
        """
        timeline = self.primary.timeline()
        if timeline == 1:
            return {}
        text = self.primary.value(f"SELECT pg_read_file('pg_wal/{timeline:08X}.history')")
        rows = [line.split() for line in text.splitlines() if line.strip()]
        return {int(row[0]): Lsn.parse(row[1]) for row in rows}


@contextmanager
def open_stage(replicas: int, grants: str) -> Iterator[Stage]:
    """
    Start a cluster with its proxies and an empty table, for the time of the block.

    ``grants`` is one of `GRANTS`: what the clients' account may do beside reading and writing.
    """
    with ExitStack() as stack:
        pg = stack.enter_context(EmbeddedCluster(replicas=replicas, settings=_SETTINGS))
        proxies, streams = (
            {name: stack.enter_context(TcpProxy(node)) for name, node in pg.nodes.items()}
            for _ in range(2)
        )
        pg.primary.execute(f"{_SCHEMA}; {GRANTS[grants]}")
        pg.wait_caught_up()
        stage = Stage(pg, MappingProxyType(proxies), MappingProxyType(streams))
        stack.callback(stage.stopping.set)
        yield stage
