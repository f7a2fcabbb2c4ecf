"""
The steps of ``run_read``: run a function, run it again elsewhere, run it twice at once.

Theory of operation. A function runs on a connection of its own, so what it saw reaches the caller
only by what it returns or raises. The session advances by that, and by nothing else: a run that is
repeated, or that lost a race, leaves it as it was, and the next run asks for the same position as
the first. A failure that is raised in the end counts as shown.

With ``hedge_after`` the runs are spawned beside the caller, which waits for their race and not for
them: a loser is cancelled, and gives its connection back, after the caller has its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lsn_consistency._connections import look_again, report, restore
from lsn_consistency._core import Core
from lsn_consistency._endings import close_read, last_look
from lsn_consistency._hedges import HedgeBudget, Race, Run
from lsn_consistency._leases import Lease
from lsn_consistency._plans import open_read, take
from lsn_consistency._positions import advance_past_primary, or_pinned, pin
from lsn_consistency._retries import ROLE_STATES, Ended, Next, Work, after
from lsn_consistency._steps import (
    Abandon,
    AwaitObservation,
    AwaitRace,
    Call,
    NodeFailure,
    Plan,
    Return,
    Spawn,
)
from lsn_consistency._verdicts import Read, Serve
from lsn_consistency.consistency import Consistency
from lsn_consistency.events import ReadHedged, ReadRetried
from lsn_consistency.exceptions import RoutingError
from lsn_consistency.session import Session


class Hedging(NamedTuple):
    """
    Say after how many seconds a second replica is asked, and what pays for it.
    """

    after: float
    budget: HedgeBudget


class _Ran(NamedTuple):
    lease: Lease
    ended: Ended


@dataclass(slots=True)
class _Attempts:
    """
    Remember where a read has run; ``left`` is how many runs it may still have.
    """

    left: int
    tried: set[str] = field(default_factory=set)
    to_primary: bool = False
    failed: BaseException | None = None


def run_read(
    core: Core,
    session: Session,
    work: Work,
    consistency: Consistency | None,
    hedging: Hedging | None,
) -> Plan[Any]:
    """
    Return what ``work`` returns, having run it as often as its nodes failed.

    Raises what the function raises, and a `RoutingError` when nothing may serve the read.
    """
    if hedging is not None:
        hedging.budget.earn()
    # Each node once, and one that was promoted once more as the primary.
    attempts = _Attempts(len(core.cluster.nodes) + 1)
    while True:
        read = core.new_read(session, None, consistency)
        lease = yield from _open(core, session, read, attempts)
        if hedging is None:
            ran = yield from _alone(core, session, lease, work)
        else:
            ran = yield from _raced(core, session, lease, work, hedging, read)
        for each in ran:
            if not each.ended.is_nodes_fault:
                return _outcome(each.ended)
        yield from _go_elsewhere(core, session, work, ran, attempts)


def _outcome(ended: Ended) -> Any:
    if ended.error is not None:
        raise ended.error
    return ended.value


def _open(core: Core, session: Session, read: Read, attempts: _Attempts) -> Plan[Lease]:
    read.excluded = read.excluded | attempts.tried
    level = read.level
    if attempts.to_primary:
        read.level = Consistency.STRONG
    try:
        lease = yield from open_read(core, session, read)
    except RoutingError as nowhere:
        if attempts.failed is None:
            raise
        raise nowhere from attempts.failed
    lease.level = level
    return lease


# One run


def _alone(core: Core, session: Session, lease: Lease, work: Work) -> Plan[Sequence[_Ran]]:
    try:
        ended: Ended = yield Call(lease.conn, work, last_look(core, lease))
    except BaseException:
        yield from close_read(core, session, lease, interrupted=True)
        raise
    if ended.is_nodes_fault:
        yield from _drop(core, lease, clean=ended.clean)
    else:
        yield from close_read(core, session, lease, interrupted=False)
    return [_Ran(lease, ended)]


def _drop(core: Core, lease: Lease, *, clean: bool, ours: bool = False) -> Plan[None]:
    # Give a connection back without a look at its server; ``ours``: who broke it, if it is broken.
    try:
        if clean:
            yield from restore(core, lease.conn, lease.facts)
    except NodeFailure as failure:
        report(core, lease.node, failure)
    finally:
        core.cluster.leave(core.cluster.nodes[lease.node], fallback=lease.fallback)
        discard = not clean and (ours or not lease.conn.closed)
        yield Return(lease.node, lease.conn, discard)


# After a failure


def _go_elsewhere(
    core: Core, session: Session, work: Work, ran: Sequence[_Ran], attempts: _Attempts
) -> Plan[None]:
    # Raises the failure that ends the read; otherwise the next run may begin.
    failed_at = core.clock()
    for lease, ended in ran:
        changed = yield from _role_changed(core, lease, ended)
        what = after(ended, on_primary=lease.route.is_primary, role_changed=changed)
        attempts.left -= 1
        if what is Next.RAISE or work.wrote or not attempts.left:
            if lease.level.advances_on_reads:
                past = advance_past_primary(core, session, lease.token, failed_at)
                yield from or_pinned(core, session, past)
            _outcome(ended)
        attempts.tried.add(lease.node)
        attempts.to_primary = attempts.to_primary or what is Next.PRIMARY
        attempts.failed = ended.error
        core.emit(ReadRetried(lease.node, ended.state, str(ended.error).strip()))


def _role_changed(core: Core, lease: Lease, ended: Ended) -> Plan[bool]:
    if ended.state not in ROLE_STATES:
        return False
    seen = yield AwaitObservation(lease.node, core.clock())
    if seen is None or seen.in_recovery is not lease.route.is_primary:
        return False
    yield from look_again(core, tuple(core.cluster.nodes))
    return True


# Two runs at once


def _raced(
    core: Core, session: Session, lease: Lease, work: Work, hedging: Hedging, read: Read
) -> Plan[Sequence[_Ran]]:
    race = Race()
    first = race.enter()
    first.lease = lease
    try:
        has_room = yield Spawn(_run(core, session, first, work), first)
        if has_room:
            yield AwaitRace(race, hedging.after)
            if not race.is_over:
                asked = replace(read, excluded={*read.excluded, lease.node}, preferred=None)
                yield from _ask_another(core, session, race, work, asked, hedging)
            while not race.is_over:
                yield AwaitRace(race, None)
    except BaseException:
        race.close()
        if first.withdraw():
            race.leave(first)
            yield from _drop(core, lease, clean=True)
        elif lease.level.advances_on_reads:
            pin(core, session, "the read was interrupted")
        yield from _abandon(race)
        raise
    if not has_room:
        return (yield from _alone(core, session, lease, work))
    yield from _abandon(race)
    return _judged(core, session, race)


def _judged(core: Core, session: Session, race: Race) -> Sequence[_Ran]:
    ran = [run for run in race.runs if run.has_begun]
    winner = race.winner
    if len(ran) > 1:
        first, second = (run.lease.node for run in ran)
        core.emit(ReadHedged(first, second, winner is ran[1]))
    if winner is not None:
        session.last_route = winner.lease.route
        if not winner.lease.route.is_primary:
            session.node = winner.lease.node
        ran = [winner]
    return [_Ran(run.lease, run.ended) for run in ran if run.ended is not None]


def _ask_another(
    core: Core, session: Session, race: Race, work: Work, read: Read, hedging: Hedging
) -> Plan[None]:
    # A replica that satisfies the read at this moment, or none: never the primary, which would get
    # the load of replicas that are slow.
    verdict = core.decide(read)
    if not isinstance(verdict, Serve) or verdict.primary or not hedging.budget.spend():
        return
    run = race.enter()
    if not (yield Spawn(_hedge(core, session, run, work, read, verdict, hedging), run)):
        hedging.budget.refund()
        race.leave(run)


def _hedge(
    core: Core,
    session: Session,
    run: Run,
    work: Work,
    read: Read,
    verdict: Serve,
    hedging: Hedging,
) -> Plan[None]:
    try:
        run.lease = yield from take(core, read, verdict)
        if run.lease is None:
            hedging.budget.refund()
            return
        run.lease.token = session.token
        yield from _run(core, session, run, work)
    finally:
        run.race.leave(run)


def _run(core: Core, session: Session, run: Run, work: Work) -> Plan[None]:
    lease: Lease = run.lease
    try:
        if not run.begin(lease.conn):
            if not run.is_withdrawn:
                yield from _drop(core, lease, clean=True)
            return
        run.ended = yield Call(lease.conn, work, last_look(core, lease), run)
        ended = run.ended
        if ended.is_nodes_fault or not run.race.claim(run):
            yield from _drop(core, lease, clean=ended.clean, ours=run.race.is_decided)
        else:
            interrupted = ended.error is not None and not isinstance(ended.error, Exception)
            yield from close_read(core, session, lease, interrupted=interrupted)
    finally:
        run.race.leave(run)


def _abandon(race: Race) -> Plan[None]:
    # Beside the caller, which has its answer, and beside each other: one may hang.
    for run in race.losers:
        yield Spawn(_end(run), None)


def _end(run: Run) -> Plan[None]:
    yield Abandon(run)
