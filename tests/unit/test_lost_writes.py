"""What a session gets when its position is lost, or elsewhere since a failover; by the plans."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from lsn_consistency import Consistency, Position, Reason, Session, Token, _plans, _writes
from lsn_consistency._leases import Lease
from lsn_consistency._steps import AwaitObservation, AwaitPosition, Checkout, Fetch, NodeFailure
from lsn_consistency.events import LostWrite
from lsn_consistency.exceptions import LostWriteError, NoNodeAvailableError, RoutingError
from lsn_consistency.lsn import Lsn, TimelineHistory
from tests.properties.fake_cluster import Endpoint, Operation, Simulation
from tests.simulation.servers import SYSTEM, Server
from tests.unit.test_plans import CHANCE, close_read, open_read, ready_world, run

CAUSAL = Consistency.CAUSAL
READ_YOUR_WRITES = Consistency.READ_YOUR_WRITES


def server_of(world: Simulation, name: str) -> Server:
    return next(each for each in world.servers if each.name == name)


def primary_of(world: Simulation) -> Server:
    return next(each for each in world.servers if each.is_primary and each.alive)


def commit(world: Simulation) -> int:
    """Commit on the primary of today, and return where; no replica has it yet."""
    return primary_of(world).log.commit(world.now, asynchronous=False).end


def end_of(world: Simulation) -> Position:
    """Return the primary's position, by the truth."""
    log = primary_of(world).log
    return Position(SYSTEM, log.timeline, Lsn(log.insert))


def probe_all(world: Simulation) -> None:
    """Have every monitor look, in any order of what they find first."""
    for _ in range(2):
        world.pass_time(0.05)
        world.probe_all(Random(CHANCE))


def learn(world: Simulation) -> None:
    """Tell the history of the primary's timeline, as a replication connection would."""
    log, cluster = primary_of(world).log, world.core.cluster
    assert cluster.primary is not None
    seen = cluster.primary.newest
    assert seen is not None
    history = TimelineHistory.parse(log.timeline, log.history_file(log.timeline))
    cluster.learn(cluster.primary.name, seen.server, log.timeline, history)


def failed_over(*, lost: bool = True, history: bool = True, **options: Any) -> tuple[Any, Token]:
    """
    Fail over to ``a``, with b and c behind it; return the world and a token of before.

    The token's write is ``lost``: no standby had received it.
    """
    world = ready_world(**options)
    if lost:
        commit(world)
    token = Token([end_of(world)])
    primary_of(world).stop()
    promoted = server_of(world, "a")
    promoted.promote(2)
    for name in "bc":
        server_of(world, name).follow(promoted.log)
    probe_all(world)
    replicate(world)
    if history:
        learn(world)
    world.events.clear()
    return world, token


def replicate(world: Simulation) -> None:
    """Let every standby have everything, and be seen with it."""
    for server in world.servers:
        server.replicate(1.0, 1.0)
    probe_all(world)


def crashed(**options: Any) -> tuple[Simulation, Token]:
    """Crash the primary with an asynchronous commit that was not flushed; return its token."""
    world = ready_world(**options)
    primary = primary_of(world)
    primary.log.commit(world.now, asynchronous=True)
    token = Token([end_of(world)])
    primary.crash(1.0)
    # The first probe finds the connection dead.
    probe_all(world)
    world.events.clear()
    return world, token


def lost_writes(world: Simulation) -> list[LostWrite]:
    return [event for event in world.events if isinstance(event, LostWrite)]


def held(session: Session) -> Position:
    position = session.token.get(SYSTEM)
    assert position is not None
    return position


def choose(world: Simulation, session: Session) -> Operation:
    read = world.core.new_read(session, None, None)
    return run(world, _plans.choose(world.core, session, read))


LOSSES: dict[str, Callable[..., tuple[Simulation, Token]]] = {
    "by a failover": failed_over,
    "by a crash": crashed,
}


# A read


