"""
A streaming replica: a server whose replay can be paused, delayed, cut off, promoted.
"""

from __future__ import annotations

import os
import shutil
import signal
from typing import Any

from lsn_consistency.lsn import Lsn
from lsn_consistency.testing._errors import ClusterError, tail
from lsn_consistency.testing._workspace import LOOPBACK, Workspace, wait_until
from lsn_consistency.testing.node import START_SECONDS, WAIT_SECONDS, Node

__all__ = ["Replica"]

REJOIN_SECONDS = 10.0
"""How long a replica may take to stream again before it is thrown away and copied anew."""

_PAUSE_STATE = "SELECT pg_get_wal_replay_pause_state()"
_RECEIVER = "SELECT pid, status FROM pg_stat_wal_receiver WHERE pid IS NOT NULL"
_FAULTS = """
    SELECT pg_get_wal_replay_pause_state() <> 'not paused',
           current_setting('recovery_min_apply_delay') <> '0',
           current_setting('primary_conninfo') = ''
"""


class Replica(Node):
    """
    A standby of the cluster's primary, and the faults that only a standby can have.

    After `promote()` its role is "primary" and it follows nobody; `EmbeddedCluster.heal()` makes
    a replica of it again.
    """

    def __init__(self, name: str, workspace: Workspace, primary: Node) -> None:
        super().__init__(name, "replica", workspace)
        self._primary = primary
        self._delay_seconds = 0.0

    # -- replay ---------------------------------------------------------------------------------

    def pause_replay(self) -> None:
        """
        Stop applying what is received, and return when nothing more is applied.

        Lasts until `resume_replay()` or the end of the server. If an apply delay is running, the
        pause begins after it.
        """
        self.execute("SELECT pg_wal_replay_pause()")
        self._wait(lambda: self.value(_PAUSE_STATE) == "paused", "pause replay")

    def resume_replay(self) -> None:
        """
        Go on applying.
        """
        self.execute("SELECT pg_wal_replay_resume()")
        self._wait(lambda: self.value(_PAUSE_STATE) == "not paused", "resume replay")

    @property
    def paused(self) -> bool:
        """
        True while replay is paused; asked of the server.
        """
        return bool(self.value(_PAUSE_STATE) != "not paused")

    def apply_delay(self, seconds: float) -> None:
        """
        Apply each commit only that many seconds after it was made; 0 ends the delay.

        It is `recovery_min_apply_delay`, in whole milliseconds, and holds over a restart. Returns
        when it is in force for all that is applied from then on.
        """
        self.configure("recovery_min_apply_delay", f"{round(seconds * 1000)}ms")
        self._delay_seconds = seconds

    def replay_lsn(self) -> Lsn:
        """
        Return the position up to which this replica has applied the log.
        """
        text = self.value("SELECT pg_last_wal_replay_lsn()::text")
        if text is None:
            raise ClusterError(f"{self.name} has replayed nothing: it is no replica any more")
        return Lsn.parse(text)

    # -- replication ----------------------------------------------------------------------------

    def stop_replication(self) -> None:
        """
        Cut the replica off from the primary, and return when its walreceiver is gone.

        It goes on serving reads and applies what it has received.
        """
        self.configure("primary_conninfo", "")

        def gone() -> bool:
            # While replay is paused PostgreSQL leaves the walreceiver running; end it ourselves.
            rows = self.execute(_RECEIVER)
            for pid, _ in rows:
                _terminate(pid)
            return not rows

        self._wait(gone, "stop replication")

    def start_replication(self) -> None:
        """
        Follow the primary again, and return when the replica is streaming.

        While replay is paused PostgreSQL starts no walreceiver: then this returns at once, and
        streaming begins after `resume_replay()`.
        """
        self.configure("primary_conninfo", self._primary_conninfo())
        if not self.paused:
            self.wait_streaming()

    def wait_streaming(self) -> None:
        """
        Wait until the walreceiver is connected and streaming.
        """
        self._wait(lambda: self.receiver_state() == "streaming", "stream from the primary")

    def receiver_state(self) -> str:
        """
        Return what the walreceiver does: "streaming", another state of it, or "stopped".
        """
        rows = self.execute(_RECEIVER)
        return str(rows[0][1]) if rows else "stopped"

    def describe(self) -> str:
        """
        Return in a few words what may keep this replica from catching up.
        """
        delay = self.value("SHOW recovery_min_apply_delay")
        return f"walreceiver {self.receiver_state()}, apply delay {delay}"

    def _primary_conninfo(self) -> str:
        """Return how the walreceiver connects; its application name is the node's name."""
        return f"host={LOOPBACK} port={self._primary.port} user=postgres sslmode=disable"

    def promote(self) -> None:
        """
        End recovery and become a primary of a new timeline; returns when it accepts writes.
        """
        self.execute("SELECT pg_promote(wait => false)")
        seconds = START_SECONDS
        if not wait_until(lambda: self.value("SELECT pg_is_in_recovery()") is False, seconds):
            raise ClusterError(f"{self.name} was not promoted in {seconds:g} s", tail(self.log))
        self.role = "primary"

    # -- life -----------------------------------------------------------------------------------

    def begin_clone(self) -> Any:
        """
        Start copying the primary into an empty data directory; `start()` after it has ended.
        """
        self.role = "replica"
        self._delay_seconds = 0.0
        shutil.rmtree(self.datadir, ignore_errors=True)
        return self._workspace.spawn(
            self.log,
            "pg_basebackup",
            *("--pgdata", str(self.datadir)),
            *("--dbname", self._primary_conninfo()),
            *("--wal-method=stream", "--checkpoint=fast", "--write-recovery-conf"),
            *("--no-sync", "--no-manifest", "--no-password"),
        )

    def rebuild(self) -> None:
        """
        Throw the data away and make a new copy of the primary.
        """
        self.stop("immediate")
        self._workspace.finish(self.begin_clone(), self.log)
        self.start()
        self.wait_streaming()

    def heal(self) -> None:
        """
        Undo every fault: the replica runs, streams and applies without delay when this returns.

        One that was promoted, or that cannot follow the primary any more, is copied anew.
        """
        self.thaw()
        self.start()
        if not self.value("SELECT pg_is_in_recovery()"):
            self.rebuild()
            return
        paused, delayed, cut_off = self.execute(_FAULTS)[0]
        if delayed:
            self.apply_delay(0)
        if cut_off:
            self.configure("primary_conninfo", self._primary_conninfo())
        if paused:
            self.resume_replay()
        if not wait_until(lambda: self.receiver_state() == "streaming", REJOIN_SECONDS):
            # The log that it needs is gone, or it has gone another way: nothing else helps.
            self.rebuild()

    def _wait(self, condition: Any, what: str) -> None:
        """Wait for a condition; an apply delay may have to pass before it can hold."""
        seconds = WAIT_SECONDS + self._delay_seconds
        if not wait_until(condition, seconds):
            problem = f"{self.name} did not {what} within {seconds:g} s"
            raise ClusterError(problem, tail(self.log))


def _terminate(pid: int) -> None:
    """End a process of the server, which may have ended by itself."""
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
