"""
What is known about the nodes of one cluster: pure state, no I/O, no clock.

Each node keeps the newest observation of every server that was seen behind its endpoint (usually
one). A failure forgets them all: an unknown node serves nothing. `Cluster` adds what spans nodes:
which one is the primary, the primary's samples, and who waits for what. It is shared by threads,
so every change happens under its lock; released waiters are woken after the lock is given back.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

from lsn_consistency._observation import Observation, PrimarySamples, Server
from lsn_consistency._settings import PRIMARY_NAME, Settings
from lsn_consistency._waiters import ObservationQueue, PositionQueue, TurnQueue, Waiter
from lsn_consistency.events import Event, NodeFailed, NodeRecovered, RoleChanged
from lsn_consistency.lsn import Position
from lsn_consistency.route import Role

MAX_SERVERS_PER_NODE: Final = 16
SERVER_MEMORY_SECONDS: Final = 60.0
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
        seen = self.servers.get(server.place)
        return seen if seen is not None and seen.server == server else None

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


class Cluster:
    """
    Hold the nodes, the primary among them, its samples, and those who wait.
    """

    def __init__(self, names: Iterable[str], settings: Settings) -> None:
        self.settings = settings
        self.nodes = {
            name: Node(name, settings.weights.get(name, 1.0), settings.failure_threshold)
            for name in names
        }
        self.all_nodes = tuple(self.nodes.values())
        self.lock = threading.Lock()
        self.samples = PrimarySamples(settings.poll_interval / 4)
        self.positions = PositionQueue()
        self.system_id: int | None = None
        self._system_is_certain = False
        self.timeline = 0
        self.primary: Node | None = self.nodes[PRIMARY_NAME]
        self.conflict: str | None = None
        self.fallback_reads = 0
        self.fallback_turns = TurnQueue()

    # Observations

    def record(self, name: str, seen: Observation, *, sample: bool = False) -> list[Event]:
        """
        Take an observation of a node, wake whom it releases, and return what changed.

        ``sample`` marks the observations of the node's monitor, which come in order; only they
        become samples of the primary's position.
        """
        node = self.nodes[name]
        with self.lock:
            if not node.is_news(seen):
                return []
            events = self._changes(node, seen)
            node.take(seen)
            self._elect()
            if sample and node is self.primary and not seen.in_recovery:
                self.samples.add(seen)
            released = node.waiting.release(seen)
            if seen.in_recovery:
                released += self.positions.release(seen)
        for waiter in released:
            waiter.wake()
        return events

    def fail(self, name: str, error: str, now: float) -> list[Event]:
        """
        Take a failure of a node: it is unknown until it is observed again.
        """
        node = self.nodes[name]
        with self.lock:
            node.fail(error, now)
            if node is self.primary:
                self.samples.interrupt()
            self._elect()
            released = node.waiting.release_all()
        for waiter in released:
            waiter.wake()
        return [NodeFailed(name, error, node.failures)]

    def _changes(self, node: Node, seen: Observation) -> list[Event]:
        events: list[Event] = []
        if node.failures:
            events.append(NodeRecovered(node.name))
        role: Role = "replica" if seen.in_recovery else "primary"
        if role != node.role:
            events.append(RoleChanged(node.name, node.role, role))
        return events

    def is_primary(self, seen: Observation) -> bool:
        """
        Tell whether a server observed so may serve as the primary.

        A former primary that still runs is on a lower timeline than the highest that was elected.
        """
        return (
            not seen.in_recovery
            and self.system_id in (None, seen.server.system_id)
            and (seen.timeline or 0) >= self.timeline
        )

    def _elect(self) -> None:
        configured = self.nodes[PRIMARY_NAME].newest
        if configured is not None:
            self._system_is_certain = True
            self._belong_to(configured.server.system_id)
        elif not self._system_is_certain and (conflict := self._two_systems()):
            self._belong_to(None)
            self.conflict, self.primary = conflict, None
            return
        candidates = [
            (node, node.newest)
            for node in self.all_nodes
            if node.newest is not None and self.is_primary(node.newest)
        ]
        self.conflict = None
        if not candidates:
            # The last primary stays the one to try while it is unreachable, not while it says
            # that it is none.
            if self.primary is not None and self.primary.newest is not None:
                self.primary = None
            return
        highest = max(seen.timeline or 0 for _, seen in candidates)
        leaders = [(node, seen) for node, seen in candidates if (seen.timeline or 0) == highest]
        # One server may be listed twice, under different addresses.
        servers = {(seen.server.system_id, seen.server.started) for _, seen in leaders}
        if len(servers) > 1:
            names = " and ".join(node.name for node, _ in leaders)
            self.conflict = f"{names} both say that they are the primary of timeline {highest}"
            self.primary = None
            return
        self.primary, elected = leaders[0]
        self._belong_to(elected.server.system_id)
        self.timeline = highest

    def _two_systems(self) -> str | None:
        # Until the configured primary was seen once, only the agreement of all that answer can tell
        # which system is ours.
        known = {
            node.name: node.newest.server.system_id
            for node in self.all_nodes
            if node.newest is not None
        }
        if len(set(known.values())) < 2:
            return None
        return (
            f"{' and '.join(known)} are of different systems, and the configured primary, which "
            "would tell which one is ours, was not seen yet"
        )

    def _belong_to(self, system_id: int | None) -> None:
        if system_id != self.system_id:
            self.system_id = system_id
            self.timeline = 0

    # Lag

    def lag_seconds(self, seen: Observation, now: float) -> float:
        """
        Return an upper bound on the age of what a replica shows; infinity if unknown.
        """
        return self.samples.lag_seconds(seen, now)

    def reported_lag(self, node: Node, now: float) -> tuple[float | None, str]:
        """
        Return a node's lag for people, and where it comes from.

        ``"samples"`` is the measured bound that decisions use. With the primary out of reach it is
        the standby's own ``now() - pg_last_xact_replay_timestamp()`` and the age of that statement:
        ``"replay_timestamp"``, which grows on an idle cluster and is used for nothing else.
        """
        seen = node.newest
        if seen is None:
            return None, "unknown"
        if not seen.in_recovery:
            return 0.0, "primary"
        if self.primary is None or self.primary.newest is None:
            if seen.replay_age_seconds is None:
                return None, "unknown"
            return seen.replay_age_seconds + now - seen.received_at, "replay_timestamp"
        lag = self.samples.lag_seconds(seen, now)
        return (None, "unknown") if math.isinf(lag) else (lag, "samples")

    # Waiting

    def wait_for_position(self, required: Position, wake: Callable[[], object]) -> Waiter:
        """
        Register a waiter that the first replica to reach ``required`` releases.
        """
        waiter = Waiter(wake, self.positions)
        with self.lock:
            self.positions.add(required, waiter)
        return waiter

    def wait_for_observation(self, name: str, after: float, wake: Callable[[], object]) -> Waiter:
        """
        Register a waiter that an observation of ``name`` sent at ``after`` or later releases.
        """
        queue = self.nodes[name].waiting
        waiter = Waiter(wake, queue)
        with self.lock:
            queue.add(after, waiter)
        return waiter

    def give_up(self, waiter: Waiter) -> None:
        """
        Forget a waiter wherever it waits.
        """
        with self.lock:
            waiter.queue.discard(waiter)

    def awaits_position(self, node: Node) -> bool:
        """
        Tell whether anybody waits for a position that this node may be the first to reach.
        """
        return bool(self.positions) and node is not self.primary

    # Reads in flight

    def enter(self, node: Node, *, fallback: bool) -> bool:
        """
        Count a read on ``node``; False if the primary's limit for fallback reads is reached.
        """
        limit = self.settings.max_fallback_reads
        with self.lock:
            if fallback:
                if limit is not None and self.fallback_reads >= limit:
                    return False
                self.fallback_reads += 1
            node.in_flight += 1
        return True

    def leave(self, node: Node, *, fallback: bool) -> None:
        """
        End the count of a read, and wake one that waits for its place.
        """
        waiter: Waiter | None = None
        with self.lock:
            node.in_flight -= 1
            if fallback:
                self.fallback_reads -= 1
                waiter = self.fallback_turns.release_first()
        if waiter is not None:
            waiter.wake()

    def wait_for_fallback(self, wake: Callable[[], object]) -> Waiter:
        """
        Register a waiter for a place among the fallback reads.
        """
        waiter = Waiter(wake, self.fallback_turns)
        limit = self.settings.max_fallback_reads
        with self.lock:
            free = limit is None or self.fallback_reads < limit
            if not free:
                self.fallback_turns.add(waiter)
        if free:
            # A place was given up after the read had found none.
            wake()
        return waiter

    # For people

    def snapshot(self, now: float, unix_now: float) -> dict[str, dict[str, Any]]:
        """
        Describe every node; see `Router.snapshot`.
        """
        with self.lock:
            return {node.name: self._describe(node, now, unix_now) for node in self.all_nodes}

    def _describe(self, node: Node, now: float, unix_now: float) -> dict[str, Any]:
        seen = node.newest
        lag, source = self.reported_lag(node, now)
        return {
            "role": node.role,
            "healthy": seen is not None,
            "lag_seconds": lag,
            "lag_source": source,
            "replay_lsn": None if seen is None else seen.lsn,
            "timeline": None if seen is None else seen.timeline,
            "system_id": None if seen is None else seen.server.system_id,
            "checked_at": None if node.checked_at is None else unix_now - (now - node.checked_at),
            "breaker": "open" if node.breaker_open else "closed",
            "consecutive_failures": node.failures,
            "last_error": node.last_error,
            "reads_in_flight": node.in_flight,
            "servers": len(node.servers),
            "pooled": seen is not None and seen.pooled,
        }
