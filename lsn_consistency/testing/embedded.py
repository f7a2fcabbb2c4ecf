"""
A server of the embedded cluster: a child process with a data directory of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

from lsn_consistency.testing import _reaper
from lsn_consistency.testing._errors import ClusterError, tail
from lsn_consistency.testing._server import (
    START_SECONDS,
    STOP_SECONDS,
    STOP_SIGNALS,
    WAIT_SECONDS,
    Role,
    StopMode,
)
from lsn_consistency.testing._storage import StoredNode
from lsn_consistency.testing._workspace import Workspace, free_port, wait_until

__all__ = ["EmbeddedNode"]

START_TRIALS = 20
PORT_RETRY_SECONDS = 0.25

_PORT_TAKEN = "Address already in use"


class EmbeddedNode(StoredNode):
    """
    A node of `EmbeddedCluster`: what `Node` says, and the process, the folder and the log file.
    """

    def __init__(self, name: str, role: Role, workspace: Workspace) -> None:
        super().__init__(name, role)
        self.port = free_port()
        self.datadir = workspace.folder / name
        self.log = workspace.folder / f"{name}.log"
        self._workspace = workspace
        self._postmaster: subprocess.Popen[bytes] | None = None
        self._port_is_known = False

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
            raise ClusterError(f"{self.name} is not running", self.log_tail())
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
            if _PORT_TAKEN not in self.log_tail():
                raise ClusterError(f"{self.name} did not start", self.log_tail())
            self._retry_port()
        if not self._says_ready():
            problem = f"{self.name} accepted no connections for {seconds:g} s"
            raise ClusterError(problem, self.log_tail())
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
        """Return whether the postmaster of this run says that it accepts connections."""
        pid, ready = self._lock_file()
        return ready and self._postmaster is not None and pid == self._postmaster.pid

    def stop(self, mode: StopMode = "fast") -> None:
        """
        Stop the server in one of PostgreSQL's three ways; a frozen one is thawed for it.

        A fast stop of a primary waits for its replicas to receive everything: if one is frozen,
        up to wal_sender_timeout (60 s).
        """
        if not self.running:
            return
        self.thaw()
        os.kill(self.pid, STOP_SIGNALS[mode])
        self._wait_gone(f"{mode} stop")

    def _wait_gone(self, what: str) -> None:
        """Wait until the postmaster has ended."""
        if self._postmaster is None:
            return
        try:
            self._postmaster.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            problem = f"{self.name} was still there {STOP_SECONDS:g} s after its {what}"
            raise ClusterError(problem, self.log_tail()) from None
        self.frozen = False

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

    def _signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to one process of the server, which may have ended by itself."""
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    # -- the log --------------------------------------------------------------------------------

    def log_mark(self) -> int:
        """
        Return where the log ends now.
        """
        return self.log.stat().st_size

    def log_since(self, mark: int) -> str:
        """
        Return what was logged since a mark.
        """
        with self.log.open("rb") as file:
            file.seek(mark)
            return file.read().decode("utf-8", "replace")

    def log_tail(self) -> str:
        """
        Return the last lines of the log.
        """
        return tail(self.log)

    # -- files ----------------------------------------------------------------------------------

    @property
    def _data(self) -> str:
        """The data directory, as PostgreSQL's programs are given it."""
        return str(self.datadir)

    def _begin(self, program: str, *arguments: str) -> Callable[[], None]:
        """Start one of PostgreSQL's programs, and return what waits for its success."""
        started = self._workspace.spawn(self.log, program, *arguments)
        return lambda: self._workspace.finish(started, self.log)

    def _read(self, file: str) -> str | None:
        """Return a file of the data directory, None if there is none."""
        try:
            return (self.datadir / file).read_text()
        except OSError:
            return None

    def _write(self, file: str, text: str) -> None:
        """Replace a file of the data directory, which stays that of the server's account."""
        (self.datadir / file).write_text(text)

    def _clear(self) -> None:
        """Remove the data directory."""
        shutil.rmtree(self.datadir, ignore_errors=True)
