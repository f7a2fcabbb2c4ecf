"""
One PostgreSQL server of a cluster: the primary, and what every server has in common.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any, Literal

import psycopg
from psycopg.conninfo import make_conninfo

from lsn_consistency.testing import _reaper
from lsn_consistency.testing._errors import ClusterError, tail
from lsn_consistency.testing._workspace import (
    LOOPBACK,
    POLL_SECONDS,
    Workspace,
    free_port,
    wait_until,
)

__all__ = ["Node", "Role", "StopMode"]

Role = Literal["primary", "replica"]
StopMode = Literal["fast", "immediate", "smart"]

START_SECONDS = 60.0
STOP_SECONDS = 90.0
"""Longer than wal_sender_timeout: a fast stop waits that long for a replica that hangs."""

WAIT_SECONDS = 30.0
"""How long a setting or a state of the server may take to come into force."""

CONNECT_SECONDS = 10
CONFLICT_SECONDS = 10.0
START_TRIALS = 20
PORT_RETRY_SECONDS = 0.25

_STOP_SIGNALS = {
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
    "smart": signal.SIGTERM,
}
_PID_LINE, _STATUS_LINE = 0, 7
_PORT_TAKEN = "Address already in use"


class Node:
    """
    One server, with the faults that any server can have.

    All methods block until what they promise is the case, or raise `ClusterError` after a limit.
    They may be called in any state: freezing a frozen node does nothing.
    """

    def __init__(self, name: str, role: Role, workspace: Workspace) -> None:
        self.name = name
        self.role: Role = role
        self.port = free_port()
        self.frozen = False
        self.datadir = workspace.folder / name
        self.log = workspace.folder / f"{name}.log"
        self._workspace = workspace
        self._postmaster: subprocess.Popen[bytes] | None = None
        self._port_is_known = False

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
        server = make_conninfo(host=LOOPBACK, port=self.port, user=user, dbname=dbname)
        return make_conninfo(server, **{"sslmode": "disable", **options})

    def connect(self, *, user: str = "postgres", **options: Any) -> psycopg.Connection[Any]:
        """
        Open a connection, by default as the superuser and in autocommit mode.

        Options are those of `psycopg.connect`. Raises `ClusterError` while the node is frozen or
        stopped, and psycopg's own errors for all else.
        """
        if not self.running:
            raise ClusterError(f"{self.name} is not running: start() it first", tail(self.log))
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
    def running(self) -> bool:
        """
        True while the postmaster is there, frozen or not.
        """
        return self._postmaster is not None and self._postmaster.poll() is None

    @property
    def pid(self) -> int:
        """
        The process id of the postmaster; `ClusterError` if there is none.
        """
        if self._postmaster is None or self._postmaster.poll() is not None:
            raise ClusterError(f"{self.name} is not running", tail(self.log))
        return self._postmaster.pid

    def start(self, *, wait: bool = True) -> None:
        """
        Start the server and wait until it accepts connections; nothing if it runs already.

        With `wait=False` return at once and leave the waiting to `wait_ready()`. The port stays
        the same over the life of the node.
        """
        if not self.running:
            self._spawn()
        if wait:
            self.wait_ready()

    def _spawn(self) -> None:
        """Start the postmaster; it becomes our child, so that its end is seen at once."""
        self.frozen = False
        self._postmaster = self._workspace.spawn(
            self.log,
            "postgres",
            *("-D", str(self.datadir)),
            *("-c", f"port={self.port}"),
            *("-c", f"cluster_name={self.name}"),
        )

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """
        Wait until the server accepts connections.

        A server that dies because its port is taken is started again: on another port if
        nobody has seen this one yet, on the same one otherwise.
        """
        deadline = time.monotonic() + seconds
        for _ in range(START_TRIALS):
            left = max(0.0, deadline - time.monotonic())
            wait_until(lambda: not self.running or self._says_ready(), left)
            if self.running:
                break
            if _PORT_TAKEN not in tail(self.log):
                raise ClusterError(f"{self.name} did not start", tail(self.log))
            self._retry_port()
        if not self._says_ready():
            problem = f"{self.name} accepted no connections for {seconds:g} s"
            raise ClusterError(problem, tail(self.log))
        self._port_is_known = True

    def _retry_port(self) -> None:
        """Start the server again after its port was refused."""
        if not self._port_is_known:
            self.port = free_port()
        else:
            # Whoever has it may let go of it within the next moment.
            time.sleep(PORT_RETRY_SECONDS)
        self.log.rename(self.log.with_suffix(".port-taken.log"))
        self._spawn()

    def _says_ready(self) -> bool:
        """Read the lock file, in which the postmaster of this run says what state it is in."""
        try:
            lines = (self.datadir / "postmaster.pid").read_text().splitlines()
            ours = self._postmaster is not None and int(lines[_PID_LINE]) == self._postmaster.pid
            return ours and lines[_STATUS_LINE].strip() == "ready"
        except (OSError, IndexError, ValueError):
            return False

    def stop(self, mode: StopMode = "fast") -> None:
        """
        Stop the server in one of PostgreSQL's three ways; a frozen one is thawed for it.

        A fast stop of a primary waits for its replicas to receive everything: if one is frozen,
        up to wal_sender_timeout (60 s).
        """
        if not self.running:
            return
        self.thaw()
        os.kill(self.pid, _STOP_SIGNALS[mode])
        self._wait_gone(f"{mode} stop")

    def _wait_gone(self, what: str) -> None:
        """Wait until the postmaster has ended."""
        if self._postmaster is None:
            return
        try:
            self._postmaster.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            problem = f"{self.name} was still there {STOP_SECONDS:g} s after its {what}"
            raise ClusterError(problem, tail(self.log)) from None
        self.frozen = False

    def restart(self, mode: StopMode = "fast") -> None:
        """
        Stop and start the server.
        """
        self.stop(mode)
        self.start()

    # -- faults ---------------------------------------------------------------------------------

    def freeze(self) -> None:
        """
        Hold the postmaster and all its children, as a machine that hangs would.

        Connections stay open and nothing answers. SIGSTOP, so nothing in the server can tell.
        """
        if self.frozen:
            return
        pid = self.pid
        self.frozen = True

        def held() -> bool:
            # The postmaster comes first in the tree and starts no children once it is held;
            # those that it started meanwhile are found by looking again.
            moving = [process for process in _reaper.tree(pid) if not process.stopped]
            _reaper.send(moving, signal.SIGSTOP)
            return not moving

        if not wait_until(held, WAIT_SECONDS):
            raise ClusterError(f"{self.name} could not be frozen within {WAIT_SECONDS:g} s")

    def thaw(self) -> None:
        """
        Let a frozen server go on.
        """
        if not self.frozen:
            return
        # Children first: when the postmaster wakes, they are able to answer it.
        _reaper.send(_reaper.tree(self.pid)[::-1], signal.SIGCONT)
        self.frozen = False

    def crash(self) -> None:
        """
        Kill all of the server's processes at once, without a shutdown of any kind.

        What the operating system was given is kept, as after a crash of the server, not of the
        machine. `start()` recovers.
        """
        if not self.running:
            return
        family = _reaper.tree(self.pid)
        _reaper.send(family, signal.SIGKILL)
        self._wait_gone("kill")

        def gone() -> bool:
            # A child that was forked in that moment, or that ignores the death of its parent
            # because it is stopped, would keep the shared memory and with it the next start.
            left = _reaper.processes_in(self.datadir)
            _reaper.send(left, signal.SIGKILL)
            return not left and not any(_reaper.alive(process.pid) for process in family)

        if not wait_until(gone, WAIT_SECONDS):
            raise ClusterError(f"{self.name} still has processes after they were killed")

    def crash_backend(self) -> None:
        """
        Kill one backend: the postmaster drops every connection and goes through crash recovery.

        Returns when the server accepts connections again. It is the same postmaster, so its start
        time does not change, while a replica may come back in the past.
        """
        victim, witness = self.connect(), self.connect()
        os.kill(victim.info.backend_pid, signal.SIGKILL)
        # The postmaster ends the other connections too; until then it has not noticed.
        noticed, _, _ = select.select([witness.fileno()], [], [], WAIT_SECONDS)
        victim.close()
        witness.close()
        if not noticed:
            raise ClusterError(f"{self.name} did not notice that a backend died", tail(self.log))
        if not wait_until(self._answers, START_SECONDS):
            raise ClusterError(f"{self.name} did not come back from a crash", tail(self.log))

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
        if not wait_until(lambda: bool(self.value(loaded) > before), WAIT_SECONDS):
            raise ClusterError(f"{self.name} did not read {setting} = {value!r}", tail(self.log))
