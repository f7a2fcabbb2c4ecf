"""
How a session comes to its position after a read or a write, and what it gets when there is none.
"""

from __future__ import annotations

from lsn_consistency._core import Core
from lsn_consistency._lineage import lost_position
from lsn_consistency._observation import Observation
from lsn_consistency._steps import AwaitObservation, Plan
from lsn_consistency.events import LostWrite, PositionUnknown
from lsn_consistency.lsn import Lsn, Position
from lsn_consistency.session import Session
from lsn_consistency.tokens import Token


def advance_to(core: Core, session: Session, seen: Observation, held: Token) -> bool:
    """
    Advance the session to the bound of an observation; False if that is unknown.

    ``held`` is a token from before the observation was made. What of it a primary does not have is
    reported, and what it has not reached, it never will: then the position is replaced.
    """
    position = _own_position(core, seen, seen.bound, held)
    if position is None:
        return False
    before = held.get(position.system_id)
    if before is None or not core.cluster.is_primary(seen):
        _advance(session, position)
        return True
    if lost := lost_position(core.cluster, before, position):
        core.emit(LostWrite(lost.position, lost.timeline, lost.switch_point))
        session.reissue(before, position)
    else:
        _advance(session, position)
    return True


def _advance(session: Session, position: Position) -> None:
    # On a quiet cluster reads see the same position again and again.
    held = session.token.get(position.system_id)
    if held is None or position > held:
        session.advance(Token._trusted({position.system_id: position}, None))


def _own_position(core: Core, seen: Observation, lsn: Lsn | None, held: Token) -> Position | None:
    known = core.cluster.timeline if seen.server.system_id == core.cluster.system_id else 0
    if seen.in_recovery and (seen.timeline or 0) < known:
        # It may have gone over to the newer timeline without saying so yet.
        return None
    position = core.cluster.timelines.own_position(seen, lsn)
    before = held.get(seen.server.system_id)
    if position is None and lsn is not None and before is not None:
        # What the session holds on this timeline is in its own part.
        return (
            before._replace(lsn=max(lsn, before.lsn)) if before.timeline == seen.timeline else None
        )
    return position


def advance_past_read(
    core: Core, session: Session, seen: Observation | None, held: Token, started: float
) -> Plan[None]:
    """
    Advance the session past what a read can have shown; ``seen`` is its server afterwards.
    """
    if seen is not None and advance_to(core, session, seen, held):
        return
    primary = core.cluster.primary
    gone = primary is None or primary.failures > 0
    if gone and seen is not None and _advanced_without_primary(core, session, seen, held):
        return
    yield from advance_past_primary(core, session, held, started, shown=seen)


def advance_past_primary(
    core: Core,
    session: Session,
    held: Token,
    started: float,
    *,
    shown: Observation | None = None,
) -> Plan[None]:
    """
    Advance the session past everything that the primary has by now; pin it if that is unknown.

    ``shown`` is the server that the session has read from.
    """
    # The primary's position is an upper bound for everything that any node can have shown.
    seen = None
    if (primary := core.cluster.primary) is not None:
        seen = yield AwaitObservation(primary.name, started)
    gone = seen is None
    if shown is not None and seen is not None and (shown.timeline or 0) > (seen.timeline or 0):
        # Of a former primary that is no bound. The session remembers that there is a newer one.
        _name_timeline(session, shown, held)
        seen = None
    if seen is not None and not seen.in_recovery and advance_to(core, session, seen, held):
        return
    if gone and shown is not None and _advanced_without_primary(core, session, shown, held):
        return
    pin(core, session, "no position could be taken")


def _advanced_without_primary(
    core: Core, session: Session, shown: Observation, held: Token
) -> bool:
    # No walreceiver, so no bound, and no primary to ask: its standbys have lost it. To pin the
    # session to it would stop the session's reads; docs/limits.md says what this leaves open.
    position = _own_position(core, shown, shown.lsn, held)
    if position is not None:
        session.advance(Token([position]))
    return position is not None


def _name_timeline(session: Session, shown: Observation, held: Token) -> None:
    before = held.get(shown.server.system_id)
    if shown.position is not None:
        lsn = shown.position.lsn if before is None else max(shown.position.lsn, before.lsn)
        session.advance(Token([shown.position._replace(lsn=lsn)]))


def or_pinned(core: Core, session: Session, plan: Plan[None]) -> Plan[None]:
    """
    Carry out a plan that advances the session, and pin the session if it is ended early.
    """
    # Whatever ends the plan early, the session has not advanced: unknown goes to the primary.
    try:
        yield from plan
    except BaseException:
        pin(core, session, "taking the position was interrupted")
        raise


def pin(core: Core, session: Session, why: str) -> None:
    """
    Send the session's reads to the primary for ``pin_seconds``: its position is unknown.
    """
    until = core.unix_clock() + core.settings.pin_seconds
    session.pin(until)
    core.emit(PositionUnknown(why, until))
