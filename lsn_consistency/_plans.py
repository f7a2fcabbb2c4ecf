"""
The steps of a read, a write and a choice, without the input and output.

The blocking and the async router carry out the same plans, so both route alike by construction. A
plan that is thrown a cancellation gives back what it holds, by yielding once more, before it lets
go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from lsn_consistency import _sql
from lsn_consistency._connections import (
    READY_SECONDS,
    look,
    make_read_only,
    make_writable,
    meet,
    patience_with_primary,
    report,
    restore,
)
from lsn_consistency._core import Core, Facts
from lsn_consistency._decision import Fail, Read, Refresh, Serve, Wait, no_primary
from lsn_consistency._observation import Observation
from lsn_consistency._positions import advance_past_primary, advance_past_read, or_pinned, pin
from lsn_consistency._sql import Identity
from lsn_consistency._steps import (
    AwaitObservation,
    AwaitPosition,
    AwaitTurn,
    Checkout,
    Fetch,
    NodeFailure,
    Plan,
    Return,
    observe,
)
from lsn_consistency.consistency import Consistency, effective
from lsn_consistency.events import FallbackLimited, ReadRouted
from lsn_consistency.exceptions import (
    ConfigurationError,
    FallbackLimitError,
    NoNodeAvailableError,
)
from lsn_consistency.route import Reason, Route
from lsn_consistency.session import Session
from lsn_consistency.tokens import Token

MAX_ATTEMPTS: Final = 16
CONNECTIONS_TRIED: Final = 3
MAX_REFUSALS: Final = 4
RETRY_AFTER_SECONDS: Final = 1.0
RETRIABLE_STATES: Final = frozenset({"40001", "40P01", "57P01", "57P02", "57P03"})
"""Recovery conflicts and shutdowns: the same read can succeed on another node."""
_FALLBACKS: Final = frozenset(
    {Reason.NOT_CAUGHT_UP, Reason.LAG_EXCEEDED, Reason.NO_REPLICA, Reason.TIMELINE_CHANGED}
)


@dataclass(slots=True)
class Lease:
    """
    Hold a connection in use, and why it was given.
    """

    node: str
    conn: Any
    facts: Facts
    route: Route
    level: Consistency
    fallback: bool = False


def open_read(core: Core, session: Session, read: Read) -> Plan[Lease]:
    """
    Take a connection that may serve ``read``.

    Raises a `RoutingError` when nothing may serve it.
    """
    attempts = MAX_ATTEMPTS + MAX_REFUSALS * len(core.cluster.nodes)
    for _ in range(attempts):
        verdict = yield from _verdict(core, read)
        lease = yield from _serve(core, read, verdict)
        if lease is not None:
            _note(core, session, lease.route)
            return lease
    raise NoNodeAvailableError({}, f"no node served the read in {attempts} attempts")


def choose(core: Core, session: Session, read: Read) -> Plan[Route]:
    """
    Decide where a read goes without taking a connection.
    """
    verdict = yield from _verdict(core, read)
    while verdict.ask:
        # Only a connection could tell, and a choice opens none.
        read.refusals[verdict.node.name] += MAX_REFUSALS
        read.refused.add(verdict.node.name)
        verdict = yield from _verdict(core, read)
    route = _route(read, verdict)
    if route.reason is Reason.LAG_EXCEEDED:
        core.warn_lag_exceeded(read)
    _note(core, session, route)
    return route


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
                yield Fetch(conn, _sql.BEGIN_READ_COMMITTED)
            yield from make_read_only(core, conn, facts, in_recovery=False)
        except BaseException:
            yield Return(name, conn)
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
    return Lease(name, conn, facts, route, read.level)


def close_read(core: Core, session: Session, lease: Lease, *, interrupted: bool) -> Plan[None]:
    """
    Give a read's connection back, and advance the session past what it can have shown.

    Nothing is raised: a position that cannot be had pins the session. ``interrupted`` says that
    the read was cancelled, and there is no time to ask anybody.
    """
    if lease.level.advances_on_reads or lease.route.reason is Reason.TIMELINE_CHANGED:
        yield from or_pinned(core, session, _close_read(core, session, lease, interrupted))
    else:
        yield from _give_back(core, lease, None)


def _close_read(core: Core, session: Session, lease: Lease, interrupted: bool) -> Plan[None]:
    node = core.cluster.nodes[lease.node]
    started = core.clock()
    # Reads that end together share one probe; one that is alone asks on its own connection. Behind
    # a pooler neither reaches the same server for certain.
    shares = node.in_flight > 1 and not node.hides_servers
    asks = not (interrupted or shares or lease.facts.pooled)
    seen = yield from _give_back(core, lease, lease.facts.identity if asks else None)
    if interrupted:
        pin(core, session, "the read was interrupted")
        return
    if shares and not lease.facts.pooled:
        seen = yield AwaitObservation(lease.node, started, core.settings.probe_timeout)
        if seen is not None and seen.server != lease.facts.identity.server:
            seen = None
    yield from advance_past_read(core, session, seen, started)


def _give_back(core: Core, lease: Lease, observed: Identity | None) -> Plan[Observation | None]:
    # A read's connection, after a last observation of the server of this identity.
    seen = None
    try:
        if observed is not None:
            seen = yield from observe(lease.conn, observed)
        yield from restore(core, lease.conn, lease.facts)
    except NodeFailure as failure:
        report(core, lease.node, failure)
    finally:
        core.cluster.leave(core.cluster.nodes[lease.node], fallback=lease.fallback)
        yield Return(lease.node, lease.conn)
    return seen


def open_write(core: Core, session: Session) -> Plan[Lease]:
    """
    Take a connection of the primary.

    Raises the driver's own error, or `NoNodeAvailableError` when no node is the primary.
    """
    session.accessed = True
    if core.cluster.primary is None:
        yield from _look_again(core, tuple(core.cluster.nodes))
    for _ in range(CONNECTIONS_TRIED):
        primary = core.cluster.primary
        if primary is None:
            break
        serve = Serve(primary, Reason.PRIMARY_REQUIRED, primary=True)
        try:
            timeout = yield from patience_with_primary(core, primary)
            conn = yield Checkout(primary.name, timeout, core.settings.connect_timeout)
            try:
                facts, seen = yield from look(core, None, serve, conn)
                if core.cluster.is_primary(seen):
                    yield from make_writable(conn, facts)
                    route = Route(primary.name, "primary", Reason.PRIMARY_REQUIRED)
                    level = effective(None, core.settings.consistency)
                    return Lease(primary.name, conn, facts, route, level)
            except BaseException:
                yield Return(primary.name, conn)
                raise
            yield Return(primary.name, conn)
        except NodeFailure as failure:
            report(core, primary.name, failure)
            raise failure.cause from None
    failures = {node.name: node.last_error or "is a standby" for node in core.cluster.all_nodes}
    raise NoNodeAvailableError(failures, no_primary(core.cluster))


def close_write(core: Core, session: Session, lease: Lease, *, interrupted: bool) -> Plan[None]:
    """
    Take the position after COMMIT, advance the session by it, and give the connection back.

    Nothing is raised: when the position cannot be had here, a fresh one of the primary is taken,
    and when there is none the session is pinned to the primary.
    """
    session.wrote = True
    yield from or_pinned(core, session, _close_write(core, session, lease, interrupted))


def _close_write(core: Core, session: Session, lease: Lease, interrupted: bool) -> Plan[None]:
    started = core.clock()
    seen: Observation | None = None
    sticky = lease.level.name == "sticky"
    if sticky:
        session.pin(core.unix_clock() + (lease.level.seconds or 0.0))
    try:
        if not interrupted and not sticky:
            seen = yield from observe(lease.conn, lease.facts.identity)
    except NodeFailure as failure:
        report(core, lease.node, failure)
    finally:
        yield Return(lease.node, lease.conn)
    if sticky:
        return
    if interrupted:
        pin(core, session, "the write was interrupted")
    elif seen is None or seen.in_recovery or seen.bound_position is None:
        yield from advance_past_primary(core, session, started)
    else:
        session.advance(Token([seen.bound_position]))


def capture(core: Core, session: Session) -> Plan[None]:
    """
    Advance the session past everything that is committed on the primary by now.
    """
    session.wrote = True
    level = effective(None, core.settings.consistency)
    if level.name == "sticky":
        session.pin(core.unix_clock() + (level.seconds or 0.0))
        return
    yield from or_pinned(core, session, advance_past_primary(core, session, core.clock()))


def primary_token(core: Core) -> Plan[Token]:
    """
    Return the primary's position as a token.

    Raises `NoNodeAvailableError` when it cannot be had.
    """
    primary = core.cluster.primary
    if primary is not None:
        seen = yield AwaitObservation(primary.name, core.clock(), core.settings.probe_timeout)
        if seen is not None and not seen.in_recovery and seen.position is not None:
            return Token([seen.position])
    failures = {node.name: node.last_error or "not asked" for node in core.cluster.all_nodes}
    raise NoNodeAvailableError(failures, "the primary's position cannot be had")


def is_retriable(state: str | None, *, lost: bool) -> bool:
    """
    Tell whether a read that failed so may run again on another node.
    """
    return lost or state in RETRIABLE_STATES


def _serve(core: Core, read: Read, serve: Serve) -> Plan[Lease | None]:
    fallback = serve.primary and serve.reason in _FALLBACKS
    if not core.cluster.enter(serve.node, fallback=fallback):
        serve = yield from _limited(core, read, serve)
        fallback = serve.primary
    try:
        connected = yield from _connect(core, read, serve)
    except NodeFailure as failure:
        core.cluster.leave(serve.node, fallback=fallback)
        report(core, serve.node.name, failure)
        if serve.primary:
            if not failure.down and serve.node.newest is not None:
                # A full pool does not make the primary unreachable.
                raise failure.cause from None
            read.primary_error = failure.cause
        else:
            read.excluded.add(serve.node.name)
        return None
    except BaseException:
        core.cluster.leave(serve.node, fallback=fallback)
        raise
    if connected is None:
        core.cluster.leave(serve.node, fallback=fallback)
        return None
    if serve.reason is Reason.LAG_EXCEEDED:
        core.warn_lag_exceeded(read)
    conn, facts = connected
    return Lease(serve.node.name, conn, facts, _route(read, serve), read.level, fallback)


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


def _connect(core: Core, read: Read, serve: Serve) -> Plan[tuple[Any, Facts] | None]:
    name = serve.node.name
    timeout: float | None = core.settings.connect_timeout
    renew = READY_SECONDS
    if serve.primary:
        timeout = yield from patience_with_primary(core, serve.node)
        renew = core.settings.connect_timeout
    for _ in range(CONNECTIONS_TRIED):
        conn = yield Checkout(name, timeout, renew)
        try:
            facts, seen = yield from look(core, read, serve, conn)
            if core.admits(read, serve, seen):
                yield from make_read_only(core, conn, facts, in_recovery=seen.in_recovery)
                return conn, facts
        except BaseException:
            yield Return(name, conn)
            raise
        hides = serve.node.hides_servers
        yield Return(name, conn, discard=hides and core.may_recycle(seen))
        if not hides:
            break
    read.refused.add(name)
    read.refusals[name] += 1
    return None


def _verdict(core: Core, read: Read) -> Plan[Serve]:
    # The loop ends: there is one refresh a read, and waits end with their time.
    while True:
        verdict = core.decide(read)
        if isinstance(verdict, Serve):
            return verdict
        if isinstance(verdict, Fail):
            raise verdict.error from read.primary_error
        if isinstance(verdict, Refresh):
            read.refreshed = True
            yield from _look_again(core, verdict.names)
        else:
            yield from _await(core, read, verdict)


def _await(core: Core, read: Read, verdict: Wait) -> Plan[None]:
    if read.waiting_since is None:
        read.waiting_since = core.clock()
    ends = read.waiting_since + read.wait_seconds
    if read.wait_seconds <= 0:
        # Not waiting for a replica to catch up still means to look whether one has.
        yield from _look_again(core, _replicas(core))
    elif (left := ends - core.clock()) > 0:
        yield AwaitPosition(verdict.required, left)
    now = core.clock()
    read.waited_seconds = now - read.waiting_since
    read.waited = now >= ends
    # Another server of an endpoint may be reached now, or the same one may have caught up.
    read.refused = {name for name in read.refused if read.refusals[name] >= MAX_REFUSALS}


def _look_again(core: Core, names: tuple[str, ...]) -> Plan[None]:
    # One after the other, the primary first: a replica then had time to replay what the primary's
    # sample says.
    for name in names:
        yield AwaitObservation(name, core.clock(), core.settings.probe_timeout)


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


def _note(core: Core, session: Session, route: Route) -> None:
    session.last_route = route
    if not route.is_primary:
        session.node = route.name
    core.emit(ReadRouted(route))
