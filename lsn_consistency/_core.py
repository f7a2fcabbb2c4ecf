"""
What the blocking and the async router have in common, without I/O.

A core holds the cluster's state, what is known of each connection, and the clocks; the plans work
on it. Nothing here waits, connects or logs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from random import random as draw
from typing import Any, Final

from lsn_consistency import _decision
from lsn_consistency._cluster import Cluster
from lsn_consistency._decision import decide_at_once
from lsn_consistency._observation import Observation
from lsn_consistency._settings import Settings
from lsn_consistency._snapshot import reported_lag
from lsn_consistency._sql import Identity
from lsn_consistency._steps import Prepared
from lsn_consistency._verdicts import Choice, Read, Serve, Verdict
from lsn_consistency.consistency import Consistency, effective, innermost
from lsn_consistency.events import Event, LagExceeded, NodeRecovered, ReadRouted
from lsn_consistency.route import Route
from lsn_consistency.session import Session
from lsn_consistency.tokens import Token

OVERDUE_SECONDS: Final = 0.25
"""A probe is overdue, and its server suspect, when it takes this much longer than its turn."""

POOL_TIMEOUT_SECONDS: Final = 30.0
"""What psycopg_pool has as the default of ``timeout``."""

WARNING_INTERVAL_SECONDS: Final = 10.0
RECYCLE_INTERVAL_SECONDS: Final = 0.1


@dataclass(slots=True)
class Facts:
    """
    Hold what is known about one pooled connection for as long as it lives.

    ``opened_at`` is at or after the moment in which connecting had returned: an observation of
    the same server sent since then counts for this connection. ``answered_at`` is when it last
    answered a statement of ours. ``read_only`` tells that the
    session was made read-only by a statement; ``changed``, that the connection's attribute was set
    for a read, and is ``own_read_only`` by itself; ``prepared``, which statements of ours it keeps.
    """

    node: str
    identity: Identity
    opened_at: float
    pooled: bool
    in_recovery: bool
    answered_at: float
    read_only: bool = False
    own_read_only: bool | None = None
    changed: bool = False
    prepared: Prepared = field(default_factory=dict)


class Core:
    """
    Hold the state of one router in one process.
    """

    def __init__(
        self,
        names: Iterable[str],
        settings: Settings,
        *,
        given: Iterable[str] = (),
        pool_timeouts: Mapping[str, float] | None = None,
        clock: Callable[[], float],
        unix_clock: Callable[[], float],
        emit: Callable[[Event], None],
        kick: Callable[[str], None],
        warn: Callable[[str], None],
        random: Callable[[], float] = draw,
        listens: bool = True,
    ) -> None:
        self.settings = settings
        self._level = settings.consistency
        self.poll_seconds = min(settings.poll_interval, settings.max_lag_seconds / 4)
        """The time between probes of an idle node: a bound needs samples well below it."""
        self._overdue_seconds = self.poll_seconds + OVERDUE_SECONDS
        self._given = frozenset(given)
        self._pool_timeouts = pool_timeouts or {}
        self.cluster = Cluster(names, settings)
        self.clock = clock
        self.unix_clock = unix_clock
        self.emit = emit
        self.listens = listens
        self.kick = kick
        self._warn = warn
        self._random = random
        self._warned_at = float("-inf")
        self._warned_timelines: set[int] = set()
        self._recycled_at = float("-inf")
        self._facts: weakref.WeakKeyDictionary[Any, Facts] = weakref.WeakKeyDictionary()

    # What the monitors and connections report

    def observed(
        self,
        name: str,
        seen: Observation,
        *,
        sample: bool = False,
        before: Observation | None = None,
    ) -> Observation:
        """
        Take an observation of a node, tell the hook what changed, and return it completed.

        See `Cluster.record` for ``sample`` and ``before``.
        """
        for event in self.cluster.record(name, seen, sample=sample, before=before):
            self.emit(event)
            if isinstance(event, NodeRecovered):
                # Its monitor may be in a back-off.
                self.kick(name)
        return self.cluster.completed(name, seen)

    def failed(self, name: str, error: BaseException) -> None:
        """
        Take a failure of a node and tell the hook.
        """
        text = str(error).strip() or type(error).__name__
        for event in self.cluster.fail(name, text, self.clock()):
            self.emit(event)

    def lost(self, name: str) -> None:
        """
        Take the loss of a connection in use, unless its node's failure is known already.
        """
        if self.cluster.nodes[name].newest is not None:
            self.failed(name, ConnectionError("a connection in use was lost"))
        self.kick(name)

    # Connections

    def is_given(self, name: str) -> bool:
        """
        Tell whether the node's pool is the user's own rather than made by the router.
        """
        return name in self._given

    def pool_timeout(self, name: str) -> float:
        """
        Return for how many seconds a pool lets its clients wait for a connection.
        """
        return self._pool_timeouts.get(name, POOL_TIMEOUT_SECONDS)

    def facts_of(self, conn: object) -> Facts | None:
        """
        Return what is known about a connection; None at its first sight.
        """
        return self._facts.get(conn)

    def met(self, name: str, conn: object, identity: Identity, seen: Observation) -> Facts:
        """
        Remember a connection by the first observation made on it.
        """
        facts = Facts(name, identity, seen.sent_at, seen.pooled, seen.in_recovery, seen.received_at)
        self._facts[conn] = facts
        self.observed(name, seen)
        return facts

    def usable(self, facts: Facts, now: float) -> Observation | None:
        """
        Return an observation that counts for a connection without asking it, or None.

        It is of the same server, made after the connection was opened, and so recent that the
        next probe is not overdue; and the connection has answered since its node last failed.
        """
        if facts.pooled:
            return None
        node = self.cluster.nodes[facts.node]
        seen = node.observed(facts.identity.server)
        if seen is None or seen.sent_at < facts.opened_at:
            return None
        if facts.answered_at <= node.failed_at:
            # Its node is well again, which says nothing of a connection from before the failure.
            return None
        fresh = now - seen.received_at <= self._overdue_seconds
        return seen if fresh else None

    def may_recycle(self, seen: Observation) -> bool:
        """
        Tell whether a connection to a server that cannot serve may be closed for a new one now.

        Behind an endpoint that hides several servers the new one may reach a better one. A server
        that is merely some milliseconds behind keeps its connections.
        """
        now = self.clock()
        if not self.lags(seen) or now - self._recycled_at < RECYCLE_INTERVAL_SECONDS:
            return False
        self._recycled_at = now
        return True

    def lags(self, seen: Observation) -> bool:
        """
        Tell whether a server is behind by more than what a moment's lag could be.
        """
        return self.cluster.lag_seconds(seen, self.clock()) > self.settings.max_lag_seconds / 2

    # Decisions

    def new_read(
        self,
        session: Session,
        token: Token | None,
        consistency: Consistency | None,
        wait_seconds: float | None = None,
    ) -> Read:
        """
        Say what one read asks for: its own token, else the session's.
        """
        level = effective(consistency, self.settings.consistency)
        session.accessed, session.choice = True, None
        return Read(
            level=level,
            token=session.token if token is None else token,
            lag_limit=level.lag_limit(self.settings.max_lag_seconds),
            wait_seconds=self.settings.wait_seconds if wait_seconds is None else wait_seconds,
            preferred=session.node,
            # The clock is read after the token.
            began=self.clock(),
        )

    def choose_at_once(
        self, session: Session, token: Token | None, consistency: Consistency | None
    ) -> Choice | None:
        """
        Return the choice of a read that nothing has to be asked or tried for; None for any other.
        """
        # Calls are what such a choice costs: what `effective` and `Session.token` do is done here.
        if consistency is None:
            block = innermost.get()
            consistency = self._level if block is None else block.level
        if token is None:
            token = session._token
        shortlist = self.cluster.shortlist
        if shortlist is None:
            shortlist = self.cluster.listed()
        now = self.clock()
        made: Choice | None = session.choice
        if (
            made is not None
            and made.shortlist is shortlist
            and made.level is consistency
            and made.token is token
            and now <= made.until
        ):
            # Nothing new is known since the last choice, and nothing else is asked for.
            return made
        found = decide_at_once(shortlist, consistency, token, session.node, now, self._random)
        if found is None:
            return None
        candidate, required = found
        until, caught_up, within_lag = candidate.routes
        if now > until:
            until, caught_up, within_lag = candidate.renewed(now)
        route = within_lag if required is None else caught_up
        session.accessed = True
        made = Choice(shortlist, consistency, token, until, route, candidate, required)
        session.choice = made
        return made

    def note(self, session: Session, route: Route) -> None:
        """
        Remember in the session where a read goes, and tell the hook, if there is one.

        Without one it is needless after a read that went the same way, which a session remembers.
        """
        session.last_route = route
        if route.role == "replica":
            session.node = route.name
        if self.listens:
            self.emit(ReadRouted(route))

    def decide(self, read: Read) -> Verdict:
        """
        Ask the decision with this moment's clocks.
        """
        return _decision.decide(self.cluster, read, self.clock(), self.unix_clock(), self._random)

    def decide_stale(self, read: Read, serve: Serve) -> Serve | None:
        """
        Ask for the replica that serves a read which may be stale.
        """
        return _decision.decide_stale(self.cluster, read, serve.reason, self.clock(), self._random)

    def admits(self, read: Read, serve: Serve, seen: Observation) -> bool:
        """
        Tell whether a connection whose server was observed so may serve the read.
        """
        return _decision.admits(self.cluster, read, serve, seen, self.clock())

    def warn_history_unknown(self) -> None:
        """
        Report, once for each timeline, that tokens of older ones cannot be proven to be on it.
        """
        timeline = self.cluster.timeline
        if timeline in self._warned_timelines:
            return
        self._warned_timelines.add(timeline)
        self._warn(
            f"the history of timeline {timeline} is not known: each token of an older timeline "
            "reads from the primary once, and a lost write is not noticed. A role with the "
            "REPLICATION attribute ends that"
        )

    def warn_lag_exceeded(self, read: Read) -> None:
        """
        Report that every replica lags, at most once in ten seconds.
        """
        now = self.clock()
        if now - self._warned_at < WARNING_INTERVAL_SECONDS:
            return
        self._warned_at = now
        lags = {
            node.name: reported_lag(self.cluster, node, now)[0]
            for node in self.cluster.all_nodes
            if node.newest is not None and node.newest.in_recovery
        }
        shown = ", ".join(
            f"{name} {'unknown' if lag is None else f'{lag:.1f} s'}" for name, lag in lags.items()
        )
        self._warn(
            f"every healthy replica lags for more than {read.lag_limit:g} s ({shown}): "
            "the primary serves the reads"
        )
        self.emit(LagExceeded(read.lag_limit, lags))
