"""
The steps at the end of a read: its commit, a last look at its server, and its position.
"""

from __future__ import annotations

from typing import Any

from lsn_consistency._connections import (
    hand_back,
    look_back,
    report,
    restore,
    seen_back,
    seen_through,
)
from lsn_consistency._core import Core
from lsn_consistency._leases import Lease
from lsn_consistency._nodes import MANY_READS
from lsn_consistency._observation import Observation
from lsn_consistency._positions import advance_past_read, or_pinned, pin
from lsn_consistency._steps import (
    AwaitObservation,
    Commit,
    NodeFailure,
    Plan,
    commit_and_observe,
    observe,
)
from lsn_consistency.route import Reason
from lsn_consistency.session import Session


def commit_and_look(core: Core, lease: Lease) -> Plan[None] | None:
    """
    Return the plan that commits, and observes the server after it; None if that takes longer.
    """
    facts = lease.facts
    if lease.conn.autocommit or facts.pooled or facts.identity.limited:
        return None
    return _commit_and_look(core, lease)


def _commit_and_look(core: Core, lease: Lease) -> Plan[None]:
    facts = lease.facts
    seen = yield from commit_and_observe(
        lease.conn, facts.identity, in_recovery=facts.in_recovery, prepared=facts.prepared
    )
    lease.seen = None if seen is None else seen_back(core, facts, seen)


def look_and_commit(core: Core, lease: Lease) -> Plan[None]:
    """
    Observe the server of a read behind a pooler, then commit.
    """
    yield from last_look(core, lease)
    yield Commit(lease.conn)


def last_look(core: Core, lease: Lease) -> Plan[None]:
    """
    Observe the server of a read behind a pooler while the read's transaction still holds it.
    """
    if lease.transaction is None:
        return
    try:
        facts = lease.facts
        seen = yield from observe(lease.conn, facts.identity, in_recovery=facts.in_recovery)
    except NodeFailure:
        # The primary is asked then.
        return
    # After a COMMIT of the user's the pooler may have changed the server in between.
    if seen.transaction == lease.transaction:
        lease.seen = seen_through(core, facts, seen)


def close_read(core: Core, session: Session, lease: Lease, *, interrupted: bool) -> Plan[Any]:
    """
    Give a read's connection back, and advance the session past what it can have shown.

    Nothing is raised: a position that cannot be had pins the session. ``interrupted`` says that
    the read was cancelled, and there is no time to ask anybody.
    """
    if advances(lease):
        return or_pinned(core, session, _close_read(core, session, lease, interrupted))
    return _give_back(core, lease, asks=False)


def _close_read(core: Core, session: Session, lease: Lease, interrupted: bool) -> Plan[None]:
    started = core.clock()
    shares = lease.seen is None and shares_probe(core, lease)
    asks = not (interrupted or shares or lease.facts.pooled or lease.seen is not None)
    asked = yield from _give_back(core, lease, asks=asks)
    seen = lease.seen or asked
    if interrupted:
        pin(core, session, "the read was interrupted")
        return
    if shares and not lease.facts.pooled:
        seen = yield AwaitObservation(lease.node, started)
        if seen is not None and seen.server != lease.facts.identity.server:
            seen = None
    yield from advance_past_read(core, session, seen, lease.token, started)


def advances(lease: Lease) -> bool:
    """
    Tell whether the session advances past what its read has shown.
    """
    return lease.level.advances_on_reads or lease.route.reason is Reason.TIMELINE_CHANGED


def shares_probe(core: Core, lease: Lease) -> bool:
    """
    Tell whether a read waits for the probe of its node rather than ask by itself.
    """
    # Of many reads those that end together share one probe; few ask on their own connections,
    # which takes less time. Behind a pooler neither reaches the same server for certain.
    if lease.shares is None:
        # Once for each read: others that end during its COMMIT are no reason to ask separately.
        node = core.cluster.nodes[lease.node]
        lease.shares = node.in_flight >= MANY_READS and not node.hides_servers
    return lease.shares


def _give_back(core: Core, lease: Lease, *, asks: bool) -> Plan[Observation | None]:
    # A read's connection, after a last observation of its server.
    seen = None
    try:
        if asks:
            seen = yield from look_back(core, lease.conn, lease.facts)
        if core.is_given(lease.node):
            yield from restore(core, lease.conn, lease.facts)
    except NodeFailure as failure:
        report(core, lease.node, failure)
    finally:
        core.cluster.leave(core.cluster.nodes[lease.node], fallback=lease.fallback)
        yield hand_back(core, lease.node, lease.conn, lease.facts)
    return seen
