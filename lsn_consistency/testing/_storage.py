"""
The data directory of a node: how it is made, copied, rewound, and made that of a standby.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

from lsn_consistency.testing._errors import ClusterError
from lsn_consistency.testing._server import START_SECONDS, WAIT_SECONDS
from lsn_consistency.testing.node import Node

__all__ = ["StoredNode"]

_SETTINGS_FILE = "postgresql.auto.conf"
_STANDBY_FILE = "standby.signal"
_LOCK_FILE = "postmaster.pid"
_PID_LINE, _STATUS_LINE = 0, 7
_OF_REPLICATION = ("primary_conninfo", "recovery_min_apply_delay")


class StoredNode(Node):
    """
    A node whose files the kit can reach, wherever they are.
    """

    @property
    @abstractmethod
    def _data(self) -> str:
        """The data directory, as PostgreSQL's programs are given it."""

    @abstractmethod
    def _begin(self, program: str, *arguments: str) -> Callable[[], None]:
        """Start one of PostgreSQL's programs, and return what waits for its success."""

    @abstractmethod
    def _read(self, file: str) -> str | None:
        """Return a file of the data directory, None if there is none."""

    @abstractmethod
    def _write(self, file: str, text: str) -> None:
        """Replace a file of the data directory."""

    @abstractmethod
    def _clear(self) -> None:
        """Remove the data directory."""

    @abstractmethod
    def start(self, *, wait: bool = True) -> None:
        """
        Start the server and wait until it accepts connections; nothing if it runs already.

        With `wait=False` return at once and leave the waiting to `wait_ready()`.
        """

    @abstractmethod
    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """
        Wait until the server accepts connections.
        """

    def _lock_file(self) -> tuple[int, bool]:
        """
        Return who runs on the data directory, and whether it says that it accepts connections.

        That is the process id of the postmaster, 0 without one.
        """
        lines = (self._read(_LOCK_FILE) or "").splitlines()
        pid = int(lines[_PID_LINE]) if lines and lines[_PID_LINE].isdecimal() else 0
        return pid, len(lines) > _STATUS_LINE and lines[_STATUS_LINE].strip() == "ready"

    # -- making and copying ---------------------------------------------------------------------

    def initialise(self, settings: Mapping[str, str]) -> None:
        """
        Make the data directory of a primary that has these settings.
        """
        self._begin(
            "initdb",
            *("--pgdata", self._data),
            *("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"),
            *("--no-sync", "--no-instructions"),
        )()
        lines = [f"{name} = {_quote(value)}" for name, value in settings.items()]
        self._append("postgresql.conf", lines)

    def _append(self, file: str, lines: list[str]) -> None:
        """Add lines to a file of the data directory."""
        self._write(file, "\n".join([self._read(file) or "", *lines, ""]))

    def begin_clone(self, source: Node) -> Callable[[], None]:
        """
        Start copying another node into an empty data directory.

        Return what waits for the end of it; after that `start()` makes a standby of the copy.
        """
        settings = self._read(_SETTINGS_FILE)
        self._clear()
        wait_for_copy = self._begin(
            "pg_basebackup",
            *("--pgdata", self._data),
            *("--dbname", self._conninfo_of(source)),
            *("--wal-method=stream", "--checkpoint=fast", "--write-recovery-conf"),
            *("--no-sync", "--no-manifest", "--no-password"),
        )

        def finish() -> None:
            wait_for_copy()
            self._stand_by(source, settings)

        return finish

    def rebuild(self, source: Node | None = None) -> None:
        """
        Throw the data away and make a new copy of `source`, by default the last one followed.

        Returns when it streams; its settings stay and its apply delay ends.
        """
        chosen = source or self._last_source
        if chosen is None or chosen is self:
            raise ClusterError(f"{self.name} needs another node to copy")
        self.stop("immediate")
        self.begin_clone(chosen)()
        self.start()
        self._wait_following(chosen, WAIT_SECONDS)

    def rewind(self, source: Node) -> None:
        """
        Make a replica of `source` out of a node that has gone another way: see `Node.rewind`.
        """
        if source is self:
            raise ClusterError(f"{self.name} cannot be rewound to itself")
        # Before PostgreSQL 16 pg_rewind learns the timeline of the source from its last
        # checkpoint, which may be older than its promotion.
        source.execute("CHECKPOINT")
        self._stop_for_rewind()
        settings = self._read(_SETTINGS_FILE)
        self._begin(
            "pg_rewind",
            *("--target-pgdata", self._data),
            *("--source-server", f"{self._conninfo_of(source)} dbname=postgres"),
            *("--write-recovery-conf", "--no-sync"),
        )()
        self._stand_by(source, settings)
        self.start()
        self._wait_following(source, WAIT_SECONDS)

    def _stop_for_rewind(self) -> None:
        """Stop the server in the way that leaves a data directory which pg_rewind takes."""
        if self._read(_STANDBY_FILE) is not None:
            # pg_rewind recovers a crashed primary by itself, but not a crashed standby.
            self.start()
            self.stop("fast")
        else:
            self.stop("immediate")

    def _stand_by(self, source: Node, settings: str | None) -> None:
        """
        Make a stopped copy of `source` a standby of it, with settings of its own.

        Without these it keeps those of the copy, save what belongs to the other's replication.
        """
        given = (self._read(_SETTINGS_FILE) or "") if settings is None else settings
        kept = [line for line in given.splitlines() if not line.startswith(_OF_REPLICATION)]
        following = f"primary_conninfo = '{self._conninfo_of(source)}'"
        self._write(_SETTINGS_FILE, "\n".join([*kept, following, ""]))
        self._became_replica(source)


def _quote(value: str) -> str:
    """Quote a value for postgresql.conf."""
    escaped = str(value).replace("'", "''")
    return f"'{escaped}'"
