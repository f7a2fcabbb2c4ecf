"""
How a cluster is started from nothing and cleared up again, wherever its nodes run.
"""

from __future__ import annotations

import atexit
import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import MappingProxyType, TracebackType
from typing import Self, TypeVar

from lsn_consistency.testing._errors import ClusterError
from lsn_consistency.testing._storage import StoredNode
from lsn_consistency.testing._topology import NOT_RUNNING, Cluster

__all__ = ["DEFAULT_SETTINGS", "ManagedCluster"]

logger = logging.getLogger("lsn_consistency.testing")

MAX_REPLICAS = 16

DEFAULT_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        # No socket files: their path may have 107 bytes only, and the folder may be deep.
        "unix_socket_directories": "",
        "fsync": "off",
        "shared_buffers": "16MB",
        # In the data directory, so that a killed server leaves nothing in /dev/shm.
        "dynamic_shared_memory_type": "mmap",
        "max_connections": "200",
        "wal_level": "replica",
        "max_wal_senders": "20",
        # A replica that was away for a while must be able to come back.
        "wal_keep_size": "1GB",
        # pg_rewind needs them where pages have no checksums.
        "wal_log_hints": "on",
        "hot_standby": "on",
        "hot_standby_feedback": "off",
        # How soon a replica looks for its primary again; PostgreSQL's own default is 5 s.
        "wal_retrieve_retry_interval": "100ms",
        "log_line_prefix": "%m [%p] %u@%d ",
        "timezone": "UTC",
    }
)

_N = TypeVar("_N", bound=StoredNode)


class ManagedCluster(Cluster[_N]):
    """
    A cluster that is there for the time of a `with` block, or from `start()` to `stop()`.

    A kind of cluster says where its nodes live; the rest is the same for all kinds.
    """

    def __init__(
        self,
        replicas: int,
        settings: Mapping[str, str],
        synchronous: int,
        progress: Callable[[str], None] | None,
    ) -> None:
        if not 0 <= replicas <= MAX_REPLICAS:
            raise ClusterError(f"replicas is {replicas}: it must be 0 to {MAX_REPLICAS}")
        if not 0 <= synchronous <= replicas:
            raise ClusterError(f"synchronous is {synchronous}: it must be 0 to {replicas}")
        super().__init__()
        self._names = [f"replica_{number}" for number in range(1, replicas + 1)]
        self._settings = {**DEFAULT_SETTINGS, **settings}
        self._synchronous = synchronous
        self._report = progress or logger.info
        self._undo: ExitStack | None = None
        self._owner = 0
        self._version = 0

    @property
    def version(self) -> int:
        """
        The major version of PostgreSQL.
        """
        if self._undo is None:
            raise ClusterError(NOT_RUNNING)
        return self._version

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """
        Start everything; when this returns, every replica is streaming and has caught up.

        Nothing is left behind if it fails or is interrupted.
        """
        if self._undo is not None:
            raise ClusterError("the cluster is running already")
        self._owner = os.getpid()
        self._undo = ExitStack()
        atexit.register(self.stop)
        try:
            self._make_nodes(self._undo)
            self._start_primary()
            self._start_replicas()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """
        End every server, frozen ones too, and remove all that was made; nothing if not running.

        In a forked child this does nothing: the cluster belongs to the process that started it.
        """
        undo, self._undo = self._undo, None
        if undo is None or os.getpid() != self._owner:
            return
        atexit.unregister(self.stop)
        self._primary, self._replicas, self._chosen = None, {}, None
        undo.close()

    @abstractmethod
    def _make_nodes(self, undo: ExitStack) -> None:
        """Make places for all nodes, none of which has any data; say how that is undone."""

    def _start_primary(self) -> None:
        """Make the primary's data directory, start it, make the plain account."""
        self._report("initialising the primary")
        self.primary.initialise(self._settings)
        self._report("starting the primary")
        self.primary.start()
        self._version = int(self.primary.value("SHOW server_version_num")) // 10_000
        self.primary.execute("CREATE ROLE app LOGIN")
        self.primary.execute("GRANT CREATE, USAGE ON SCHEMA public TO app")

    def _start_replicas(self) -> None:
        """Copy the primary for all replicas at the same time, and start them together."""
        replicas = list(self.replicas.values())
        if not replicas:
            return
        self._report(f"copying the primary to {', '.join(self.replicas)}")
        copies = [replica.begin_clone(self.primary) for replica in replicas]
        for replica, finish_copy in zip(replicas, copies, strict=True):
            finish_copy()
            replica.start(wait=False)
        self._report("waiting for the replicas")
        for replica in replicas:
            replica.wait_ready()
            replica.wait_streaming()
        if self._synchronous:
            self._make_synchronous()
        self.wait_caught_up()

    def _make_synchronous(self) -> None:
        """Have commits wait for replicas, on whichever node is the primary."""
        standbys = f"ANY {self._synchronous} ({', '.join(self.nodes)})"
        for node in self.nodes.values():
            node.configure("synchronous_standby_names", standbys)
