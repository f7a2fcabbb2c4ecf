"""
A server of the container cluster: a machine of its own, whose networks can be unplugged.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any, Literal

import psycopg

from lsn_consistency.testing._errors import ClusterError, last_lines
from lsn_consistency.testing._machines import HOME, Machine, Program
from lsn_consistency.testing._server import (
    START_SECONDS,
    STOP_SECONDS,
    STOP_SIGNALS,
    Role,
    StopMode,
)
from lsn_consistency.testing._storage import StoredNode
from lsn_consistency.testing._workspace import wait_until
from lsn_consistency.testing.node import Node

__all__ = ["CLIENTS", "REPLICATION", "ContainerNode", "NetworkName"]

NetworkName = Literal["clients", "replication"]
CLIENTS: NetworkName = "clients"
REPLICATION: NetworkName = "replication"

FIRST_PORT = 5432

_DATA = f"{HOME}/data"
_LOG = f"{HOME}/server.log"
_TRUST = ["host all all all trust", "host replication all all trust"]


class ContainerNode(StoredNode):
    """
    A node of `ContainerCluster`: what `Node` says, on a machine that can also be cut off.

    `freeze()` pauses the container and `crash()` kills it: the whole machine, not only the
    server. `pause()`, `unpause()` and `kill()` are other names for these.
    """

    def __init__(self, name: str, role: Role, machine: Machine) -> None:
        super().__init__(name, role)
        self.host = machine.address(CLIENTS)
        # Each has a port of its own, so that a server is known by it as in an embedded cluster.
        self.port = FIRST_PORT + machine.number
        self._machine = machine
        self._server: Program | None = None

    # -- networks -------------------------------------------------------------------------------

    @property
    def peer_address(self) -> tuple[str, int]:
        """
        The address in the network between the nodes, and the port.
        """
        return self._machine.address(REPLICATION), self.port

    @property
    def disconnected(self) -> frozenset[str]:
        """
        The networks that the node is cut off from: "clients", "replication", both or none.
        """
        return frozenset(self._machine.unplugged)

    @property
    def reachable(self) -> bool:
        """
        True if the node can be asked: it runs, is not frozen, and clients are not cut off.
        """
        return super().reachable and CLIENTS not in self.disconnected

    def disconnect(self, network: NetworkName | None = None) -> None:
        """
        Cut the node off from one of its networks, by default from both.

        "clients" is where this process and the application reach it, "replication" where the
        nodes reach each other. Connections stay open on both sides and nothing arrives any more;
        the server goes on. Lasts until `reconnect()`, also over a crash and a start.
        """
        for purpose in _networks(network):
            self._machine.unplug(purpose)

    def reconnect(self, network: NetworkName | None = None) -> None:
        """
        Undo `disconnect()`, for one network or both; the addresses are as before.

        Connections that both ends still hold go on when TCP sends again what was lost.
        """
        for purpose in _networks(network):
            self._machine.plug(purpose)

    def connect(self, *, user: str = "postgres", **options: Any) -> psycopg.Connection[Any]:
        """
        Open a connection, by default as the superuser and in autocommit mode.

        Options are those of `psycopg.connect`. Raises `ClusterError` while the node is frozen,
        stopped or disconnected from its clients, and psycopg's own errors for all else.
        """
        if CLIENTS in self.disconnected:
            raise ClusterError(f"{self.name} is disconnected: reconnect() it, or run() a program")
        return super().connect(user=user, **options)

    def run(self, program: str, *arguments: str) -> str:
        """
        Run a program on the node's machine and return its output, also while disconnected.

        PostgreSQL's own programs find the server at 127.0.0.1 and `port`. Raises `ClusterError`
        with the output if it fails.
        """
        self._wake()
        return self._machine.run(program, *arguments)

    # -- running --------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """
        True while the server is there, frozen or not.
        """
        return self._server is not None and self._server.running

    @property
    def pid(self) -> int:
        """
        The process id of the postmaster, as its machine counts; `ClusterError` if there is none.
        """
        pid = self._lock_file()[0] if self.running else 0
        if not pid:
            raise ClusterError(f"{self.name} is not running", self.log_tail())
        return pid

    def start(self, *, wait: bool = True) -> None:
        """
        Start the server, and before it the machine if that was killed, and wait until it is ready.

        With `wait=False` return at once and leave the waiting to `wait_ready()`. Nothing happens
        if it runs already.
        """
        if not self.running:
            self._wake()
            self.frozen = False
            self._server = self._machine.begin(
                _LOG,
                *("postgres", "-D", _DATA),
                *("-c", f"port={self.port}"),
                *("-c", f"cluster_name={self.name}"),
            )
        if wait:
            self.wait_ready()

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """
        Wait until the server accepts connections.
        """
        wait_until(lambda: not self.running or self._says_ready(), seconds)
        if not self.running:
            raise ClusterError(f"{self.name} did not start", self.log_tail())
        if not self._says_ready():
            problem = f"{self.name} accepted no connections for {seconds:g} s"
            raise ClusterError(problem, self.log_tail())

    def _wake(self) -> None:
        """Start a machine that was killed."""
        if self._machine.wake():
            # The numbers of processes begin anew: somebody else may have that of the server now.
            self._machine.run("rm", "-f", f"{_DATA}/postmaster.pid")

    def _says_ready(self) -> bool:
        """Return whether the server says that it accepts connections."""
        return self._lock_file()[1]

    def stop(self, mode: StopMode = "fast") -> None:
        """
        Stop the server in one of PostgreSQL's three ways; the machine goes on.

        A frozen one is thawed for it. A fast stop of a primary waits for its replicas to receive
        everything: if one is frozen or cut off, up to wal_sender_timeout.
        """
        if not self.running:
            return
        self.thaw()
        self._signal(self.pid, STOP_SIGNALS[mode])
        if not wait_until(lambda: not self.running, STOP_SECONDS):
            problem = f"{self.name} was still there {STOP_SECONDS:g} s after its {mode} stop"
            raise ClusterError(problem, self.log_tail())

    # -- faults ---------------------------------------------------------------------------------

    def freeze(self) -> None:
        """
        Hold everything on the machine, as one that hangs would: `docker pause`.

        Connections stay open and nothing answers.
        """
        if self.frozen:
            return
        if not self.running:
            raise ClusterError(f"{self.name} is not running", self.log_tail())
        self._machine.pause()
        self.frozen = True

    def thaw(self) -> None:
        """
        Let a frozen machine go on.
        """
        if self.frozen:
            self._machine.unpause()
            self.frozen = False

    def crash(self) -> None:
        """
        Kill everything on the machine at once: `docker kill`.

        The kernel still ends the connections; new ones get no answer. For a power failure, of
        which nobody is told, `disconnect()` first. What was written is kept, and `start()` starts
        the machine and the server, which recovers.
        """
        if not self.running:
            return
        self._machine.kill()
        self.frozen = False

    pause, unpause, kill = freeze, thaw, crash

    def _signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to one process of the server, which may have ended by itself."""
        self._machine.run("sh", "-c", f"kill -{int(number)} {pid} 2>/dev/null || true")

    def heal(self, source: Node | None = None) -> None:
        """
        Undo every fault: see `Node.heal`; the node is connected to both networks again.
        """
        self.reconnect()
        super().heal(source)

    # -- the log --------------------------------------------------------------------------------

    def log_mark(self) -> int:
        """
        Return where the log ends now.
        """
        return len(self._machine.read(_LOG) or b"")

    def log_since(self, mark: int) -> str:
        """
        Return what was logged since a mark.
        """
        return (self._machine.read(_LOG) or b"")[mark:].decode("utf-8", "replace")

    def log_tail(self) -> str:
        """
        Return the last lines of the log, or an empty text when there is none.
        """
        return last_lines(self._machine.read(_LOG) or b"")

    # -- files ----------------------------------------------------------------------------------

    @property
    def _data(self) -> str:
        """The data directory."""
        return _DATA

    def _begin(self, program: str, *arguments: str) -> Callable[[], None]:
        """Start one of PostgreSQL's programs, and return what waits for its success."""
        self._wake()
        started = self._machine.begin(_LOG, program, *arguments)

        def finish() -> None:
            try:
                started.finish()
            except ClusterError as error:
                raise ClusterError(f"{self.name}: {error}", self.log_tail()) from None

        return finish

    def _read(self, file: str) -> str | None:
        """Return a file of the data directory, None if there is none."""
        found = self._machine.read(f"{_DATA}/{file}")
        return None if found is None else found.decode("utf-8", "replace")

    def _write(self, file: str, text: str) -> None:
        """Replace a file of the data directory."""
        self._wake()
        self._machine.run("sh", "-c", f'printf %s "$1" >{_DATA}/{file}', "sh", text)

    def _clear(self) -> None:
        """Remove the data directory."""
        self._wake()
        self._machine.run("rm", "-rf", _DATA)

    def initialise(self, settings: Mapping[str, str]) -> None:
        """
        Make the data directory of a primary that has these settings and lets every address in.
        """
        super().initialise(settings)
        self._append("pg_hba.conf", _TRUST)


def _networks(network: NetworkName | None) -> tuple[NetworkName, ...]:
    """Return the network that was named, or both."""
    if network is None:
        return CLIENTS, REPLICATION
    if network not in (CLIENTS, REPLICATION):
        raise ClusterError(f"there is no network {network!r}: {CLIENTS!r} or {REPLICATION!r}")
    return (network,)