@pytest.mark.parametrize("level", [CAUSAL, READ_YOUR_WRITES])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_write_is_reported_once_and_costs_one_read(loss: str, level: Consistency) -> None:
    """The primary serves, the session moves to its position, and nobody waits for the lost one."""
    world, token = LOSSES[loss]()
    primary = primary_of(world)
    session = Session(token)
    lost = held(session)
    before = world.now
    lease = open_read(world, session, level).result
    assert (True, Reason.TIMELINE_CHANGED) == (lease.route.is_primary, lease.route.reason)
    assert lease.conn.server is primary
    assert world.now - before < 0.1
    switch = Lsn(primary.log.ancestors.get(1, primary.log.insert))
    assert [LostWrite(lost, primary.log.timeline, switch)] == lost_writes(world)
    now = end_of(world)
    assert now == held(session)
    close_read(world, session, lease)
    assert now == held(session)
    assert session.token.pin_until is None
    replicate(world)
    again = open_read(world, session, level).result
    assert (False, Reason.CAUGHT_UP, 0.0) == (
        again.route.is_primary,
        again.route.reason,
        again.route.waited_seconds,
    )
    close_read(world, session, again)
    assert (1, []) == (len(lost_writes(world)), world.warnings)
    world.check_idle()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_write_can_be_an_error_once(loss: str) -> None:
    """It is raised after the connection went back and the session moved on: the next read works."""
    world, token = LOSSES[loss](on_lost_write="error")
    primary = primary_of(world)
    session = Session(token)
    lost = held(session)
    opened = open_read(world, session)
    assert isinstance(opened.error, LostWriteError)
    assert lost == opened.error.position
    assert Lsn(primary.log.ancestors.get(1, primary.log.insert)) == opened.error.switch_point
    world.check_idle()
    assert end_of(world) == held(session)
    assert 1 == len(lost_writes(world))
    lease = open_read(world, session).result
    close_read(world, session, lease)
    assert 1 == len(lost_writes(world))


