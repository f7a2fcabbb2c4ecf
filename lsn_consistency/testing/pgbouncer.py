"""
PgBouncer before the servers of a cluster, and what can happen to a pooler.

::

    with EmbeddedCluster(replicas=1) as pg:
        nodes = {"main": pg.primary, "reader": pg.replicas["replica_1"]}
        with PgBouncer(nodes) as pooler:
            app = make_app(pooler.conninfo_for("main"), [pooler.conninfo_for("reader")])
            pooler.point("reader", pg.primary)   # another server, the same connections
            pooler.pause()                       # everybody waits
            pooler.resume()

The program is that of the machine (``apt-get install pgbouncer``); tested with PgBouncer 1.18.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from lsn_consistency.testing._errors import ClusterError, ProgramsNotFoundError, tail
from lsn_consistency.testing._workspace import LOOPBACK, POLL_SECONDS, Workspace, free_port
from lsn_consistency.testing.programs import Programs, unprivileged_account

__all__ = ["PgBouncer", "PoolMode", "find_pgbouncer"]

PoolMode = Literal["transaction", "session", "statement"]

PROGRAM_VARIABLE: Final = "LSN_CONSISTENCY_PGBOUNCER"

START_SECONDS: Final = 20.0
COMMAND_SECONDS: Final = 20.0
"""How long the admin console may take; a pause waits for the transactions under way."""

CONNECT_SECONDS: Final = 10

_VERSION_SECONDS: Final = 30.0
_PROGRAM: Final = "pgbouncer"
_USERS: Final = ("postgres", "app")
_LOG, _CONFIGURATION, _ACCOUNTS = "pgbouncer.log", "pgbouncer.ini", "users.txt"
_VERSION: Final = re.compile(r"PgBouncer (\d+)\.(\d+)")
_SYSTEM_FOLDERS: Final = ("/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/bin")
_PORT_TAKEN: Final = "Address already in use"
_HINT: Final = f"apt-get install pgbouncer, or name the program in {PROGRAM_VARIABLE}"

_DEFAULT_SETTINGS: Final[Mapping[str, str]] = {
    "auth_type": "trust",
    "admin_users": "postgres",
    "unix_socket_dir": "",
    "max_client_conn": "500",
    "log_connections": "0",
    "log_disconnections": "0",
    "log_stats": "0",
    # A server that refused a connection is tried again soon; PgBouncer's own default is 15 s.
    "server_login_retry": "0.1",
}


class _Server(Protocol):
    """What a database entry can lead to: a node of a cluster."""

    @property
    def conninfo(self) -> str: ...


def find_pgbouncer() -> Programs:
    """
    Return the PgBouncer to use, with its minor version: 18 for 1.18.

    The first of these: the program named by the environment variable LSN_CONSISTENCY_PGBOUNCER,
    one in PATH, one in the usual system folders. Raises `ProgramsNotFoundError`.
    """
    ordered = os.environ.get(PROGRAM_VARIABLE)
    folders = os.pathsep.join([os.environ.get("PATH", ""), *_SYSTEM_FOLDERS])
    found = ordered or shutil.which(_PROGRAM, path=folders)
    if not found:
        raise ProgramsNotFoundError(f"no PgBouncer found: {_HINT}")
    try:
        told = subprocess.run(
            [found, "--version"], capture_output=True, text=True, timeout=_VERSION_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProgramsNotFoundError(f"{found} does not run: {error}: {_HINT}") from error
    match = _VERSION.search(told.stdout)
    if match is None:
        raise ProgramsNotFoundError(f"{found} is not PgBouncer: {told.stdout.strip()}: {_HINT}")
    if Path(found).name != _PROGRAM:
        # What is left over is found by the name of its program.
        raise ProgramsNotFoundError(f"{found} has to be named {_PROGRAM}")
    return Programs(Path(found).absolute().parent, int(match[2]))


class PgBouncer:
    """
    One PgBouncer before one server or several, for the time of a `with` block.

    ``servers`` is a node of a cluster, or a mapping of database names to nodes. A text in place of
    a node is the line of PgBouncer's ``[databases]`` section as it stands. ``settings`` are those
    of its section ``[pgbouncer]``, over the defaults. ``address`` and ``port`` say where it
    listens.

    It runs as the unprivileged account that the servers run as, and is gone afterwards, also when
    this process is killed. Raises `ClusterError`.
    """

    def __init__(
        self,
        servers: _Server | Mapping[str, _Server | str],
        pool_mode: PoolMode = "transaction",
        *,
        settings: Mapping[str, str | float] | None = None,
        address: str = LOOPBACK,
        port: int | None = None,
    ) -> None:
        entries = servers if isinstance(servers, Mapping) else {"postgres": servers}
        if not entries:
            raise ClusterError("a pooler needs a server to stand before")
        self._entries = {name: _entry(server) for name, server in entries.items()}
        self._settings: dict[str, str | float] = {
            **_DEFAULT_SETTINGS,
            "pool_mode": pool_mode,
            **(settings or {}),
        }
        self.pool_mode: PoolMode = pool_mode
        self.address = address
        self.port = free_port() if port is None else port
        self._port_is_given = port is not None
        self._workspace: Workspace | None = None
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<PgBouncer {', '.join(self._entries)} (port {self.port}, {state})>"

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

    # -- connecting -----------------------------------------------------------------------------

    @property
    def conninfo(self) -> str:
        """
        The conninfo of the first database entry, as the superuser postgres.
        """
        return self.conninfo_for()

    def conninfo_for(
        self, name: str | None = None, *, user: str = "postgres", **options: str | int
    ) -> str:
        """
        Return the conninfo of a database entry, by default the first, with any libpq option.

        The accounts are those of `EmbeddedCluster`: postgres and app.
        """
        dbname = next(iter(self._entries)) if name is None else name
        server = make_conninfo(host=self.address, port=self.port, user=user, dbname=dbname)
        return make_conninfo(server, **{"sslmode": "disable", **options})

    def admin(self, command: str) -> list[dict[str, str | None]]:
        """
        Run a command of the admin console (``SHOW POOLS``, ``KILL main``, ...); return its rows.

        Raises psycopg's own errors, and `ClusterError` after `COMMAND_SECONDS`.
        """
        conninfo = self.conninfo_for("pgbouncer", connect_timeout=CONNECT_SECONDS)
        with psycopg.connect(conninfo, autocommit=True) as conn:
            return _rows(_result(conn.pgconn, command))

    # -- running --------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """
        True while the process is there, frozen or not.
        """
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """
        The process id; `ClusterError` if there is none.
        """
        if self._process is None or self._process.poll() is not None:
            raise ClusterError("PgBouncer is not running", self._tail())
        return self._process.pid

    def start(self) -> None:
        """
        Start it and wait until it answers; nothing if it runs already.
        """
        if self.running:
            return
        if self._workspace is None:
            self._workspace = Workspace.around(find_pgbouncer(), unprivileged_account())
            self._owner = os.getpid()
        deadline = time.monotonic() + START_SECONDS
        try:
            self._spawn(self._workspace)
            while not self._answers():
                if not self.running:
                    self._retry_port(self._workspace)
                if time.monotonic() > deadline:
                    raise ClusterError(f"PgBouncer did not start in {START_SECONDS:g} s")
                time.sleep(POLL_SECONDS)
        except BaseException as error:
            problem = self._tail()
            self.stop()
            if isinstance(error, ClusterError):
                raise ClusterError(error.message, problem) from None
            raise

    def stop(self) -> None:
        """
        End it and remove its folder; nothing if it was not started.
        """
        workspace, self._workspace = self._workspace, None
        self._process = None
        # In a forked child there is nothing to end: the pooler belongs to who started it.
        if workspace is not None and os.getpid() == self._owner:
            workspace.remove()

    def kill(self) -> None:
        """
        Kill the process: every connection through it breaks. `start()` brings it back.
        """
        os.kill(self.pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait(START_SECONDS)

    def freeze(self) -> None:
        """
        Hold the process: connections stay open, nothing is passed on until `thaw()`.
        """
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """
        Let a frozen process go on.
        """
        os.kill(self.pid, signal.SIGCONT)

    # -- what stands behind ---------------------------------------------------------------------

    def point(self, name: str, server: _Server | str) -> None:
        """
        Have a database entry lead to another server; clients stay connected.

        A transaction under way ends where it began. In session mode, so does every session.
        """
        self._entries[name] = _entry(server)
        self._reload()

    def configure(self, setting: str, value: str | float) -> None:
        """
        Change a setting that needs no restart.
        """
        self._settings[setting] = value
        self._reload()

    def pause(self, name: str | None = None) -> None:
        """
        Let nobody through to one database, or to all, until `resume()`; clients wait.

        Returns when the transactions under way have ended; in session mode only when the clients
        have left, so `freeze()` there.
        """
        self.admin("PAUSE" if name is None else f"PAUSE {name}")

    def resume(self, name: str | None = None) -> None:
        """
        End `pause()`.
        """
        self.admin("RESUME" if name is None else f"RESUME {name}")

    def _reload(self) -> None:
        """Write the configuration and have it read."""
        if self._workspace is not None:
            self._write(self._workspace.folder)
        if self.running:
            self.admin("RELOAD")

    def _spawn(self, workspace: Workspace) -> None:
        """Start the process; it becomes our child, so that its end is seen at once."""
        self._write(workspace.folder)
        self._process = workspace.spawn(
            workspace.folder / _LOG, _PROGRAM, str(workspace.folder / _CONFIGURATION)
        )

    def _retry_port(self, workspace: Workspace) -> None:
        """Start the process again on another port; raise if that was not the problem."""
        if self._port_is_given or _PORT_TAKEN not in self._tail():
            raise ClusterError("PgBouncer did not start")
        self.port = free_port()
        (workspace.folder / _LOG).unlink()
        self._spawn(workspace)

    def _write(self, folder: Path) -> None:
        """Write the configuration, readable for the account that the process runs as."""
        settings = {
            "listen_addr": self.address,
            "listen_port": self.port,
            "auth_file": folder / _ACCOUNTS,
            **self._settings,
        }
        lines = [
            "[databases]",
            *(f"{name} = {entry}" for name, entry in self._entries.items()),
            "[pgbouncer]",
            *(f"{name} = {value}" for name, value in settings.items()),
        ]
        for name, text in (
            (_ACCOUNTS, "".join(f'"{user}" ""\n' for user in _USERS)),
            (_CONFIGURATION, "".join(f"{line}\n" for line in lines)),
        ):
            (folder / name).write_text(text)
            (folder / name).chmod(0o644)

    def _answers(self) -> bool:
        """Return whether the admin console can be reached, and is that of our own process."""
        try:
            self.admin("SHOW VERSION")
        except psycopg.OperationalError:
            return False
        return self.running

    def _tail(self) -> str:
        """Return the end of the log."""
        return "" if self._workspace is None else tail(self._workspace.folder / _LOG)


def _entry(server: _Server | str) -> str:
    """Return the right side of a line of the section ``[databases]``."""
    if isinstance(server, str):
        return server
    known = conninfo_to_dict(server.conninfo)
    # A password is that of one account, so it takes the place of the client's.
    names = ("host", "port", "dbname", *(("user", "password") if known.get("password") else ()))
    return " ".join(f"{name}={known[name]}" for name in names)


def _result(pgconn: Any, command: str) -> Any:
    """Run a command within its time; psycopg's cursors would wait without end."""
    deadline = time.monotonic() + COMMAND_SECONDS
    pgconn.send_query(command.encode())
    pgconn.flush()
    results: list[Any] = []
    while True:
        while pgconn.is_busy():
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([pgconn.socket], [], [], left)
            if not ready:
                raise ClusterError(f"{command} took more than {COMMAND_SECONDS:g} s")
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            return results[-1]
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.OperationalError(f"{command}: {result.error_message.decode()}")
        results.append(result)


def _rows(result: Any) -> list[dict[str, str | None]]:
    """Return the rows of a result by column name."""
    names = [result.fname(column).decode() for column in range(result.nfields)]
    return [
        {
            name: None if (value := result.get_value(row, column)) is None else value.decode()
            for column, name in enumerate(names)
        }
        for row in range(result.ntuples)
    ]
