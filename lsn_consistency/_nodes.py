"""
What is known about one node: pure state, no I/O, no clock.

A node keeps the newest observation of every server that was seen behind its endpoint (usually
one). A failure forgets them all: an unknown node serves nothing.
"""

from __future__ import annotations

import math
from typing import Final

from lsn_consistency._observation import Observation, Server
from lsn_consistency._waiters import ObservationQueue
from lsn_consistency.route import Role

MAX_SERVERS_PER_NODE: Final = 16
SERVER_MEMORY_SECONDS: Final = 60.0
MANY_READS: Final = 8
"""With so many reads in flight on a node, those that end together share the monitor's probe."""

FIRST_RETRY_SECONDS: Final = 0.05
MAX_RETRY_SECONDS: Final = 5.0


class Node:
    """
    Hold what is known about one configured endpoint.
    """

    __slots__ = (
        "checked_at",
        "failed_at",
        "failures",
        "in_flight",
        "last_error",
        "name",
        "newest",
        "role",
        "servers",
        "threshold",
        "timelines",
        "waiting",
        "weight",
    )

    def __init__(self, name: str, weight: float, threshold: int) -> None:
        self.name = name
        self.weight = weight
        self.threshold = threshold
        self.role: Role | None = None
        self.newest: Observation | None = None
        self.servers: dict[tuple[int, str | None, int | None], Observation] = {}
        self.timelines: dict[Server, int] = {}
        self.failures = 0
        self.failed_at = -math.inf
        self.last_error: str | None = None
        self.checked_at: float | None = None
        self.in_flight = 0
        self.waiting = ObservationQueue()

    @property
    def breaker_open(self) -> bool:
        """
        Tell whether ``failure_threshold`` failures in a row have opened the breaker.
        """
        return self.failures >= self.threshold

    @property
    def hides_servers(self) -> bool:
        """
        Tell whether connections to this endpoint may reach different servers.
        """
        return len(self.servers) > 1

    def observed(self, server: Server) -> Observation | None:
        """
        Return the newest observation of exactly this server, started when it was started.
        """
        seen = self.newest
        if seen is not None and seen.server == server:
            return seen
        seen = self.servers.get(server.place)
        return seen if seen is not None and seen.server == server else None

    def completed(self, seen: Observation) -> Observation:
        """
        Return an observation with the highest timeline that this very server was seen to follow.

        A standby goes on to newer timelines and never back: only a restart, which makes it another
        server, can give it other data. What it said of its timeline before holds when it can say
        less now, as without a walreceiver.
        """
        known = self.timelines.get(seen.server)
        if not seen.in_recovery or known is None or (seen.timeline or 0) >= known:
            return seen
        return seen._replace(timeline=known)

    def follows(self, server: Server, timeline: int) -> None:
        """
        Take that a standby was seen to follow a timeline.
        """
        if self.timelines.get(server, 0) < timeline:
            self.timelines.pop(server, None)
            self.timelines[server] = timeline
            while len(self.timelines) > MAX_SERVERS_PER_NODE:
                del self.timelines[next(iter(self.timelines))]

    def is_news(self, seen: Observation) -> bool:
        """
        Tell whether an observation was sent after the last failure and after what is known.
        """
        known = self.servers.get(seen.server.place)
        return seen.sent_at > self.failed_at and (known is None or seen.sent_at >= known.sent_at)

    def take(self, seen: Observation) -> None:
        """
        Replace what was known of the observed server, upwards or downwards.
        """
        self.servers[seen.server.place] = seen
        if len(self.servers) > 1:
            self._forget_old(seen.sent_at)
        if seen.in_recovery and seen.timeline_is_certain and seen.timeline is not None:
            self.follows(seen.server, seen.timeline)
        self.newest = seen
        self.role = "replica" if seen.in_recovery else "primary"
        self.failures = 0
        self.last_error = None
        self.checked_at = seen.received_at

    def fail(self, error: str, now: float) -> None:
        """
        Make the node unknown until an observation that is sent after ``now``.
        """
        self.newest = None
        self.servers = {}
        self.failures += 1
        self.failed_at = now
        self.last_error = error
        self.checked_at = now

    def retry_seconds(self, poll_interval: float, jitter: float) -> float:
        """
        Return the time to the next probe: the poll interval, or a growing one after failures.

        ``jitter`` is a random number from 0 to 1; it takes up to half off the interval.
        """
        if not self.failures:
            return poll_interval
        doubled = FIRST_RETRY_SECONDS * 2.0 ** min(self.failures - 1, 16)
        return min(doubled, MAX_RETRY_SECONDS) * (1.0 - jitter / 2.0)

    def _forget_old(self, now: float) -> None:
        kept = [
            each
            for each in self.servers.values()
            if now - each.sent_at < SERVER_MEMORY_SECONDS or each is self.newest
        ]
        kept.sort(key=lambda each: each.sent_at)
        self.servers = {each.server.place: each for each in kept[-MAX_SERVERS_PER_NODE:]}
