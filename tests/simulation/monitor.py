"""
The monitor of one node of one process, by the rules of `lsn_consistency._monitor`.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, Final

from lsn_consistency._monitor import FIRST_PATIENCE_SECONDS, MAX_PATIENCE_SECONDS
from lsn_consistency._nodes import FIRST_RETRY_SECONDS
from lsn_consistency._observation import Observation
from lsn_consistency._sql import Identity
from lsn_consistency._steps import NodeFailure, ask_timeline, identify, observe
from tests.simulation.loop import Signal, Steps
from tests.simulation.network import Connection

if TYPE_CHECKING:
    from tests.simulation.process import Process

WAITING_POLL_SECONDS: Final = 0.02


class Monitor:
    """Probe one node until the world ends."""

    def __init__(self, name: str, process: Process) -> None:
        self.name = name
        self.process = process
        self.core = process.core
        self.node = process.core.cluster.nodes[name]
        self.conn: Connection | None = None
        self.identity: Identity | None = None
        self.seen: Observation | None = None
        self.awake = Signal(process.loop)
        self.probed_at = -inf
        self.patience = FIRST_PATIENCE_SECONDS
        self.leaves_at: float | None = None

    def kick(self) -> None:
        self.awake.set()

    def suspect(self) -> None:
        self.probed_at = -inf
        self.awake.set()

    def run(self) -> Steps:
        while True:
            yield from self._pause()
            self.probed_at = self.core.clock()
            yield from self._probe()

    def _pause(self) -> Steps:
        while (left := self.probed_at + self._interval() - self.core.clock()) > 0:
            self.awake.clear()
            came = yield self.awake, left
            if not came:
                return

    def _interval(self) -> float:
        retry = self.node.retry_seconds(self.core.poll_seconds, self.process.chance.random())
        if self.node.waiting:
            return min(retry, FIRST_RETRY_SECONDS) if self.node.failures else 0.0
        if not self.node.failures and self.core.cluster.awaits_position(self.node):
            return WAITING_POLL_SECONDS
        return retry

    def _probe(self) -> Steps:
        core, process = self.core, self.process
        try:
            if self.conn is None:
                self.conn = yield from process.network.connect(
                    process.name, process.endpoints[self.name], core.settings.connect_timeout
                )
                self.identity = self.seen = None
            seen = yield from self._observe()
        except (NodeFailure, ConnectionError, TimeoutError) as error:
            self._close()
            core.failed(self.name, error)
        else:
            self.seen = core.observed(self.name, seen, sample=True, before=self.seen)
            self._leave_if_lagging(self.seen)
            yield from self._ask_timeline(self.seen)

    def _observe(self) -> Steps:
        if self.identity is None or self.seen is None:
            self.identity, seen = yield from self._run(identify(self.conn))
            return seen
        known = observe(self.conn, self.identity, in_recovery=self.seen.in_recovery)
        return (yield from self._run(known))

    def _run(self, plan: Any) -> Steps:
        return (yield from self.process.run(plan))

    def _leave_if_lagging(self, seen: Observation) -> None:
        now = self.core.clock()
        if not seen.in_recovery or not self.core.lags(seen):
            self.patience, self.leaves_at = FIRST_PATIENCE_SECONDS, None
        elif self.leaves_at is None:
            self.leaves_at = now + self.patience
        elif now >= self.leaves_at:
            self._close()
            self.patience = min(2 * self.patience, MAX_PATIENCE_SECONDS)
            self.leaves_at = now + self.patience

    def _ask_timeline(self, seen: Observation) -> Steps:
        """What `_replication.TimelineSource` does, for a role with the REPLICATION attribute."""
        core, process, cluster = self.core, self.process, self.core.cluster
        wanted = cluster.wants_history(seen) or cluster.wants_timeline(seen)
        if not process.replication or seen.pooled or not wanted:
            return
        try:
            conn = yield from process.network.connect(
                process.name, process.endpoints[self.name], core.settings.connect_timeout
            )
            timeline, history = yield from self._run(ask_timeline(conn, seen.server))
        except (NodeFailure, ConnectionError, TimeoutError):
            return
        process.count("timelines asked for over replication")
        cluster.learn(self.name, seen.server, timeline, history)
        if seen.in_recovery:
            certain = max(timeline, seen.timeline or 0)
            core.observed(self.name, seen._replace(timeline=certain, timeline_is_certain=True))

    def _close(self) -> None:
        if self.conn is not None:
            self.conn.closed = True
        self.conn = None
