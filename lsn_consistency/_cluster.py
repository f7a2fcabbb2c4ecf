"""
What is known about the nodes of one cluster together: pure state, no I/O, no clock.

Which node is the primary, its samples, the histories of timelines, and who waits for what. It is
shared by threads, so every change happens under its lock; released waiters are woken after the
lock is given back.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable

from lsn_consistency._nodes import Node
from lsn_consistency._observation import Observation, PrimarySamples, Server
from lsn_consistency._settings import PRIMARY_NAME, Settings
from lsn_consistency._shortlist import Candidate, Shortlist
from lsn_consistency._timelines import Timelines
from lsn_consistency._waiters import PositionQueue, TurnQueue, Waiter
from lsn_consistency.events import Event, NodeFailed, NodeRecovered, RoleChanged
from lsn_consistency.lsn import Lsn, Position, TimelineHistory
from lsn_consistency.route import Role


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
        self.timelines = Timelines()
        self.system_id: int | None = None
        self._system_is_certain = False
        self.timeline = 0
        self.primary: Node | None = self.nodes[PRIMARY_NAME]
        self.conflict: str | None = None
        self.fallback_reads = 0
        self.fallback_turns = TurnQueue()
        # None after each news, until somebody needs it; it is replaced and never changed.
        self.shortlist: Shortlist | None = None

    # Observations

    def record(
        self,
        name: str,
        seen: Observation,
        *,
        sample: bool = False,
        before: Observation | None = None,
    ) -> list[Event]:
        """
        Take an observation of a node, wake whom it releases, and return what changed.

        ``sample`` marks the observations of the node's monitor, which come in order; only they
        become samples of the primary's position. ``before`` is what the monitor observed last over
        the same connection.
        """
        node = self.nodes[name]
        with self.lock:
            if not node.is_news(seen):
                return []
            seen = node.completed(seen)
            events = self._changes(node, seen)
            known = node.newest
            node.take(seen)
            if before is not None:
                self.timelines.watch(node.completed(before), seen)
            timeline = self.timeline
            self._follow(node, known, seen, sample=sample)
            released = node.waiting.release(seen)
            if node is self.primary and not seen.in_recovery:
                if sample:
                    self.samples.add(seen)
                released += self.positions.release_ahead(seen)
            elif seen.in_recovery:
                released += self.positions.release(seen)
            if self.timeline != timeline:
                # What was waited for may be elsewhere now, or lost.
                released += self.positions.release_all()
        for waiter in released:
            waiter.wake()
        return events

    def _follow(
        self, node: Node, known: Observation | None, seen: Observation, *, sample: bool
    ) -> None:
        # Most observations only tell how far a server has come. That elects nobody, and changes at
        # most the node's own place in the shortlist; a sample of the primary, every node's.
        if known is None or not seen.is_of_same_state(known):
            self._elect()
            self.shortlist = None
        elif seen.in_recovery:
            if self.shortlist is not None:
                moment = self.samples.moment_of(seen)
                self.shortlist = self.shortlist.with_observed(node, seen, moment)
        else:
            if node is self.primary:
                self.timelines.lead(seen)
            if sample:
                self.shortlist = None

    def completed(self, name: str, seen: Observation) -> Observation:
        """
        Return an observation with what is known of its server's timeline; see `Node.completed`.
        """
        return self.nodes[name].completed(seen)

    def learn(
        self, name: str, server: Server, timeline: int, history: TimelineHistory | None
    ) -> None:
        """
        Take what a replication connection told: a server's timeline, and a history.
        """
        with self.lock:
            if history is not None:
                self.timelines.learn(server, history)
            self.nodes[name].follows(server, timeline)
            self.shortlist = None

    def wants_history(self, seen: Observation) -> bool:
        """
        Tell whether the history of the timeline that a primary is on should be asked for.
        """
        if seen.in_recovery or seen.timeline is None:
            return False
        return not self.timelines.history(seen.server.system_id, seen.timeline).complete

    def wants_timeline(self, seen: Observation) -> bool:
        """
        Tell whether a standby's timeline should be asked for: it could be on a newer one.
        """
        if not seen.in_recovery or seen.timeline_is_certain:
            return False
        deposed = self.primary is None or self.primary.newest is None
        return deposed or (seen.timeline or 0) < self.timeline

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
            self.shortlist = None
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
        if configured is not None and (configured.server.system_id or not self.system_id):
            # A server that refuses its WAL functions does not tell its system.
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
        self.timelines.lead(elected)

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

    # Choosing

    def listed(self) -> Shortlist:
        """
        Return the replicas that may serve without further questions.
        """
        known = self.shortlist
        if known is None:
            with self.lock:
                known = self.shortlist = Shortlist(
                    self.system_id or 0,
                    self.timeline,
                    self._candidates(),
                    self.settings.max_lag_seconds,
                )
        return known

    def _candidates(self) -> list[Candidate]:
        # Everything here must hold for as long as nothing new is observed.
        primary = None if self.primary is None else self.primary.newest
        if primary is None or primary.in_recovery or self.conflict is not None:
            return []
        if not self.system_id or primary.timeline != self.timeline:
            return []
        found = []
        for node in self.all_nodes:
            seen = node.newest
            if seen is None or not seen.in_recovery or seen.server.system_id != self.system_id:
                continue
            if seen.timeline is None or seen.timeline > self.timeline:
                # What it may serve is a question of its own.
                return []
            if seen.timeline == self.timeline:
                moment = self.samples.moment_of(seen)
                found.append(Candidate(node, seen, moment, self.settings.max_lag_seconds))
        return found

    # Lag

    def lag_seconds(self, seen: Observation, now: float) -> float:
        """
        Return an upper bound on the age of what a replica shows; infinity if unknown.
        """
        return self.samples.lag_seconds(seen, now)

    # Waiting

    def wait_for_position(
        self, required: Position, wake: Callable[[], object], since: float = math.inf
    ) -> Waiter:
        """
        Register a waiter that the first replica to reach ``required`` releases.

        So does the primary if it was observed after ``since``, when the position was known, and
        has not reached it: then nobody will.
        """
        waiter = Waiter(wake, self.positions)
        with self.lock:
            self.positions.add(required, waiter, since)
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
        Tell whether anybody waits for a position that an observation of this node may be about.
        """
        if node is not self.primary:
            return bool(self.positions)
        return node.newest is not None and self.positions.is_unconfirmed(node.newest)

    def least_awaited(self, seen: Observation) -> Lsn | None:
        """
        Return the least position that a read waits for on the timeline of an observation.
        """
        with self.lock:
            return self.positions.least(seen)

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
