"""
A real primary with streaming replicas on the loopback address, from nothing in about two seconds.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import MappingProxyType, TracebackType
from typing import Self

from lsn_consistency.lsn import Lsn
from lsn_consistency.testing._errors import ClusterError, tail
from lsn_consistency.testing._workspace import LOOPBACK, POLL_SECONDS, Workspace
from lsn_consistency.testing.node import Node
from lsn_consistency.testing.replica import Replica

__all__ = ["EmbeddedCluster"]

logger = logging.getLogger("lsn_consistency.testing")

CATCH_UP_SECONDS = 30.0
MAX_REPLICAS = 16

DEFAULT_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "listen_addresses": LOOPBACK,
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
        "hot_standby": "on",
        "hot_standby_feedback": "off",
        # How soon a replica looks for its primary again; PostgreSQL's own default is 5 s.
        "wal_retrieve_retry_interval": "100ms",
        "log_line_prefix": "%m [%p] %u@%d ",
        "timezone": "UTC",
    }
)


class EmbeddedCluster:
    """
    A primary and its replicas, for the time of a `with` block.

    `bindir` is the folder of PostgreSQL's programs (see `find_programs` for where they are looked
    for), `settings` are server settings over the defaults, `synchronous` is the number of replicas
    that a commit waits for, `progress` is called with a line of text at each step. Everything
    lives in a temporary folder and is gone afterwards, also when this process is killed.

    The database is `postgres`, the superuser `postgres`; the account `app` is a plain role that
    may create tables in the schema public. Raises `ClusterError`.
    """

    def __init__(
        self,
        replicas: int = 2,
        *,
        bindir: str | os.PathLike[str] | None = None,
        settings: Mapping[str, str] | None = None,
        synchronous: int = 0,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        if not 0 <= replicas <= MAX_REPLICAS:
            raise ClusterError(f"replicas is {replicas}: it must be 0 to {MAX_REPLICAS}")
        if not 0 <= synchronous <= replicas:
            raise ClusterError(f"synchronous is {synchronous}: it must be 0 to {replicas}")
        self._count = replicas
        self._bindir = bindir
        self._settings = {**DEFAULT_SETTINGS, **(settings or {})}
        self._synchronous = synchronous
        self._report = progress or logger.info
        self._workspace: Workspace | None = None
        self._owner = 0
        self._primary: Node | None = None
        self._replicas: dict[str, Replica] = {}

    @property
    def primary(self) -> Node:
        """
        The server that was started as the primary.
        """
        if self._primary is None:
            raise ClusterError("the cluster is not running: use it in a with block, or start() it")
        return self._primary

    @property
    def replicas(self) -> Mapping[str, Replica]:
        """
        The replicas by name: replica_1, replica_2 and so on.
        """
        return MappingProxyType(self._replicas)

    @property
    def nodes(self) -> Mapping[str, Node]:
        """
        Every node by name, the primary (under "primary") first.
        """
        return MappingProxyType({"primary": self.primary, **self._replicas})

    @property
    def version(self) -> int:
        """
        The major version of PostgreSQL.
        """
        if self._workspace is None:
            raise ClusterError("the cluster is not running: use it in a with block, or start() it")
        return self._workspace.programs.version

    # -- life -----------------------------------------------------------------------------------

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
        if self._workspace is not None:
            raise ClusterError("the cluster is running already")
        with ExitStack() as undo:
            self._owner = os.getpid()
            self._workspace = Workspace.make(self._bindir, self._report)
            undo.callback(self.stop)
            atexit.register(self.stop)
            self._start_primary(self._workspace)
            self._start_replicas(self._workspace)
            undo.pop_all()

    def stop(self) -> None:
        """
        End every server, frozen ones too, and remove the folder; nothing if not running.

        In a forked child this does nothing: the cluster belongs to the process that started it.
        """
        workspace, self._workspace = self._workspace, None
        if workspace is None or os.getpid() != self._owner:
            return
        atexit.unregister(self.stop)
        self._primary, self._replicas = None, {}
        workspace.remove()

    def _start_primary(self, workspace: Workspace) -> None:
        """Make the primary's data directory, start it, make the plain account."""
        self._report(f"PostgreSQL {workspace.programs.version} from {workspace.programs.bindir}")
        self._report("initialising the primary")
        self._primary = primary = Node("primary", "primary", workspace)
        initdb = workspace.spawn(
            primary.log,
            "initdb",
            *("--pgdata", str(primary.datadir)),
            *("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"),
            *("--no-sync", "--no-instructions"),
        )
        workspace.finish(initdb, primary.log)
        with (primary.datadir / "postgresql.conf").open("a") as file:
            file.writelines(f"{key} = {_quote(value)}\n" for key, value in self._settings.items())
        self._report("starting the primary")
        primary.start()
        primary.execute("CREATE ROLE app LOGIN")
        primary.execute("GRANT CREATE, USAGE ON SCHEMA public TO app")

    def _start_replicas(self, workspace: Workspace) -> None:
        """Copy the primary for all replicas at the same time, and start them together."""
        if not self._count:
            return
        names = [f"replica_{number}" for number in range(1, self._count + 1)]
        self._replicas = {name: Replica(name, workspace, self.primary) for name in names}
        self._report(f"copying the primary to {', '.join(names)}")
        copies = {name: replica.begin_clone() for name, replica in self._replicas.items()}
        for name, copy in copies.items():
            workspace.finish(copy, self._replicas[name].log)
            self._replicas[name].start(wait=False)
        self._report("waiting for the replicas")
        for replica in self._replicas.values():
            replica.wait_ready()
            replica.wait_streaming()
        if self._synchronous:
            standbys = f"ANY {self._synchronous} ({', '.join(names)})"
            self.primary.configure("synchronous_standby_names", standbys)
        self.wait_caught_up()

    # -- state ----------------------------------------------------------------------------------

    def wait_caught_up(self, timeout: float = CATCH_UP_SECONDS) -> None:
        """
        Wait until every replica has replayed all that the primary has written up to this call.

        Replicas that are stopped, frozen, paused or promoted are left out. Commits made with
        `synchronous_commit=off` count as well: if some are not on disk yet, one small record is
        written to get them there. Raises `ClusterError` that names who is how far behind.
        """
        target = self._position()
        deadline = time.monotonic() + timeout
        behind = self._behind(target)
        while behind:
            if time.monotonic() > deadline:
                self._complain(behind, target, timeout)
            time.sleep(POLL_SECONDS)
            behind = self._behind(target)

    def _position(self) -> Lsn:
        """Return a position of the primary that covers every commit and is on disk."""
        statement = "SELECT pg_current_wal_insert_lsn()::text, pg_current_wal_flush_lsn()::text"
        with self.primary.connect() as connection:
            inserted, flushed = connection.execute(statement).fetchone() or ("", "")
            if inserted != flushed:
                # A commit of our own flushes everything before it; local, lest it waits for
                # synchronous replicas that are not there.
                connection.execute("SET synchronous_commit = local")
                connection.execute("SELECT pg_logical_emit_message(true, 'lsn_consistency', '')")
                _, flushed = connection.execute(statement).fetchone() or ("", "")
            return Lsn.parse(flushed)

    def _behind(self, target: Lsn) -> dict[Replica, Lsn]:
        """Return the replicas that have to catch up and have not, with how far they are."""
        found = {}
        for replica in self._replicas.values():
            if replica.running and not replica.frozen and replica.role == "replica":
                position = replica.replay_lsn()
                if position < target and not replica.paused:
                    found[replica] = position
        return found

    def _complain(self, behind: dict[Replica, Lsn], target: Lsn, timeout: float) -> None:
        """Raise the error that says who is behind, and why if that is known."""
        parts = [
            f"{replica.name} is {target - position} bytes behind "
            f"(replayed {position} of {target}, {replica.describe()})"
            for replica, position in behind.items()
        ]
        logs = "\n".join(tail(replica.log) for replica in behind)
        raise ClusterError(f"not caught up after {timeout:g} s: {'; '.join(parts)}", logs)

    def heal(self) -> None:
        """
        Undo every fault of every node, and return when all replicas have caught up.

        Thaws, starts, resumes replay, ends delays, reconnects; a promoted replica is copied anew.
        On a healthy cluster it only asks, in a few milliseconds. Data and settings stay.
        """
        self.primary.thaw()
        self.primary.start()
        for replica in self._replicas.values():
            replica.heal()
        self.wait_caught_up()


def _quote(value: str) -> str:
    """Quote a value for postgresql.conf."""
    escaped = str(value).replace("'", "''")
    return f"'{escaped}'"
