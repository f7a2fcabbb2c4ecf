"""
The steps of a write, and of taking the primary's position, without the input and output.
"""

from __future__ import annotations

from functools import lru_cache

from lsn_consistency import _retries
from lsn_consistency._connections import (
    checkout_of_primary,
    look,
    look_again,
    look_back,
    make_writable,
    ready_to_write,
    report,
)
from lsn_consistency._core import Core
from lsn_consistency._decision import no_primary
from lsn_consistency._endings import commit_and_look
from lsn_consistency._leases import Lease
from lsn_consistency._lineage import named_timeline, primary_timeline
from lsn_consistency._plans import CONNECTIONS_TRIED
from lsn_consistency._positions import advance_past_primary, advance_to, or_pinned, pin
from lsn_consistency._steps import AwaitObservation, NodeFailure, Plan, Return
from lsn_consistency._verdicts import Serve
from lsn_consistency.consistency import Consistency, effective
from lsn_consistency.exceptions import NoNodeAvailableError
from lsn_consistency.route import Reason, Route
from lsn_consistency.session import Session
from lsn_consistency.tokens import Token


class Writing:
    """
    Be what a block of ``write()`` is for.
    """

    def open(self, core: Core, session: Session) -> Plan[Lease]:
        """
        Take a connection of the primary.
        """
        _retries.note_write()
        return open_write(core, session)

    def commit(self, core: Core, lease: Lease) -> Plan[None] | None:
        """
        Take the position together with the commit.
        """
        return None if lease.level.name == "sticky" else commit_and_look(core, lease)

    def close(self, core: Core, session: Session, lease: Lease, *, interrupted: bool) -> Plan[None]:
        """
        Give it back; see `close_write`.
        """
        return close_write(core, session, lease, interrupted=interrupted)


def open_write(core: Core, session: Session) -> Plan[Lease]:
    """
    Take a connection of the primary.

    Raises the driver's own error, or `NoNodeAvailableError` when no node is the primary, or only a
    former one whose timeline is below that of the session's token.
    """
    session.accessed = True
    cluster = core.cluster
    named = named_timeline(cluster, Consistency.STRONG, session.token)
    if cluster.primary is None or (primary_timeline(cluster) or named) < named:
        yield from look_again(core, tuple(cluster.nodes))
    for _ in range(CONNECTIONS_TRIED):
        primary = cluster.primary
        if primary is None:
            break
        try:
            conn = yield from checkout_of_primary(core, primary)
            try:
                facts = ready_to_write(core, conn, named)
                if facts is None:
                    serve = Serve(primary, Reason.PRIMARY_REQUIRED, primary=True)
                    facts, seen, _ = yield from look(core, None, serve, conn)
                    if cluster.is_primary(seen) and (seen.timeline or 0) >= named:
                        yield from make_writable(conn, facts)
                    else:
                        facts = None
                if facts is not None:
                    level = effective(None, core.settings.consistency)
                    return Lease(
                        primary.name, conn, facts, _route(primary.name), level, session.token
                    )
            except BaseException:
                yield Return(primary.name, conn)
                raise
            yield Return(primary.name, conn)
        except NodeFailure as failure:
            report(core, primary.name, failure)
            raise failure.cause from None
    failures = {node.name: node.last_error or "is a standby" for node in cluster.all_nodes}
    known = primary_timeline(cluster)
    if known is not None and known < named:
        raise NoNodeAvailableError(failures, f"no primary of timeline {named}, only of {known}")
    raise NoNodeAvailableError(failures, no_primary(cluster))


@lru_cache
def _route(name: str) -> Route:
    return Route(name, "primary", Reason.PRIMARY_REQUIRED)


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
    seen = lease.seen
    sticky = lease.level.name == "sticky"
    if sticky:
        session.pin(core.unix_clock() + (lease.level.seconds or 0.0))
    try:
        if seen is None and not interrupted and not sticky:
            seen = yield from look_back(core, lease.conn, lease.facts)
    except NodeFailure as failure:
        report(core, lease.node, failure)
    finally:
        yield Return(lease.node, lease.conn)
    if sticky:
        return
    if interrupted:
        pin(core, session, "the write was interrupted")
    elif seen is None or seen.in_recovery or not advance_to(core, session, seen, lease.token):
        yield from advance_past_primary(core, session, lease.token, started)


def capture(core: Core, session: Session) -> Plan[None]:
    """
    Advance the session past everything that is committed on the primary by now.
    """
    session.wrote = True
    level = effective(None, core.settings.consistency)
    if level.name == "sticky":
        session.pin(core.unix_clock() + (level.seconds or 0.0))
        return
    past = advance_past_primary(core, session, session.token, core.clock())
    yield from or_pinned(core, session, past)


def primary_token(core: Core) -> Plan[Token]:
    """
    Return the primary's position as a token.

    Raises `NoNodeAvailableError` when it cannot be had.
    """
    primary = core.cluster.primary
    if primary is not None:
        seen = yield AwaitObservation(primary.name, core.clock())
        if seen is not None and not seen.in_recovery and seen.position is not None:
            return Token([seen.position])
    failures = {node.name: node.last_error or "not asked" for node in core.cluster.all_nodes}
    raise NoNodeAvailableError(failures, "the primary's position cannot be had")
