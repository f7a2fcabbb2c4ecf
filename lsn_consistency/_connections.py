"""
What a plan does with one connection: meet its server, look at it, make it read-only and back.
"""

from __future__ import annotations

from typing import Any, Final

from lsn_consistency import _sql
from lsn_consistency._core import Core, Facts
from lsn_consistency._nodes import Node
from lsn_consistency._observation import Observation
from lsn_consistency._steps import (
    AwaitObservation,
    Checkout,
    Fetch,
    NodeFailure,
    Plan,
    Return,
    SetReadOnly,
    ask_position,
    identify,
    observe,
)
from lsn_consistency._verdicts import Choice, Read, Serve

READY_SECONDS: Final = 0.001
"""Time to take a connection that lies ready in its pool, and no time to open another."""


def meet(core: Core, name: str, conn: Any) -> Plan[Facts]:
    """
    Make the first observation on a connection, and remember the connection by it.
    """
    identity, seen = yield from identify(conn)
    return core.met(name, conn, identity, seen)


def patience_with_primary(core: Core, primary: Node) -> Plan[float | None]:
    """
    Return how long a connection of the primary may take; None for as long as its pool says.
    """
    # A well primary's pool may be busy, for as long as the pool says. One that has just failed gets
    # the time of a connection. One whose breaker is open is asked by its monitor, for all at once.
    if not primary.failures:
        return None
    if primary.breaker_open:
        seen = yield AwaitObservation(primary.name, core.clock())
        if seen is None:
            return READY_SECONDS
    return core.settings.connect_timeout


def ready(core: Core, read: Read, serve: Serve, conn: Any) -> tuple[Facts, Observation] | None:
    """
    Return what is known of a connection that may serve a read as it is; None asks for a `look`.
    """
    facts = core.facts_of(conn)
    if facts is None:
        return None
    known = core.usable(facts, core.clock())
    if known is None or not _is_read_only(core, conn, facts, in_recovery=known.in_recovery):
        return None
    return (facts, known) if core.admits(read, serve, known) else None


def ready_at_once(core: Core, choice: Choice, conn: Any) -> Facts | None:
    """
    Return what is known of a connection that serves a read as chosen; None asks for a `take`.
    """
    facts = core.facts_of(conn)
    if facts is None or not _is_read_only(core, conn, facts, in_recovery=True):
        return None
    now = core.clock()
    seen = core.usable(facts, now)
    # Something new may have been observed since.
    listed = core.cluster.listed()
    return facts if listed.admits(facts.node, choice.required, seen, now) else None


def ready_to_write(core: Core, conn: Any, named: int) -> Facts | None:
    """
    Return what is known of a connection that may write as it is; None asks for a `look`.

    ``named`` is the timeline that its primary must have reached.
    """
    facts = core.facts_of(conn)
    if facts is None or facts.changed or facts.read_only:
        return None
    known = core.usable(facts, core.clock())
    if known is None or not core.cluster.is_primary(known) or (known.timeline or 0) < named:
        return None
    return facts


def look(
    core: Core, read: Read | None, serve: Serve, conn: Any
) -> Plan[tuple[Facts, Observation, bool]]:
    """
    Return an observation of the server behind a connection, made after the connection was opened.

    A known one does if it already lets ``serve`` go on, which the third value says; ``read`` is
    None for a write.
    """
    name = serve.node.name
    facts = core.facts_of(conn)
    if facts is None:
        identity, seen = yield from identify(conn)
        facts = core.met(name, conn, identity, seen)
        seen = core.cluster.completed(name, seen)
        if not facts.pooled or read is None:
            return facts, seen, False
    if facts.pooled and read is not None:
        yield from begin(conn, facts)
    known = core.usable(facts, core.clock())
    if known is not None:
        good = core.cluster.is_primary(known) if read is None else core.admits(read, serve, known)
        if good:
            return facts, known, True
    return facts, (yield from look_through(core, conn, facts)), False


def look_through(core: Core, conn: Any, facts: Facts) -> Plan[Observation]:
    """
    Observe the server behind a known connection.
    """
    prepared = None if facts.pooled else facts.prepared
    seen = yield from observe(
        conn, facts.identity, in_recovery=facts.in_recovery, prepared=prepared
    )
    return seen_through(core, facts, seen)


def look_back(core: Core, conn: Any, facts: Facts) -> Plan[Observation]:
    """
    Observe the server behind a known connection for what a block has shown or written.
    """
    if facts.in_recovery or facts.pooled or facts.identity.limited:
        return (yield from look_through(core, conn, facts))
    try:
        seen = yield from ask_position(conn, facts.identity, facts.prepared)
    except NodeFailure as failure:
        if failure.state != _sql.IN_RECOVERY:
            raise
        return (yield from look_through(core, conn, facts))
    return seen_back(core, facts, seen)


