"""
What every PostgreSQL server of a cluster has, wherever it runs: statements, settings, faults.

How a server is started, held and killed differs between a child process and a container; that is
left to the classes that know. All else here is said to the server itself.
"""

from __future__ import annotations

import select
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from types import MappingProxyType
from typing import Any, Literal

import psycopg
from psycopg.conninfo import make_conninfo

from lsn_consistency.testing._errors import ClusterError
from lsn_consistency.testing._workspace import LOOPBACK, POLL_SECONDS, wait_until

__all__ = ["Role", "Server", "StopMode"]

Role = Literal["primary", "replica"]
StopMode = Literal["fast", "immediate", "smart"]

START_SECONDS = 60.0
WAIT_SECONDS = 30.0
"""How long a setting or a state of the server may take to come into force."""

STOP_SECONDS = 90.0
"""Longer than wal_sender_timeout: a fast stop waits that long for a replica that hangs."""

STOP_SIGNALS: Mapping[StopMode, signal.Signals] = MappingProxyType(
    {"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "smart": signal.SIGTERM}
)

CONNECT_SECONDS = 10
CONFLICT_SECONDS = 10.0


class Server(ABC):
    """
    One server, with the faults that any server can have.

    All methods block until what they promise is the case, or raise `ClusterError` after a limit.
    They may be called in any state: freezing a frozen node does nothing.
    """

    host = LOOPBACK
    port = 0

    def __init__(self, name: str, role: Role) -> None:
        self.name = name
        self.role: Role = role
        self.frozen = False

    def __repr__(self) -> str:
        state = "frozen" if self.frozen else "running" if self.running else "stopped"
        return f"<{type(self).__name__} {self.name} ({self.role}, port {self.port}, {state})>"

    # -- connecting -----------------------------------------------------------------------------

    @property
    def conninfo(self) -> str:
        """
        The conninfo of the superuser postgres, in the database postgres.
        """
        return self.conninfo_for()

    def conninfo_for(
        self, user: str = "postgres", dbname: str = "postgres", **options: str | int
    ) -> str:
        """
        Return the conninfo of another account or database, with any other libpq option.

        The account `app` is a plain role, without privileges beyond those of the schema public.
        """
        server = make_conninfo(host=self.host, port=self.port, user=user, dbname=dbname)
        return make_conninfo(server, **{"sslmode": "disable", **options})

    @property
    def peer_address(self) -> tuple[str, int]:
        """
        The host and the port under which the other nodes reach this one.
        """
        return self.host, self.port

    def connect(self, *, user: str = "postgres", **options: Any) -> psycopg.Connection[Any]:
        """
        Open a connection, by default as the superuser and in autocommit mode.

        Options are those of `psycopg.connect`. Raises `ClusterError` while the node is frozen or
        stopped, and psycopg's own errors for all else.
        """
        if not self.running:
            raise ClusterError(f"{self.name} is not running: start() it first", self.log_tail())
        if self.frozen:
            raise ClusterError(f"{self.name} is frozen: thaw() it first")
        given = {"autocommit": True, "connect_timeout": CONNECT_SECONDS, **options}
        return psycopg.connect(self.conninfo_for(user), **given)

    def execute(
        self, statement: str, parameters: Sequence[Any] | None = None
    ) -> list[tuple[Any, ...]]:
        """
        Run one statement as the superuser on a connection of its own, and return its rows.

        A standby that catches up cancels sessions in the way of what it replays; such a statement
        is run again for `CONFLICT_SECONDS`.
        """
        deadline = time.monotonic() + CONFLICT_SECONDS
        while True:
            try:
                with self.connect() as connection:
                    # The statement comes from the test itself; a variable one is no danger there.
                    cursor = connection.execute(statement.encode(), parameters)
                    return cursor.fetchall() if cursor.description else []
            except psycopg.OperationalError as error:
                if "conflict with recovery" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)

    def value(self, statement: str) -> Any:
        """
        Return the first column of the first row of a statement.
        """
        return self.execute(statement)[0][0]

    # -- running --------------------------------------------------------------------------------

    @property
    @abstractmethod
    def running(self) -> bool:
        """
        True while the server is there, frozen or not.
        """

    @property
    def reachable(self) -> bool:
        """
        True if the server can be asked: it runs and is not frozen.
        """
        return self.running and not self.frozen

    @abstractmethod
    def start(self) -> None:
        """
        Start the server and wait until it accepts connections; nothing if it runs already.
        """

    @abstractmethod
    def stop(self, mode: StopMode = "fast") -> None:
        """
        Stop the server in one of PostgreSQL's three ways; a frozen one is thawed for it.

        A fast stop of a primary waits for its replicas to receive everything: if one is frozen,
        up to wal_sender_timeout (60 s).
        """

    def restart(self, mode: StopMode = "fast") -> None:
        """
        Stop and start the server.
        """
        self.stop(mode)
        self.start()

    @abstractmethod
    def log_mark(self) -> int:
        """
        Return where the server's log ends now.
        """

    @abstractmethod
    def log_since(self, mark: int) -> str:
        """
        Return what the server has logged since a mark.
        """

    @abstractmethod
    def log_tail(self) -> str:
        """
        Return the last lines of the server's log, for an error.
        """

    # -- faults ---------------------------------------------------------------------------------

    @abstractmethod
    def freeze(self) -> None:
        """
        Hold all processes of the server, as a machine that hangs would.

        Connections stay open and nothing answers.
        """

    @abstractmethod
    def thaw(self) -> None:
        """
        Let a frozen server go on.
        """

    @abstractmethod
    def crash(self) -> None:
        """
        Kill all of the server's processes at once, without a shutdown of any kind.

        What the operating system was given is kept, as after a crash of the server, not of the
        machine. `start()` recovers.
        """

    @abstractmethod
    def _signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to one process of the server, which may have ended by itself."""

    def crash_backend(self) -> None:
        """
        Kill one backend: the postmaster drops every connection and goes through crash recovery.

        Returns when the server accepts connections again. It is the same postmaster, so its start
        time does not change, while a replica may come back in the past.
        """
        with closing(self.connect()) as victim, closing(self.connect()) as witness:
            self._signal(victim.info.backend_pid, signal.SIGKILL)
            # The postmaster ends the other connections too; until then it has not noticed.
            noticed, _, _ = select.select([witness.fileno()], [], [], WAIT_SECONDS)
        if not noticed:
            problem = f"{self.name} did not notice that a backend died"
            raise ClusterError(problem, self.log_tail())
        if not wait_until(self._answers, START_SECONDS):
            raise ClusterError(f"{self.name} did not come back from a crash", self.log_tail())

    def _answers(self) -> bool:
        """Return whether a connection can be opened right now."""
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True

    # -- settings -------------------------------------------------------------------------------

    def configure(self, setting: str, value: str) -> None:
        """
        Change a setting that needs no restart, and return when it is in force.
        """
        loaded = "SELECT pg_conf_load_time()"
        before = self.value(loaded)
        with self.connect() as connection:
            # The server reads this text, so its own quoting rules are the ones that count.
            quoted = connection.execute("SELECT quote_literal(%s)", [value]).fetchone()
            connection.execute(f"ALTER SYSTEM SET {setting} = {quoted and quoted[0]}".encode())
            connection.execute("SELECT pg_reload_conf()")
        # A new connection inherits what the postmaster has, and the postmaster tells its children
        # in the same moment in which it reads the file.
        self._wait(
            lambda: bool(self.value(loaded) > before), f"read {setting} = {value!r}", WAIT_SECONDS
        )

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        """Wait for a condition; `ClusterError` says what was not done in time."""
        if not wait_until(condition, seconds):
            raise ClusterError(f"{self.name} did not {what} within {seconds:g} s", self.log_tail())
