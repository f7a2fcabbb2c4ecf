"""
A server of a cluster in its place in the replication: primary or replica, and it can change.
"""

from __future__ import annotations

import re
import signal
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import TypeAlias

from lsn_consistency.lsn import Lsn
from lsn_consistency.testing._errors import ClusterError
from lsn_consistency.testing._server import START_SECONDS, WAIT_SECONDS, Role, Server, StopMode
from lsn_consistency.testing._workspace import POLL_SECONDS

__all__ = ["Node", "Replica", "Role", "StopMode"]

REJOIN_SECONDS = 10.0
"""How long a replica may take to stream again before it is thrown away and copied anew."""

REFUSALS = 2
"""PostgreSQL tries again and again; the first refusal may be a last one of the former source."""

_PAUSE_STATE = "SELECT pg_get_wal_replay_pause_state()"
_RECEIVER = "SELECT pid, status FROM pg_stat_wal_receiver WHERE pid IS NOT NULL"
_STREAM = """
    SELECT sender_host, sender_port, received_tli
    FROM pg_stat_wal_receiver WHERE status = 'streaming'
"""
_TIMELINE = "SELECT ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int"
_FAULTS = """
    SELECT pg_get_wal_replay_pause_state() <> 'not paused',
           current_setting('recovery_min_apply_delay') <> '0'
"""

# What PostgreSQL 14 to 19 log when a standby has log that its source never had.
_REFUSED = re.compile(
    r"forked off current database system timeline \d+ before current recovery point"
    r"|is not in this server's history"
    r"|highest timeline \d+ of the primary is behind recovery timeline"
)