def seen_back(core: Core, facts: Facts, seen: Observation) -> Observation:
    """
    Take what a connection has told after its block; return it completed.
    """
    if seen.in_recovery:
        return seen_through(core, facts, seen)
    # A position is less than the cluster wants to know of its primary.
    facts.answered_at = seen.received_at
    return seen


def seen_through(core: Core, facts: Facts, seen: Observation) -> Observation:
    """
    Take what a connection has told about its server, and return it completed.
    """
    facts.answered_at, facts.in_recovery = seen.received_at, seen.in_recovery
    return core.observed(facts.node, seen)


def make_read_only(core: Core, conn: Any, facts: Facts, *, in_recovery: bool) -> Plan[bool]:
    """
    Let nothing be written in the read's transactions; True if that took a round trip.
    """
    # Behind a pooler the transaction that the check opened is read-only already.
    if facts.pooled or _is_read_only(core, conn, facts, in_recovery=in_recovery):
        return False
    if conn.autocommit:
        yield Fetch(conn, _sql.READ_ONLY)
        facts.read_only = True
        return True
    yield from _change_to_read_only(conn, facts)
    return False


def _is_read_only(core: Core, conn: Any, facts: Facts, *, in_recovery: bool) -> bool:
    if not conn.autocommit:
        return facts.changed and conn.read_only is True
    # A standby is read-only by itself: a given pool's connection need not be changed and back.
    return facts.read_only or (in_recovery and core.is_given(facts.node))


def begin(conn: Any, facts: Facts) -> Plan[None]:
    """
    Open the transaction in which a read behind a pooler is checked and carried out.
    """
    if not conn.autocommit:
        # For transactions that the user opens after this one.
        yield from _change_to_read_only(conn, facts)
    yield Fetch(conn, _sql.BEGIN_READ_COMMITTED)


def _change_to_read_only(conn: Any, facts: Facts) -> Plan[None]:
    if not facts.changed:
        facts.changed, facts.own_read_only = True, conn.read_only
    if conn.read_only is not True:
        yield SetReadOnly(conn, True)


def make_writable(conn: Any, facts: Facts) -> Plan[None]:
    """
    Undo what an earlier read has left of `make_read_only`.
    """
    if facts.changed:
        yield SetReadOnly(conn, facts.own_read_only)
        facts.changed = False
    if facts.read_only:
        yield Fetch(conn, _sql.READ_WRITE)
        facts.read_only = False


def hand_back(core: Core, name: str, conn: Any, facts: Facts | None) -> Return:
    """
    Return the step that gives back a connection which may not have its own settings any more.
    """
    # Its owner must not get it with the settings of a read.
    left = facts is not None and (facts.changed or facts.read_only)
    return Return(name, conn, discard=left and core.is_given(name) and not conn.closed)


def refuse(core: Core, name: str, conn: Any, facts: Facts, *, discard: bool) -> Plan[None]:
    """
    Give back a connection that cannot serve a read after all, as it was.
    """
    try:
        if facts.pooled:
            # Its pool would do the same, with a warning.
            yield Fetch(conn, _sql.ROLLBACK)
        yield from restore(core, conn, facts)
    finally:
        yield Return(name, conn, discard)


def checkout_of_primary(core: Core, primary: Node) -> Plan[Any]:
    """
    Take a connection of the primary, which may be busy for as long as its pool says.
    """
    patience = yield from patience_with_primary(core, primary)
    connecting = core.settings.connect_timeout
    if patience is not None:
        return (yield Checkout(primary.name, patience, connecting))
    ends = core.clock() + core.pool_timeout(primary.name)
    while True:
        asked = core.clock()
        part = min(connecting, max(READY_SECONDS, ends - asked))
        try:
            # In parts: who waits is not left in the queue of a server that fails meanwhile.
            return (yield Checkout(primary.name, part, connecting))
        except NodeFailure as busy:
            refused = core.clock() - asked < part
            well = not primary.failures and primary is core.cluster.primary
            if busy.down or refused or not well or core.clock() >= ends:
                raise


def restore(core: Core, conn: Any, facts: Facts) -> Plan[None]:
    """
    Give a read's connection its own settings back, where anybody else may take it.
    """
    # A pool of the router's own gives its connections to blocks of the router only.
    if core.is_given(facts.node) and not conn.closed:
        yield from make_writable(conn, facts)


def report(core: Core, name: str, failure: NodeFailure) -> None:
    """
    Tell the cluster of a step that failed.
    """
    if failure.down:
        core.failed(name, failure.cause)
    core.kick(name)


def look_again(core: Core, names: tuple[str, ...]) -> Plan[None]:
    """
    Get a new observation of each of these nodes, one after the other.
    """
    # The primary is first: a replica then had time to replay what the primary's sample says.
    for name in names:
        yield AwaitObservation(name, core.clock())