@pytest.mark.parametrize("action", ["report", "error"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_choice_reports_a_lost_write_once(loss: str, action: str) -> None:
    """No read follows a choice, so it moves the session on by itself."""
    world, token = LOSSES[loss](on_lost_write=action)
    session = Session(token)
    chosen = choose(world, session)
    assert (action == "error") is isinstance(chosen.error, LostWriteError)
    if action == "report":
        assert Reason.TIMELINE_CHANGED is chosen.result.reason
    assert 1 == len(lost_writes(world))
    assert end_of(world) == held(session)
    assert choose(world, session).error is None
    assert 1 == len(lost_writes(world))
    world.check_idle()


@pytest.mark.parametrize("loss", LOSSES)
def test_each_session_with_a_lost_position_hears_of_it(loss: str) -> None:
    """One event a read, not one a position: every client has lost its own write."""
    world, token = LOSSES[loss]()
    for number in range(1, 4):
        session = Session(token)
        close_read(world, session, open_read(world, session).result)
        assert number == len(lost_writes(world))


def test_a_lost_position_is_not_waited_for() -> None:
    """The wait ends when the primary, asked since the read began, turns out not to have it."""
    world, token = crashed(wait_seconds=1.0)
    session = Session(token)
    read = world.core.new_read(session, None, None)
    operation = Operation(world, _plans.open_read(world.core, session, read))
    assert isinstance(operation.step, AwaitPosition)
    assert operation.step.since == read.began
    lease = operation.finish(Random(CHANCE)).result
    assert Reason.TIMELINE_CHANGED is lease.route.reason
    assert lease.route.waited_seconds < 0.2
    assert 1 == len(lost_writes(world))


def test_a_position_that_the_primary_reaches_is_not_lost() -> None:
    """The token is newer than what is known of the primary: it is asked, and has it."""
    world = ready_world(wait_seconds=0.3)
    commit(world)
    session = Session(Token([end_of(world)]))
    lease = open_read(world, session).result
    assert Reason.NOT_CAUGHT_UP is lease.route.reason
    assert [] == lost_writes(world)


def test_a_token_of_the_call_is_not_the_sessions() -> None:
    """A lost position that was handed in is reported; what the session holds itself stays."""
    world, token = failed_over()
    own = Position(SYSTEM, 2, Lsn(primary_of(world).log.insert + 64))
    commit(world)
    for kept in (None, own):
        session = Session(Token([] if kept is None else [kept]))
        world.events.clear()
        read = world.core.new_read(session, token, READ_YOUR_WRITES)
        lease = run(world, _plans.open_read(world.core, session, read)).result
        assert Reason.TIMELINE_CHANGED is lease.route.reason
        close_read(world, session, lease)
        assert 1 == len(lost_writes(world))
        assert held(session).timeline == 2
        assert kept is None or held(session) >= kept


@pytest.mark.parametrize("action", ["report", "error"])
def test_a_primary_that_fails_in_between_leaves_nothing_behind(action: str) -> None:
    """The connection goes back, and one event is told, whenever the primary is lost."""
    for point in range(12):
        world, token = failed_over(on_lost_write=action)
        session = Session(token)
        read = world.core.new_read(session, None, None)
        opening = Operation(world, _plans.open_read(world.core, session, read))
        for _ in range(point):
            if not opening.done:
                opening.advance(Random(CHANCE))
        reported = len(lost_writes(world))
        world.core.failed("a", ConnectionError("lost"))
        opening.finish(Random(CHANCE))
        if opening.result is not None:
            close_read(world, session, opening.result)
        assert len(lost_writes(world)) <= 1
        assert reported <= len(lost_writes(world))
        assert (opening.result is None) or lost_writes(world)
        world.check_idle()


# What is not known to be lost


@pytest.mark.parametrize("level", [CAUSAL, READ_YOUR_WRITES])
@pytest.mark.parametrize("lost", [True, False])
def test_without_a_history_the_token_is_replaced_without_a_word(
    lost: bool, level: Consistency
) -> None:
    """The primary serves once, and a warning says which privilege is missing; no event does."""
    world, token = failed_over(lost=lost, history=False)
    for _ in range(3):
        session = Session(token)
        lease = open_read(world, session, level).result
        assert (True, Reason.TIMELINE_CHANGED) == (lease.route.is_primary, lease.route.reason)
        close_read(world, session, lease)
        assert end_of(world) == held(session)
        again = open_read(world, session, level).result
        assert Reason.CAUGHT_UP is again.route.reason
        close_read(world, session, again)
    assert [] == lost_writes(world)
    assert 1 == len(world.warnings)
    assert "REPLICATION" in world.warnings[0]
    assert "timeline 2" in world.warnings[0]


def test_a_choice_replaces_a_token_that_cannot_be_proven() -> None:
    """No read follows that would: the session of a choice moves to the new timeline as well."""
    world, token = failed_over(lost=False, history=False)
    session = Session(token)
    assert Reason.TIMELINE_CHANGED is choose(world, session).result.reason
    assert end_of(world) == held(session)
    assert Reason.CAUGHT_UP is choose(world, session).result.reason
    assert ([], 1) == (lost_writes(world), len(world.warnings))


def test_a_warning_for_each_timeline_whose_history_is_not_known() -> None:
    """A second failover is another one to know of."""
    world, token = failed_over(history=False)
    open_read(world, Session(token))
    primary_of(world).stop()
    server_of(world, "b").promote(3)
    probe_all(world)
    for _ in range(2):
        open_read(world, Session(token))
    assert ["timeline 2", "timeline 3"] == [
        f"timeline {number}" for number, text in enumerate(world.warnings, 2) if str(number) in text
    ]
    assert 2 == len(world.warnings)


def test_a_token_that_survived_the_failover_is_served_by_a_replica() -> None:
    """Proven by the history: no primary, no wait, no word; and the session moves on."""
    world, token = failed_over(lost=False)
    for level in (CAUSAL, READ_YOUR_WRITES):
        session = Session(token)
        lease = open_read(world, session, level).result
        assert (False, Reason.CAUGHT_UP) == (lease.route.is_primary, lease.route.reason)
        close_read(world, session, lease)
        expected = 2 if level is CAUSAL else 1
        assert expected == held(session).timeline
    assert ([], []) == (lost_writes(world), world.warnings)


def test_a_replica_without_the_position_does_not_serve_after_the_failover() -> None:
    """Caught up is still caught up: on the new timeline, at the token's LSN."""
    world, _ = failed_over(lost=False)
    session = Session(Token([Position(SYSTEM, 1, Lsn(primary_of(world).log.ancestors[1]))]))
    for name in "bc":
        server = server_of(world, name)
        server.replay = held(session).lsn - 64
        server.paused = True
    probe_all(world)
    lease = open_read(world, session).result
    assert (True, Reason.NOT_CAUGHT_UP) == (lease.route.is_primary, lease.route.reason)


def test_a_replica_that_is_behind_has_lost_nothing() -> None:
    """A forced read of it shows less than the session holds: no word, and the session stays."""
    world = ready_world()
    commit(world)
    session = Session(Token([end_of(world)]))
    for server in world.servers:
        server.paused = True
    read = world.core.new_read(session, None, None)
    lease = run(world, _plans.open_forced(world.core, session, read, "b")).result
    close_read(world, session, lease)
    assert [] == lost_writes(world)
    assert end_of(world) == held(session)


def test_replicas_are_compared_once_and_that_is_no_refresh() -> None:
    """A plain role's replicas, the primary gone: they serve once all are seen to be standbys."""
    world = ready_world()
    for server in world.servers:
        server.timeline_known, server.restartpoint = False, 1
    # The one that was seen first does not have the position, so no other was seen after the rest.
    server_of(world, "a").paused = True
    commit(world)
    replicate(world)
    session = Session(Token([end_of(world)]))
    primary_of(world).stop()
    for _ in range(4):
        for name in world.endpoints:
            world.pass_time(1.0)
            world.probe(name, Random(CHANCE))
    read = world.core.new_read(session, None, None)
    operation = Operation(world, _plans.open_read(world.core, session, read))
    asked: list[str] = []
    while not operation.done:
        if isinstance(operation.step, AwaitObservation) and operation.step.node not in asked:
            asked.append(operation.step.node)
        operation.advance(Random(CHANCE))
    assert Reason.PRIMARY_DOWN is operation.result.route.reason
    assert ["b", "a", "c"] == asked
    assert (True, False) == (read.compared, read.refreshed)


# What others do to the session meanwhile


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("level", [CAUSAL, READ_YOUR_WRITES])
@pytest.mark.parametrize("when", ["during the opening", "during the read"])
def test_a_concurrent_advance_is_never_lost(loss: str, level: Consistency, when: str) -> None:
    """Another task of the session writes while its lost position is being replaced."""
    world, token = LOSSES[loss]()
    session = Session(token)
    read = world.core.new_read(session, None, level)
    opening = Operation(world, _plans.open_read(world.core, session, read))
    while not isinstance(opening.step, Checkout):
        opening.advance(Random(CHANCE))
    written: Position | None = None

    def write() -> None:
        nonlocal written
        other = run(world, _writes.open_write(world.core, session)).result
        done = primary_of(world).log.commit(world.now, asynchronous=True)
        run(world, _writes.close_write(world.core, session, other, interrupted=False))
        written = Position(SYSTEM, primary_of(world).log.timeline, Lsn(done.end))

    if when == "during the opening":
        write()
    lease = opening.finish(Random(CHANCE)).result
    if when == "during the read":
        write()
    close_read(world, session, lease)
    assert written is not None
    assert held(session).timeline == written.timeline
    assert held(session).lsn >= written.lsn
    assert held(session) == Position(SYSTEM, written.timeline, Lsn(primary_of(world).log.insert))
    assert session.token.pin_until is None


def test_positions_of_other_systems_are_kept() -> None:
    """A relayed token of another database, and a pin, survive the replacement."""
    world, token = failed_over()
    other = Position(SYSTEM + 1, 3, Lsn(77))
    session = Session(token.merge(Token([other])))
    close_read(world, session, open_read(world, session).result)
    assert other == session.token.get(other.system_id)
    assert 2 == held(session).timeline


# A write, a capture, a read of the primary


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("what", ["write", "capture", "strong", "pinned"])
def test_what_goes_to_the_primary_anyway_reports_a_lost_write_too(loss: str, what: str) -> None:
    """Once, and the session covers the new write at the primary's position, not at the lost one."""
    world, token = LOSSES[loss]()
    primary = primary_of(world)
    session = Session(token)
    lost = held(session)
    if what == "pinned":
        session.pin(world.core.unix_clock() + 5.0)
    done = 0
    if what == "write":
        lease = run(world, _writes.open_write(world.core, session)).result
        done = commit(world)
        run(world, _writes.close_write(world.core, session, lease, interrupted=False))
    elif what == "capture":
        done = primary.log.insert
        run(world, _writes.capture(world.core, session))
    else:
        level = Consistency.STRONG if what == "strong" else CAUSAL
        lease = open_read(world, session, level).result
        assert Reason.PRIMARY_REQUIRED is lease.route.reason
        close_read(world, session, lease)
    at_end = done if done else primary.log.insert
    now = Position(SYSTEM, primary.log.timeline, Lsn(at_end))
    # A commit can reach the very place where the lost one stood: then nothing tells them apart.
    if now.timeline == lost.timeline and now.lsn >= lost.lsn:
        assert [] == lost_writes(world)
    else:
        assert [lost] == [event.position for event in lost_writes(world)]
    assert now == held(session)


def test_a_write_beyond_the_lost_position_is_not_reported() -> None:
    """A log that went on cannot be told from one that never lost anything: docs/limits.md."""
    world, token = crashed()
    session = Session(token)
    lease = run(world, _writes.open_write(world.core, session)).result
    for _ in range(3):
        done = primary_of(world).log.commit(world.now, asynchronous=False)
    run(world, _writes.close_write(world.core, session, lease, interrupted=False))
    assert [] == lost_writes(world)
    assert Position(SYSTEM, 1, Lsn(done.end)) == held(session)


def test_a_write_that_is_overtaken_by_another_of_its_session_has_lost_nothing() -> None:
    """The other one's position is from after the observation that does not reach it."""
    world = ready_world()
    session = Session(Token([end_of(world)]))
    lease = run(world, _writes.open_write(world.core, session)).result
    commit(world)
    closing = Operation(world, _writes.close_write(world.core, session, lease, interrupted=False))
    # The server has answered, and the answer is on its way.
    closing.advance(Random(CHANCE))
    commit(world)
    session.advance(Token([end_of(world)]))
    closing.finish(Random(CHANCE))
    assert [] == lost_writes(world)
    assert end_of(world) == held(session)


def test_a_write_of_a_session_far_ahead_of_the_primary() -> None:
    """A backup was restored, or the token is of another copy: the write's position counts."""
    world = ready_world()
    ahead = Position(SYSTEM, 1, Lsn(10**9))
    session = Session(Token([ahead]))
    lease = run(world, _writes.open_write(world.core, session)).result
    done = primary_of(world).log.commit(world.now, asynchronous=False)
    run(world, _writes.close_write(world.core, session, lease, interrupted=False))
    assert [LostWrite(ahead, 1, Lsn(done.end))] == lost_writes(world)
    assert Position(SYSTEM, 1, Lsn(done.end)) == held(session)
    replicate(world)
    assert Reason.CAUGHT_UP is open_read(world, session).result.route.reason


# A process that has not seen the promotion yet


@pytest.mark.parametrize("what", ["capture", "forced"])
def test_a_newer_position_is_never_given_up_for_a_former_primarys(what: str) -> None:
    """The process knows the former primary only; the session has seen the new one."""
    world = ready_world()
    commit(world)
    newer = Position(SYSTEM, 2, Lsn(64))
    session = Session(Token([newer]))
    if what == "capture":
        run(world, _writes.capture(world.core, session))
    else:
        read = world.core.new_read(session, None, None)
        forced = _plans.open_forced(world.core, session, read, "primary")
        close_read(world, session, run(world, forced).result)
    assert [] == lost_writes(world)
    assert newer == held(session)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_former_primary_is_no_bound_for_what_a_newer_timeline_has_shown(
    streaming: bool,
) -> None:
    """Its standbys follow the new one already: the session remembers that, and is pinned."""
    world = ready_world()
    promoted = server_of(world, "a")
    promoted.promote(2)
    log = promoted.log
    log.commit(world.now, asynchronous=False)
    promoted.stop()
    for name in "bc":
        server_of(world, name).follow(log)
    replicate(world)
    server_of(world, "b").streaming = streaming
    # Its log has gone further than the new one.
    for _ in range(5):
        server_of(world, "p").log.commit(world.now, asynchronous=False)
    probe_all(world)
    assert 1 == world.core.cluster.timeline
    session = Session()
    read = world.core.new_read(session, None, None)
    lease = run(world, _plans.open_forced(world.core, session, read, "b")).result
    assert log.commits[-1] in lease.conn.server.visible()
    close_read(world, session, lease)
    assert Position(SYSTEM, 2, Lsn(log.flush)) == held(session)
    assert session.token.pin_until is not None


def test_a_former_primary_takes_no_write_of_a_session_that_has_seen_the_new_one() -> None:
    """Writes follow reads: all nodes are looked at, then the write is refused."""
    world = ready_world()
    newer = Position(SYSTEM, 2, Lsn(64))
    session = Session(Token([newer]))
    opened = run(world, _writes.open_write(world.core, session))
    assert isinstance(opened.error, NoNodeAvailableError)
    assert "timeline 2" in str(opened.error)
    world.check_idle()
    server_of(world, "a").promote(2)
    lease = run(world, _writes.open_write(world.core, session)).result
    assert lease.conn.server is server_of(world, "a")


# Standbys that say less than they follow


def behind_the_name(world: Simulation) -> None:
    """Let the role see no more of b and c than their last restartpoint, on timeline 1."""
    cluster = world.core.cluster
    for name in "bc":
        server = server_of(world, name)
        server.timeline_known, server.restartpoint = False, 1
        seen = cluster.nodes[name].newest
        assert seen is not None
        cluster.learn(name, seen.server, 2, None)


@pytest.mark.parametrize("before", [None, 1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_what_a_read_has_shown_is_told_on_the_timeline_that_is_followed(
    before: int | None, shared: bool
) -> None:
    """The last observation says timeline 1 of log of timeline 2: no loss, and no position less."""
    world, token = failed_over(lost=False)
    behind_the_name(world)
    commit(world)
    replicate(world)
    assert 2 == len([s for s in world.servers if not s.is_primary and s.alive])
    session = Session({None: Token(), 1: token, 2: Token([end_of(world)])}[before])
    lease = open_read(world, session).result
    assert not lease.route.is_primary
    shown = lease.conn.server.visible()[-1]
    cluster = world.core.cluster
    if shared:
        cluster.enter(cluster.nodes[lease.node], fallback=False)
    close_read(world, session, lease)
    assert (2, True) == (held(session).timeline, held(session).lsn >= shown.end)
    close_read(world, session, open_read(world, session).result)
    assert [] == lost_writes(world)


@pytest.mark.parametrize("held_back", ["paused", "delayed"])
@pytest.mark.parametrize("way", ["forced", "another session's"])
def test_a_standby_in_the_shared_part_gives_no_lesser_position(held_back: str, way: str) -> None:
    """It follows timeline 2 and shows log from before it: that must not outrank (1, X)."""
    world, _ = failed_over(lost=False)
    switch = primary_of(world).log.ancestors[1]
    lagging = server_of(world, "b")
    lagging.replay = switch - 128
    setattr(lagging, held_back, True)
    session = Session(Token([Position(SYSTEM, 1, Lsn(switch))]))
    reader = session if way == "forced" else Session()
    probe_all(world)
    read = world.core.new_read(reader, None, None)
    lease = run(world, _plans.open_forced(world.core, reader, read, "b")).result
    close_read(world, reader, lease)
    session.advance(reader.token)
    for name in ("b", "c"):
        server = server_of(world, name)
        server.replay, server.receive, server.paused = switch - 64, switch - 64, True
    probe_all(world)
    again = open_read(world, session).result
    assert again.route.is_primary


def test_a_stale_read_after_a_failover_does_not_lower_the_session() -> None:
    """A lagging replica serves, flagged as stale: the session's own write stays asked for."""
    world, _ = failed_over(
        lost=False, history=False, max_fallback_reads=1, on_fallback_limit="stale"
    )
    switch = primary_of(world).log.ancestors[1]
    session = Session(Token([Position(SYSTEM, 1, Lsn(switch))]))
    for name in "bc":
        server = server_of(world, name)
        server.replay, server.paused = switch - 128, True
    probe_all(world)
    cluster = world.core.cluster
    assert cluster.primary is not None
    cluster.enter(cluster.primary, fallback=True)
    lease = open_read(world, session, READ_YOUR_WRITES).result
    assert lease.route.stale
    close_read(world, session, lease)
    cluster.leave(cluster.primary, fallback=True)
    for name in "bc":
        server_of(world, name).replay = switch - 64
    probe_all(world)
    learn(world)
    again = open_read(world, session, READ_YOUR_WRITES).result
    assert again.route.is_primary


def test_an_error_of_the_last_look_does_not_hide_the_lost_write() -> None:
    """The connection dies while the error is on its way: it is raised, and nothing is left."""
    world, token = failed_over(on_lost_write="error")
    session = Session(token)
    read = world.core.new_read(session, None, None)
    opening = Operation(world, _plans.open_read(world.core, session, read))
    while not lost_writes(world):
        opening.advance(Random(CHANCE))
    assert isinstance(opening.step, Fetch)
    opening.step.conn.closed = True
    failure = NodeFailure(ConnectionError("lost"))
    opening._go(lambda: opening.plan.throw(failure))
    opening.finish(Random(CHANCE))
    assert isinstance(opening.error, LostWriteError)
    assert 1 == len(lost_writes(world))
    assert isinstance(opening.result, Lease | None)
    world.check_idle()


def test_a_standby_that_may_have_gone_over_gives_no_position_of_the_old_timeline() -> None:
    """It says timeline 1 still, and can have shown log of timeline 2: the primary is asked."""
    world, _ = failed_over(lost=False)
    for name in "bc":
        server = server_of(world, name)
        server.timeline_known, server.restartpoint = False, 1
        server.crash(0.0)
    probe_all(world)
    replicate(world)
    newest = world.core.cluster.nodes["b"].newest
    assert newest is not None
    assert 1 == newest.timeline
    session = Session()
    read = world.core.new_read(session, None, None)
    lease = run(world, _plans.open_forced(world.core, session, read, "b")).result
    close_read(world, session, lease)
    assert end_of(world) == held(session)
    close_read(world, session, open_read(world, session).result)
    assert [] == lost_writes(world)


# A process that was started while the primary was down


@pytest.mark.parametrize("timeline", [1, 2])
def test_what_the_session_holds_tells_where_its_timeline_has_begun(timeline: int) -> None:
    """Nobody else knows: reads of a session on the same timeline go on without a pin."""
    former, _ = failed_over()
    ends = end_of(former)
    primary_of(former).stop()
    for name in "bc":
        server_of(former, name).replay = ends.lsn
    world = Simulation(
        [Endpoint(name, list(each.servers)) for name, each in former.endpoints.items()]
    )
    for _ in range(3):
        probe_all(world)
    token = Token([ends._replace(timeline=timeline)])
    session = Session(token)
    opened = open_read(world, session)
    if timeline == 1:
        assert isinstance(opened.error, RoutingError)
        return
    assert Reason.PRIMARY_DOWN is opened.result.route.reason
    close_read(world, session, opened.result)
    assert held(session) >= ends
    assert session.token.pin_until is None
    again = open_read(world, session).result
    assert Reason.PRIMARY_DOWN is again.route.reason


def test_what_it_holds_on_another_timeline_tells_nothing() -> None:
    """A standby may stand on either side of the switch point: pinned, not guessed."""
    former, token = failed_over(lost=False)
    primary_of(former).stop()
    world = Simulation(
        [Endpoint(name, list(each.servers)) for name, each in former.endpoints.items()]
    )
    for _ in range(3):
        probe_all(world)
    session = Session(token)
    read = world.core.new_read(session, None, None)
    lease = run(world, _plans.open_forced(world.core, session, read, "b")).result
    close_read(world, session, lease)
    assert token.positions == session.token.positions
    assert session.token.pin_until is not None
