"""
The steps of a read and of a choice, without the input and output.

The blocking and the async router carry out the same plans, so both route alike by construction. A
plan that is thrown a cancellation gives back what it holds, by yielding once more, before it lets
go.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from lsn_consistency._connections import (
    READY_SECONDS,
    begin,
    checkout_of_primary,
    hand_back,
    look,
    look_again,
    make_read_only,
    meet,
    ready,
    ready_at_once,
    refuse,
    report,
)
from lsn_consistency._core import Core, Facts
from lsn_consistency._endings import (
    advances,
    close_read,
    commit_and_look,
    look_and_commit,
    shares_probe,
)
from lsn_consistency._leases import NO_POSITIONS, Lease
from lsn_consistency._observation import Observation
from lsn_consistency._positions import advance_past_primary
from lsn_consistency._steps import (
    AwaitPosition,
    AwaitTurn,
    Checkout,
    NodeFailure,
    Plan,
)
from lsn_consistency._verdicts import Choice, Fail, Lost, Read, Refresh, Serve, Verdict
from lsn_consistency.consistency import Consistency
from lsn_consistency.events import FallbackLimited, LostWrite, ReadRouted
from lsn_consistency.exceptions import (
    ConfigurationError,
    FallbackLimitError,
    LostWriteError,
    NoNodeAvailableError,
)
from lsn_consistency.route import Reason, Route
from lsn_consistency.session import Session
from lsn_consistency.tokens import Token

MAX_ATTEMPTS: Final = 16
CONNECTIONS_TRIED: Final = 3
MAX_REFUSALS: Final = 4
RETRY_AFTER_SECONDS: Final = 1.0
_FALLBACKS: Final = frozenset(
    {Reason.NOT_CAUGHT_UP, Reason.LAG_EXCEEDED, Reason.NO_REPLICA, Reason.TIMELINE_CHANGED}
)


class Reading(NamedTuple):
    """
    Be what a block of ``read()`` is for.
    """

    token: Token | None
    consistency: Consistency | None
    node: str | None

    def open(self, core: Core, session: Session) -> Plan[Lease]:
        """
        Take a connection that may serve the read.
        """
        if self.node is not None:
            forced = core.new_read(session, self.token, self.consistency)
            return open_forced(core, session, forced, self.node)
        choice = core.choose_at_once(session, self.token, self.consistency)
        if choice is not None:
            return open_chosen(core, session, choice)
        return open_read(core, session, core.new_read(session, self.token, self.consistency))

    def commit(self, core: Core, lease: Lease) -> Plan[None] | None:
        """
        Observe the server of a read that the session advances past.
        """
        if lease.transaction is not None:
            return look_and_commit(core, lease)
        if not advances(lease) or shares_probe(core, lease):
            return None
        return commit_and_look(core, lease)

    def close(self, core: Core, session: Session, lease: Lease, *, interrupted: bool) -> Plan[None]:
        """
        Give it back; see `close_read`.
        """
        return close_read(core, session, lease, interrupted=interrupted)


def open_chosen(core: Core, session: Session, choice: Choice) -> Plan[Lease]:
    """
    Take a connection as was chosen: what most reads need, in one step.

    Whatever is not as it was when the choice was made is left to `open_read`.
    """
    node = choice.candidate.node
    core.cluster.enter(node, fallback=False)
    try:
        conn = yield Checkout(node.name, core.settings.connect_timeout, READY_SECONDS)
    except NodeFailure as failure:
        core.cluster.leave(node, fallback=False)
        report(core, node.name, failure)
        read = core.new_read(session, choice.token, choice.level)
        read.excluded = frozenset({node.name})
        return (yield from open_read(core, session, read))
    except BaseException:
        core.cluster.leave(node, fallback=False)
        raise
    facts = ready_at_once(core, choice, conn)
    if facts is not None:
        core.note(session, choice.route)
        return Lease(node.name, conn, facts, choice.route, choice.level, session.token)
    read = core.new_read(session, choice.token, choice.level)
    serve = choice.verdict(core.clock())
    lease = yield from _taken(core, read, serve, conn, fallback=False)
    if lease is None:
        return (yield from open_read(core, session, read))
    core.note(session, lease.route)
    lease.token = session.token
    return lease


def open_read(core: Core, session: Session, read: Read) -> Plan[Lease]:
    """
    Take a connection that may serve ``read``.

    Raises a `RoutingError` when nothing may serve it.
    """
    attempts = MAX_ATTEMPTS + MAX_REFUSALS * len(core.cluster.nodes)
    for _ in range(attempts):
        verdict = core.decide(read)
        if not isinstance(verdict, Serve):
            verdict = yield from _served(core, read, verdict)
        lease = yield from take(core, read, verdict)
        if lease is not None:
            core.note(session, lease.route)
            lease.token = _reissued(core, session, lease.node, lease.lost)
            try:
                _report_lost(core, lease.lost)
            except LostWriteError:
                yield from close_read(core, session, lease, interrupted=False)
                raise
            return lease
    raise NoNodeAvailableError({}, f"no node served the read in {attempts} attempts")


def choose(core: Core, session: Session, read: Read) -> Plan[Route]:
    """
    Decide where a read goes without taking a connection.
    """
    verdict = yield from _served(core, read, core.decide(read))
    while verdict.ask:
        # Only a connection could tell, and a choice opens none.
        read.refuse(verdict.node.name, MAX_REFUSALS)
        verdict = yield from _served(core, read, core.decide(read))
    route = _route(read, verdict)
    if route.reason is Reason.LAG_EXCEEDED:
        core.warn_lag_exceeded(read)
    core.note(session, route)
    if route.reason is Reason.TIMELINE_CHANGED:
        _warn_unproven(core, verdict)
        # No read follows that would give the session a position on the new timeline.
        held = _reissued(core, session, route.name, verdict.lost)
        yield from advance_past_primary(core, session, held, core.clock())
    _report_lost(core, verdict.lost)
    return route


def _reissued(core: Core, session: Session, name: str, lost: Lost | None) -> Token:
    """
    Replace what is lost by the primary's position, and return what still may be found lost.
    """
    if lost is None:
        return session.token
    # Nobody waits for a lost position twice.
    seen = core.cluster.nodes[name].newest
    if seen is None or seen.bound_position is None or not core.cluster.is_primary(seen):
        return NO_POSITIONS
    session.reissue(lost.position, seen.bound_position)
    return session.token


def _report_lost(core: Core, lost: Lost | None) -> None:
    if lost is None:
        return
    core.emit(LostWrite(lost.position, lost.timeline, lost.switch_point))
    if core.settings.on_lost_write == "error":
        raise LostWriteError(lost.position, lost.switch_point)


def _warn_unproven(core: Core, serve: Serve) -> None:
    if serve.reason is Reason.TIMELINE_CHANGED and serve.lost is None:
        core.warn_history_unknown()


def open_forced(core: Core, session: Session, read: Read, name: str) -> Plan[Lease]:
    """
    Take a connection of the named node without a decision.
    """
    node = core.cluster.nodes.get(name)
    if node is None:
        known = ", ".join(core.cluster.nodes)
        raise ConfigurationError(f"no node is named {name!r}; this router has {known}")
    core.cluster.enter(node, fallback=False)
    try:
        conn = yield Checkout(name, core.settings.connect_timeout, core.settings.connect_timeout)
        try:
            facts = core.facts_of(conn)
            if facts is None:
                facts = yield from meet(core, name, conn)
            if facts.pooled:
                yield from begin(conn, facts)
            yield from make_read_only(core, conn, facts, in_recovery=False)
        except BaseException:
            yield hand_back(core, name, conn, core.facts_of(conn))
            raise
    except NodeFailure as failure:
        core.cluster.leave(node, fallback=False)
        report(core, name, failure)
        raise failure.cause from None
    except BaseException:
        core.cluster.leave(node, fallback=False)
        raise
    route = Route(name, "replica" if facts.in_recovery else "primary", Reason.FORCED)
    session.last_route = route
    core.emit(ReadRouted(route))
    return Lease(name, conn, facts, route, read.level, session.token)


def take(core: Core, read: Read, serve: Serve) -> Plan[Lease | None]:
    """
    Take a connection as a decision says; None if none could be had or none may serve the read.
    """
    fallback = serve.primary and serve.reason in _FALLBACKS
    if not core.cluster.enter(serve.node, fallback=fallback):
        serve = yield from _limited(core, read, serve)
        fallback = serve.primary
    return (yield from _taken(core, read, serve, None, fallback=fallback))


def _taken(
    core: Core, read: Read, serve: Serve, conn: Any, *, fallback: bool
) -> Plan[Lease | None]:
    # The node has been entered; ``conn`` is a connection of it, or None.
    try:
        connected = yield from _connect(core, read, serve, conn)
    except NodeFailure as failure:
        core.cluster.leave(serve.node, fallback=fallback)
        report(core, serve.node.name, failure)
        if not serve.primary:
            read.excluded = read.excluded | {serve.node.name}
        elif serve.node is core.cluster.primary:
            if not failure.down and serve.node.newest is not None:
                # A full pool does not make the primary unreachable.
                raise failure.cause from None
            read.primary_error = failure.cause
        return None
    except BaseException:
        core.cluster.leave(serve.node, fallback=fallback)
        raise
    if connected is None:
        core.cluster.leave(serve.node, fallback=fallback)
        return None
    if serve.reason is Reason.LAG_EXCEEDED:
        core.warn_lag_exceeded(read)
    _warn_unproven(core, serve)
    conn, facts, seen = connected
    lease = Lease(serve.node.name, conn, facts, _route(read, serve), read.level)
    lease.fallback, lease.lost = fallback, serve.lost
    if facts.pooled and read.level.advances_on_reads:
        lease.transaction = seen.transaction
    return lease


def _limited(core: Core, read: Read, serve: Serve) -> Plan[Serve]:
    # The node of the returned verdict has been entered.
    limit = core.settings.max_fallback_reads or 0
    action = core.settings.on_fallback_limit
    core.emit(FallbackLimited(limit, action))
    if action == "stale":
        stale = core.decide_stale(read, serve)
        if stale is not None:
            core.cluster.enter(stale.node, fallback=False)
            return stale
    elif action == "wait":
        ends = core.clock() + core.settings.fallback_wait_seconds
        while (left := ends - core.clock()) > 0:
            yield AwaitTurn(left)
            if core.cluster.enter(serve.node, fallback=True):
                return serve
    raise FallbackLimitError(limit, RETRY_AFTER_SECONDS)


def _connect(
    core: Core, read: Read, serve: Serve, conn: Any
) -> Plan[tuple[Any, Facts, Observation] | None]:
    name = serve.node.name
    for _ in range(CONNECTIONS_TRIED):
        if conn is None and serve.primary:
            conn = yield from checkout_of_primary(core, serve.node)
        elif conn is None:
            conn = yield Checkout(name, core.settings.connect_timeout, READY_SECONDS)
        try:
            if known := ready(core, read, serve, conn):
                return conn, *known
            facts, seen, admitted = yield from look(core, read, serve, conn)
            if admitted or core.admits(read, serve, seen):
                recovery = seen.in_recovery
                asked = yield from make_read_only(core, conn, facts, in_recovery=recovery)
                # Meanwhile the lag has grown.
                if not asked or core.admits(read, serve, seen):
                    return conn, facts, seen
        except BaseException:
            yield hand_back(core, name, conn, core.facts_of(conn))
            raise
        hides = serve.node.hides_servers
        discard = hides and core.may_recycle(seen)
        yield from refuse(core, name, conn, facts, discard=discard)
        if not hides:
            break
        conn = None
    read.refuse(name)
    return None


def _served(core: Core, read: Read, verdict: Verdict) -> Plan[Serve]:
    # The loop ends: there is one refresh a read, and waits end with their time.
    while not isinstance(verdict, Serve):
        if isinstance(verdict, Fail):
            raise verdict.error from read.primary_error
        if isinstance(verdict, Refresh):
            read.compared = read.compared or verdict.compare
            read.refreshed = read.refreshed or not verdict.compare
            primary = core.cluster.primary
            yield from look_again(core, verdict.names)
            if core.cluster.primary is not primary:
                # It is another one that had failed.
                read.primary_error = None
        else:
            left = read.wait_from(core.clock())
            if read.wait_seconds <= 0:
                # Not waiting for a replica to catch up still means to look whether one has.
                yield from look_again(core, _replicas(core))
            elif left > 0:
                yield AwaitPosition(verdict.required, left, read.began)
            read.wait_until(core.clock())
            # Another server of an endpoint may be reached now, or the same one caught up.
            read.readmit(MAX_REFUSALS)
        verdict = core.decide(read)
    return verdict


def _replicas(core: Core) -> tuple[str, ...]:
    return tuple(
        node.name
        for node in core.cluster.all_nodes
        if node.newest is not None and node.newest.in_recovery
    )


def _route(read: Read, serve: Serve) -> Route:
    if serve.primary:
        return Route(serve.node.name, "primary", serve.reason, read.waited_seconds, 0.0)
    return Route(
        serve.node.name,
        "replica",
        serve.reason,
        read.waited_seconds,
        serve.lag_seconds,
        serve.stale,
    )