class Node(Server):
    """
    One server of a cluster, with every fault of the kit.

    `role` is "primary" or "replica" and changes with `promote()` and `rewind()`; `source` is the
    node that a replica streams from, None for a primary. All methods block until what they
    promise is the case, or raise `ClusterError` after a limit.
    """

    def __init__(self, name: str, role: Role) -> None:
        super().__init__(name, role)
        self.source: Node | None = None
        self._last_source: Node | None = None
        self._delay_seconds = 0.0

    # -- replay ---------------------------------------------------------------------------------

    def pause_replay(self) -> None:
        """
        Stop applying what is received, and return when nothing more is applied.

        Lasts until `resume_replay()` or the end of the server. If an apply delay is running, the
        pause begins after it.
        """
        self.execute("SELECT pg_wal_replay_pause()")
        self._wait_replay(lambda: self.value(_PAUSE_STATE) == "paused", "pause replay")

    def resume_replay(self) -> None:
        """
        Go on applying.
        """
        self.execute("SELECT pg_wal_replay_resume()")
        self._wait_replay(lambda: self.value(_PAUSE_STATE) == "not paused", "resume replay")

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
        Cut the replica off from its source, and return when its walreceiver is gone.

        It goes on serving reads and applies what it has received.
        """
        self.configure("primary_conninfo", "")
        self._end_receiver()

    def start_replication(self) -> None:
        """
        Follow the source again, and return when the replica is streaming; see `follow()`.
        """
        if self._last_source is None:
            raise ClusterError(f"{self.name} has no source: follow() one")
        self.follow(self._last_source)

    def follow(self, source: Node) -> None:
        """
        Stream from another node from now on, and return when the replica does.

        The source may be a primary, also of a newer timeline as after `promote()`, or another
        replica. Raises `ClusterError` at once if PostgreSQL refuses because this node has log
        that the source never had: `rewind()` it then. While replay is paused PostgreSQL starts no
        walreceiver: then this returns at once, and streaming begins after `resume_replay()`.
        """
        if self.role != "replica":
            raise ClusterError(f"{self.name} is a primary: rewind() it to make a replica of it")
        if source is self:
            raise ClusterError(f"{self.name} cannot follow itself")
        self.configure("primary_conninfo", self._conninfo_of(source))
        self.source = self._last_source = source
        if self.paused:
            self._end_receiver()
        else:
            self._wait_following(source, WAIT_SECONDS + self._delay_seconds)

    def wait_streaming(self) -> None:
        """
        Wait until the walreceiver is connected and streaming.
        """
        self._wait_replay(lambda: self.receiver_state() == "streaming", "stream from its source")

    def receiver_state(self) -> str:
        """
        Return what the walreceiver does: "streaming", another state of it, or "stopped".
        """
        rows = self.execute(_RECEIVER)
        return str(rows[0][1]) if rows else "stopped"

    def timeline(self) -> int:
        """
        Return the timeline that a primary writes and a replica receives; 0 if it receives nothing.
        """
        if self.role == "primary":
            return int(self.value(_TIMELINE))
        rows = self.execute(_STREAM)
        return int(rows[0][2]) if rows else 0

    def describe(self) -> str:
        """
        Return in a few words what may keep this replica from catching up.
        """
        delay = self.value("SHOW recovery_min_apply_delay")
        return f"walreceiver {self.receiver_state()}, apply delay {delay}"

    def _conninfo_of(self, source: Node) -> str:
        """Return how the walreceiver connects; its application name is this node's name."""
        host, port = source.peer_address
        return f"host={host} port={port} user=postgres sslmode=disable"

    def _end_receiver(self) -> None:
        """End the walreceiver, which PostgreSQL leaves running while replay is paused."""

        def gone() -> bool:
            rows = self.execute(_RECEIVER)
            for pid, _ in rows:
                self._signal(pid, signal.SIGTERM)
            return not rows

        self._wait_replay(gone, "end its walreceiver")

    def _streams_from(self, source: Node) -> bool:
        """Return whether this replica receives the timeline that the source is on now."""
        # A standby that has gone another way also streams for a moment: the log before the fork.
        stream = [(*source.peer_address, source.timeline())]
        return stream == self.execute(_STREAM)

    def _wait_following(self, source: Node, seconds: float) -> None:
        """Wait until the replica streams, or PostgreSQL says that it never will."""
        mark = self.log_mark()
        deadline = time.monotonic() + seconds
        while not self._streams_from(source):
            # A source that is a standby itself may only have to learn of the timeline.
            if source.role == "primary" and len(_REFUSED.findall(self.log_since(mark))) >= REFUSALS:
                problem = f"{self.name} has log that {source.name} never had: rewind() it"
                raise ClusterError(problem, self.log_tail())
            if time.monotonic() > deadline:
                problem = f"{self.name} did not stream from {source.name} within {seconds:g} s"
                raise ClusterError(problem, self.log_tail())
            time.sleep(POLL_SECONDS)

    # -- changing roles -------------------------------------------------------------------------

    def promote(self) -> None:
        """
        End recovery and become a primary of a new timeline; returns when it accepts writes.

        Nobody follows by itself: see `follow()` and `rewind()`, or `EmbeddedCluster.failover()`
        for all of it.
        """
        if self.role == "primary":
            return
        self.execute("SELECT pg_promote(wait => false)")
        self._wait(
            lambda: self.value("SELECT pg_is_in_recovery()") is False, "promote", START_SECONDS
        )
        self.role = "primary"
        self.source = None

    @abstractmethod
    def rewind(self, source: Node) -> None:
        """
        Make a replica of `source` out of a node that has gone another way, and start it.

        This is `pg_rewind`: what the node has written since their histories parted is undone.
        Mostly the node is the old primary after a promotion, running, stopped or crashed; if it
        runs it is stopped first, a primary without waiting for anybody. Returns when it streams;
        its settings stay and its apply delay ends. Raises `ClusterError` with the words of
        pg_rewind if that cannot be done: `rebuild()` always can.
        """

    @abstractmethod
    def rebuild(self, source: Node | None = None) -> None:
        """
        Throw the data away and make a new copy of `source`, by default the last one followed.

        Returns when it streams; its settings stay and its apply delay ends.
        """

    # -- healing --------------------------------------------------------------------------------

    def heal(self, source: Node | None = None) -> None:
        """
        Undo every fault: the node runs, and a replica streams and applies without delay.

        `source` makes it a replica of that node; without one a replica goes back to the node that
        it followed last. A node that was promoted, or that cannot follow, is copied anew.
        """
        self.thaw()
        self.start()
        upstream = source or self._last_source
        if upstream is None:
            return
        if self.role == "primary" or not self.value("SELECT pg_is_in_recovery()"):
            self.rebuild(upstream)
            return
        paused, delayed = self.execute(_FAULTS)[0]
        if delayed:
            self.apply_delay(0)
        wanted = self._conninfo_of(upstream)
        if self.source is not upstream or self.value("SHOW primary_conninfo") != wanted:
            self.configure("primary_conninfo", wanted)
            self.source = self._last_source = upstream
        if paused:
            self.resume_replay()
        try:
            self._wait_following(upstream, REJOIN_SECONDS)
        except ClusterError:
            # The log that it needs is gone, or it has gone another way: nothing else helps.
            self.rebuild(upstream)

    def _became_replica(self, source: Node) -> None:
        """Note that the server is a fresh standby of the source."""
        self.role = "replica"
        self.source = self._last_source = source
        self._delay_seconds = 0.0

    def _wait_replay(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition; an apply delay may have to pass before it can hold."""
        self._wait(condition, what, WAIT_SECONDS + self._delay_seconds)


Replica: TypeAlias = Node
"""The name for a node where a test is about its being a replica."""
