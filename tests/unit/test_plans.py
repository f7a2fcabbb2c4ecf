"""The plans, one rule at a time; and every point at which a plan can be cancelled or can fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from lsn_consistency import (
    Consistency,
    Position,
    Reason,
    Session,
    Token,
    _endings,
    _plans,
    _sql,
    _writes,
)
from lsn_consistency import consistency as at_level
from lsn_consistency._connections import READY_SECONDS
from lsn_consistency._core import POOL_TIMEOUT_SECONDS
from lsn_consistency._leases import Lease
from lsn_consistency._nodes import MANY_READS
from lsn_consistency._steps import (
    AwaitObservation,
    AwaitPosition,
    AwaitTurn,
    Checkout,
    Fetch,
    NodeFailure,
    SetReadOnly,
)
from lsn_consistency.events import FallbackLimited, LagExceeded, PositionUnknown, ReadRouted
from lsn_consistency.exceptions import (
    ConfigurationError,
    FallbackLimitError,
    NoNodeAvailableError,
    ReplayTimeoutError,
)
from lsn_consistency.lsn import Lsn
from tests.properties.fake_cluster import UNIX_EPOCH, Operation, Simulation
from tests.properties.test_plan_machine import PIN, Client, ReadWork, Work, WriteWork, make_world
from tests.simulation.servers import SYSTEM

CHANCE = 7


def ready_world(**options: Any) -> Simulation:
    """Build a cluster whose replicas have everything, and that was probed."""
    world = make_world(**options)
    for server in world.servers:
        if server.is_primary:
            server.log.commit(world.now, asynchronous=False)
    for server in world.servers:
        server.replicate(1.0, 1.0)
    world.probe_all(Random(CHANCE))
    return world


def token_now(world: Simulation) -> Token:
    """Return the primary's position, by the truth."""
    primary = next(server for server in world.servers if server.is_primary)
    return Token([Position(SYSTEM, primary.log.timeline, Lsn(primary.log.insert))])


def commit(world: Simulation) -> None:
    """Commit on the primary; no replica has it yet."""
    next(s for s in world.servers if s.is_primary).log.commit(world.now, asynchronous=False)


def run(world: Simulation, plan: Any) -> Operation:
    """Run a plan to its end."""
    return Operation(world, plan).finish(Random(CHANCE))


def open_read(world: Simulation, session: Session, level: Consistency | None = None) -> Operation:
    """Open a read of the session."""
    return run(world, _plans.Reading(None, level, None).open(world.core, session))


def close_read(world: Simulation, session: Session, lease: Lease) -> Operation:
    """Close a read that ended well."""
    lease.conn.in_transaction = False
    return run(world, _endings.close_read(world.core, session, lease, interrupted=False))


# What can be cancelled, and what can fail


def _plain(world: Simulation) -> Work:
    return ReadWork(world, Client(), Consistency.CAUSAL)


def _behind(world: Simulation) -> Work:
    commit(world)
    return ReadWork(world, Client(Session(token_now(world))), Consistency.CAUSAL)


def _too_late(world: Simulation) -> Work:
    world.pass_time(20.0)
    commit(world)
    return ReadWork(world, Client(), Consistency.CAUSAL)


def _limited(world: Simulation) -> Work:
    cluster = world.core.cluster
    cluster.enter(cluster.nodes["primary"], fallback=True)
    return _behind(world)


def _strong(world: Simulation) -> Work:
    return ReadWork(world, Client(), Consistency.STRONG)


def _forced(world: Simulation) -> Work:
    return ReadWork(world, Client(), Consistency.CAUSAL, forced="a")


def _shared(world: Simulation) -> Work:
    for node in world.core.cluster.all_nodes:
        world.core.cluster.enter(node, fallback=False)
    return ReadWork(world, Client(), Consistency.CAUSAL)


def _write(world: Simulation) -> Work:
    return WriteWork(world, Client(), Consistency.CAUSAL)


def _crashed(world: Simulation) -> Work:
    for server in world.servers:
        if not server.is_primary:
            server.crash(1.0, postmaster=False)
    return ReadWork(world, Client(Session(token_now(world))), Consistency.CAUSAL)


def _lost(world: Simulation) -> Work:
    primary = next(s for s in world.servers if s.is_primary)
    primary.log.commit(world.now, asynchronous=True)
    client = Client(Session(token_now(world)))
    primary.crash(1.0)
    world.probe_all(Random(CHANCE))
    world.probe_all(Random(CHANCE))
    return ReadWork(world, client, Consistency.READ_YOUR_WRITES)


def _failed_over(world: Simulation) -> Work:
    commit(world)
    client = Client(Session(token_now(world)))
    promoted = next(s for s in world.servers if s.name == "a")
    world.endpoints["primary"].servers[0].stop()
    promoted.promote(2)
    world.probe_all(Random(CHANCE))
    return ReadWork(world, client, Consistency.CAUSAL)


SITUATIONS: dict[str, Callable[[Simulation], Work]] = {
    "caught up": _plain,
    "behind": _behind,
    "too late": _too_late,
    "limited": _limited,
    "strong": _strong,
    "forced": _forced,
    "shared": _shared,
    "write": _write,
    "crashed": _crashed,
    "lost": _lost,
    "failed over": _failed_over,
}
WORLDS: dict[str, dict[str, Any]] = {
    "own pools": {},
    "autocommit": {"autocommit": True},
    "given": {"given": True},
    "given, autocommit": {"given": True, "autocommit": True, "own_read_only": False},
    "hidden": {"hidden": True},
    "pooled": {"pooled": True, "given": True},
    "wait for a turn": {"max_fallback_reads": 1, "fallback_wait_seconds": 0.1},
    "stale": {"max_fallback_reads": 1, "on_fallback_limit": "stale"},
    "lost is an error": {"on_lost_write": "error"},
}


def _begin(world_name: str, situation: str) -> tuple[Work, dict[str, int], int]:
    world = ready_world(**WORLDS[world_name])
    cluster = world.core.cluster
    work = SITUATIONS[situation](world)
    taken = {node.name: 0 for node in cluster.all_nodes}
    fallbacks = 0
    if situation == "limited":
        taken["primary"], fallbacks = 1, 1
    if situation == "shared":
        taken = dict.fromkeys(taken, 1)
    return work, taken, fallbacks


def _disturb(
    world_name: str, situation: str, disturb: Callable[[Operation], bool]
) -> Iterator[tuple[Work, int]]:
    """Run the work again and again, disturbed at its first step, its second, and so on."""
    for point in range(400):
        work, taken, fallbacks = _begin(world_name, situation)
        chance = Random(CHANCE)
        reached = 0
        last: tuple[Operation, int] | None = None
        for _ in range(3000):
            if work.finished:
                break
            here = (work.operation, work.operation.steps)
            if here != last:
                last = here
                if reached == point and disturb(work.operation):
                    work.turn(chance)
                    reached += 1
                    continue
                reached += 1
            work.advance(chance)
        assert work.finished
        cluster = work.world.core.cluster
        for name, count in taken.items():
            for _ in range(count):
                cluster.leave(cluster.nodes[name], fallback=name == "primary" and fallbacks > 0)
        work.world.check_idle()
        yield work, point
        if reached <= point:
            return


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_cancelled_at_any_step_gives_back_all_and_forgets_no_position(
    situation: str, world: str, late: bool
) -> None:
    """At every single step a cancellation leaves no connection, count, waiter or doubt behind."""

    def cancel(operation: Operation) -> bool:
        operation.interrupt(asyncio.CancelledError(), late=late)
        return True

    points = 0
    for work, point in _disturb(world, situation, cancel):
        points = max(points, point)
        # The promise about the session is held by the work itself, in `closed`.
        assert work.finished
    assert points >= 2


@pytest.mark.parametrize("down", [True, False], ids=["down", "busy"])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_failure_at_any_step_gives_back_all_and_forgets_no_position(
    situation: str, world: str, down: bool
) -> None:
    """A step that fails on its node, wherever it is, costs nothing but another attempt."""
    failed: list[str] = []

    def fail(operation: Operation) -> bool:
        step = operation.step
        if not isinstance(step, (Checkout, Fetch)):
            return False
        failed.append(step.node if isinstance(step, Checkout) else step.conn.endpoint.name)
        if isinstance(operation.step, Fetch):
            operation.step.conn.closed = True
        operation._go(lambda: operation.plan.throw(NodeFailure(ConnectionError("x"), down=down)))
        return True

    points = 0
    primary = "a" if situation == "failed over" else "primary"
    for work, point in _disturb(world, situation, fail):
        points = max(points, point)
        if failed and failed.pop() != primary and situation != "forced":
            limited = isinstance(work.operation.error, FallbackLimitError)
            assert work.lease is not None or limited
    assert points >= 2


# A read's rules


def test_a_connection_older_than_the_last_crash_is_asked_itself() -> None:
    """What was observed before a connection was opened says nothing about its server."""
    world = ready_world()
    token = token_now(world)
    server = next(s for s in world.servers if s.name == "a")
    server.crash(1.0, postmaster=False)
    read = world.core.new_read(Session(token), None, None)
    for name in ("b", "c"):
        read.excluded = read.excluded | {name}
    opened = run(world, _plans.open_read(world.core, Session(token), read))
    assert opened.result.route.is_primary


def test_a_fresh_observation_of_the_monitor_saves_the_question() -> None:
    """An observation made after the connection was opened counts for it, at no round trip."""
    world = ready_world()
    session = Session(token_now(world))
    lease = open_read(world, session).result
    close_read(world, session, lease)
    world.probe_all(Random(CHANCE))
    read = world.core.new_read(session, None, None)
    operation = Operation(world, _plans.open_read(world.core, session, read))
    steps = []
    while not operation.done:
        steps.append(type(operation.step))
        operation.advance(Random(CHANCE))
    assert [Checkout] == steps
    assert operation.result.conn is lease.conn


def test_an_overdue_observation_makes_the_read_ask() -> None:
    """When the next probe is overdue, the server is suspect and the connection is asked."""
    world = ready_world()
    facts = world.core.facts_of(open_read(world, Session()).result.conn)
    assert facts is not None
    fresh = world.core.poll_seconds + 0.25
    seen = world.core.cluster.nodes[facts.node].newest
    assert seen is not None
    assert seen is world.core.usable(facts, seen.received_at + fresh)
    assert world.core.usable(facts, seen.received_at + fresh + 0.01) is None


def test_an_observation_from_before_the_connection_does_not_count() -> None:
    """The time of an observation is when it was sent, that of a connection when it was there."""
    world = ready_world()
    lease = open_read(world, Session()).result
    facts = world.core.facts_of(lease.conn)
    seen = world.core.cluster.nodes[lease.node].newest
    assert facts is not None
    assert seen is not None
    facts.opened_at = seen.sent_at
    assert seen is world.core.usable(facts, world.now)
    facts.opened_at = seen.sent_at + 1e-9
    assert world.core.usable(facts, world.now) is None


def test_a_connection_from_before_a_failure_answers_once_before_it_is_believed() -> None:
    """Its node is well again, which says nothing of a connection whose network is gone."""
    world = ready_world()
    lease = open_read(world, Session()).result
    facts = world.core.facts_of(lease.conn)
    assert facts is not None
    world.core.failed(lease.node, ConnectionError("no answer"))
    world.pass_time(0.1)
    world.probe(lease.node, Random(CHANCE))
    assert world.core.cluster.nodes[lease.node].newest is not None
    assert world.core.usable(facts, world.now) is None
    close_read(world, Session(), lease)
    assert facts.answered_at > world.core.cluster.nodes[lease.node].failed_at
    assert world.core.usable(facts, world.now) is not None


def test_after_a_failure_each_connection_is_asked_once() -> None:
    """Its answer counts for the reads that follow, also where nothing is asked at their end."""
    world = ready_world()
    session = Session(token_now(world))
    level = Consistency.READ_YOUR_WRITES
    lease = open_read(world, session, level).result
    close_read(world, session, lease)
    world.core.failed(lease.node, ConnectionError("no answer"))
    world.pass_time(0.1)
    world.probe(lease.node, Random(CHANCE))
    session.node = lease.node
    asked = []
    for _ in range(3):
        read = world.core.new_read(session, None, level)
        operation = Operation(world, _plans.open_read(world.core, session, read))
        steps = []
        while not operation.done:
            steps.append(type(operation.step))
            operation.advance(Random(CHANCE))
        assert operation.result.conn is lease.conn
        asked.append(Fetch in steps)
        close_read(world, session, operation.result)
    assert [True, False, False] == asked


def test_no_observation_counts_behind_a_pooler() -> None:
    """A pooler outlives its server, so each read asks within its own transaction."""
    world = ready_world(pooled=True)
    session = Session(token_now(world))
    read = world.core.new_read(session, None, None)
    read.excluded |= {"a"}
    opened = run(world, _plans.open_read(world.core, session, read))
    assert opened.result.node == "x"
    assert opened.result.facts.pooled
    assert opened.result.conn.in_transaction
    assert world.core.usable(opened.result.facts, world.now) is None


def test_a_replica_with_a_full_pool_is_left_for_another() -> None:
    """A pool that is busy excludes its node for this read, and is no failure of the node."""
    world = ready_world(connect_timeout=0.1)
    for name in ("a", "b"):
        world.endpoints[name].full = True
    session = Session(token_now(world))
    lease = open_read(world, session).result
    assert ("c", Reason.CAUGHT_UP) == (lease.node, lease.route.reason)
    assert [0, 0] == [world.core.cluster.nodes[name].failures for name in ("a", "b")]


def test_a_busy_primary_raises_the_pools_own_error() -> None:
    """A full pool does not make the primary unreachable: the caller gets the pool's error."""
    world = ready_world()
    world.endpoints["primary"].full = True
    before = world.now
    opened = open_read(world, Session(), Consistency.STRONG)
    assert isinstance(opened.error, TimeoutError)
    assert POOL_TIMEOUT_SECONDS <= world.now - before < POOL_TIMEOUT_SECONDS + 1.0


def test_a_pool_that_takes_no_more_clients_is_asked_once() -> None:
    """It refuses at once, as psycopg_pool does above ``max_waiting``: so does the write."""
    world = ready_world()
    operation = Operation(world, _writes.open_write(world.core, Session()))
    assert isinstance(operation.step, Checkout)
    refusal = TimeoutError("too many")
    operation._go(lambda: operation.plan.throw(NodeFailure(refusal, down=False)))
    assert operation.error is refusal
    world.check_idle()


def test_a_pool_that_stays_full_is_given_up_after_its_own_time() -> None:
    """Also where each part of the wait takes a little longer than it was given."""
    world = ready_world(connect_timeout=2.0)
    operation = Operation(world, _writes.open_write(world.core, Session()))
    full = TimeoutError("full")
    waited: list[float] = []
    while not operation.done and len(waited) < 100:
        waited.append(operation.step.timeout)
        world.pass_time(waited[-1] + 0.001)
        operation._go(lambda: operation.plan.throw(NodeFailure(full, down=False)))
    assert operation.error is full
    assert 2.0 == max(waited)
    assert POOL_TIMEOUT_SECONDS - 0.1 <= sum(waited) <= POOL_TIMEOUT_SECONDS
    world.check_idle()


@pytest.mark.parametrize("role", ["primary", "replica"])
def test_nobody_is_left_waiting_for_the_pool_of_a_primary_that_is_gone(role: str) -> None:
    """Its pool is full and its server fails; if another is the primary by then, that serves."""
    world = ready_world()
    world.endpoints["primary"].full = True
    session = Session(token_now(world))
    read = world.core.new_read(session, None, Consistency.STRONG)
    operation = Operation(world, _plans.open_read(world.core, session, read))
    while not isinstance(operation.step, Checkout):
        operation.advance(Random(CHANCE))
    world.endpoints["primary"].servers[0].stop()
    if role == "replica":
        next(s for s in world.servers if s.name == "a").promote(2)
    world.probe_all(Random(CHANCE))
    before = world.now
    operation.finish(Random(CHANCE))
    assert world.now - before < 10.0
    if role == "replica":
        assert "a" == operation.result.node
    else:
        assert isinstance(operation.error, NoNodeAvailableError)


@pytest.mark.parametrize(
    ("failures", "answers", "expected"),
    [(0, True, 2.0), (1, False, 2.0), (4, False, READY_SECONDS), (4, True, 2.0)],
)
def test_a_primary_that_has_gone_on_failing_is_asked_by_its_monitor(
    failures: int, answers: bool, expected: float
) -> None:
    """Nobody waits for a connection to it: one probe for all tells whether it is back."""
    world = ready_world(connect_timeout=2.0)
    primary = world.endpoints["primary"].servers[0]
    primary.alive = False
    for _ in range(failures):
        world.pass_time(0.1)
        world.probe("primary", Random(CHANCE))
    assert failures == world.core.cluster.nodes["primary"].failures
    primary.alive = answers
    operation = Operation(world, _writes.open_write(world.core, Session()))
    asked = set()
    while not isinstance(operation.step, Checkout):
        asked.add(type(operation.step))
        operation.advance(Random(CHANCE))
    assert ({AwaitObservation} if failures == 4 else set()) == asked
    assert expected == operation.step.timeout
    operation.finish(Random(CHANCE))
    assert answers == (operation.error is None)


def test_one_replica_a_session() -> None:
    """A session stays with its replica while that satisfies it."""
    world = ready_world()
    session = Session()
    nodes = set()
    for _ in range(8):
        lease = open_read(world, session).result
        nodes.add(lease.node)
        close_read(world, session, lease)
    assert nodes == {session.node}


def test_a_wait_ends_with_the_replica_that_reaches_the_token() -> None:
    """A read waits for its token and is served as soon as a replica has it."""
    world = ready_world()
    commit(world)
    session = Session(token_now(world))
    operation = Operation(
        world, _plans.open_read(world.core, session, world.core.new_read(session, None, None))
    )
    assert isinstance(operation.step, AwaitPosition)
    operation.advance(Random(CHANCE))
    for server in world.servers:
        server.replicate(1.0, 1.0)
    lease = operation.finish(Random(CHANCE)).result
    assert lease.route.reason is Reason.CAUGHT_UP
    assert 0.0 < lease.route.waited_seconds < 0.1


def test_without_a_replica_in_time_the_primary_serves_after_the_wait() -> None:
    """No read waits longer than its limit."""
    world = ready_world()
    commit(world)
    session = Session(token_now(world))
    before = world.now
    lease = open_read(world, session).result
    assert ("primary", Reason.NOT_CAUGHT_UP) == (lease.node, lease.route.reason)
    assert 0.1 <= lease.route.waited_seconds <= world.now - before <= 0.2
    assert session.last_route is lease.route


def test_probes_that_release_a_wait_in_vain_do_not_end_it() -> None:
    """A replica that has the token and cannot serve does not use up the wait of the others."""
    world = ready_world(wait_seconds=1.0, max_lag_seconds=3.0)
    commit(world)
    for server in world.servers:
        server.replicate(1.0, float(server.name == "a"))
    world.endpoints["a"].full = True
    world.probe_all(Random(CHANCE))
    session = Session(token_now(world))
    lease = open_read(world, session).result
    assert ("primary", Reason.NOT_CAUGHT_UP) == (lease.node, lease.route.reason)
    assert lease.route.waited_seconds >= 1.0


def test_not_waiting_still_looks_once() -> None:
    """With ``wait_seconds=0`` each replica is looked at anew before the primary serves."""
    world = ready_world(wait_seconds=0)
    commit(world)
    session = Session(token_now(world))
    for server in world.servers:
        server.replicate(1.0, 1.0)
    assert open_read(world, session).result.route.reason is Reason.CAUGHT_UP


def test_with_the_primary_gone_and_the_token_nowhere_the_read_fails() -> None:
    """Nobody can serve it: `ReplayTimeoutError` carries the position."""
    world = ready_world()
    commit(world)
    session = Session(token_now(world))
    world.endpoints["primary"].servers[0].stop()
    world.probe("primary", Random(CHANCE))
    error = open_read(world, session).error
    assert isinstance(error, ReplayTimeoutError)
    assert error.position == session.token.get(SYSTEM)


def test_a_replica_on_a_newer_timeline_has_the_new_primary_looked_for() -> None:
    """The promoted server was down when it was asked last, and its monitor has given up for now."""
    world = ready_world(wait_seconds=0)
    session = Session(token_now(world))
    old, first, promoted, second = world.servers
    promoted.stop()
    old.stop()
    for _ in range(8):
        world.probe_all(Random(CHANCE))
    promoted.alive = True
    promoted.promote(2)
    for name, follower in (("a", first), ("c", second)):
        follower.follow(promoted.log)
        for _ in range(2):
            world.pass_time(0.01)
            world.probe(name, Random(CHANCE))
    assert world.core.cluster.nodes["b"].newest is None
    route = open_read(world, session).result.route
    assert ("b", Reason.TIMELINE_CHANGED) == (route.name, route.reason)


def test_with_the_primary_gone_a_replica_with_the_token_serves() -> None:
    """Reads whose token a replica satisfies go on."""
    world = ready_world()
    session = Session(token_now(world))
    world.endpoints["primary"].servers[0].stop()
    for _ in range(3):
        world.pass_time(1.0)
        world.probe_all(Random(CHANCE))
    lease = open_read(world, session).result
    assert (False, Reason.PRIMARY_DOWN) == (lease.route.is_primary, lease.route.reason)


def test_hidden_servers_are_all_tried() -> None:
    """An endpoint with one server behind and one that is not ends at the one that is not."""
    world = ready_world(hidden=True)
    commit(world)
    for server in world.servers:
        server.replicate(1.0, float(server.name == "c"))
    chance = Random(CHANCE)
    world.endpoints["x"].monitor = None
    for seed in range(20):
        world.pass_time(0.6)
        session = Session(token_now(world))
        read = world.core.new_read(session, None, None)
        read.excluded = read.excluded | {"a"}
        operation = Operation(world, _plans.open_read(world.core, session, read))
        lease = operation.finish(Random(seed)).result
        assert lease.route.is_primary or lease.conn.server.name == "c"
        close_read(world, session, lease)
        world.probe("primary", chance)
    assert world.core.cluster.nodes["x"].hides_servers


def test_lag_exceeded_warns_at_most_every_ten_seconds() -> None:
    """The primary serves, one warning and one event tell of it."""
    world = ready_world()
    for server in world.servers:
        server.paused = True
    commit(world)
    for _ in range(12):
        world.pass_time(1.0)
        world.probe_all(Random(CHANCE))
        commit(world)
    world.probe_all(Random(CHANCE))
    reasons = [open_read(world, Session()).result.route.reason for _ in range(3)]
    assert [Reason.LAG_EXCEEDED] * 3 == reasons
    events = [event for event in world.events if isinstance(event, LagExceeded)]
    assert (1, 1) == (len(world.warnings), len(events))
    assert events[0].limit_seconds == 1.5
    assert {"a", "b", "c"} == set(events[0].lag_seconds)
    world.pass_time(10.0)
    open_read(world, Session())
    assert len(world.warnings) == 2


# The limit of fallback reads


def _full(**options: Any) -> tuple[Simulation, Session]:
    world = ready_world(max_fallback_reads=1, fallback_wait_seconds=0.5, **options)
    commit(world)
    session = Session(token_now(world))
    world.core.cluster.enter(world.core.cluster.nodes["primary"], fallback=True)
    return world, session


def test_over_the_limit_error() -> None:
    """``"error"`` raises at once, with a hint for Retry-After, and tells the hook."""
    world, session = _full(on_fallback_limit="error")
    error = open_read(world, session).error
    assert isinstance(error, FallbackLimitError)
    assert (1, 1.0) == (error.limit, error.retry_after_seconds)
    assert FallbackLimited(1, "error") in world.events


def test_over_the_limit_stale() -> None:
    """``"stale"`` reads from the least lagging replica and flags it."""
    world, session = _full(on_fallback_limit="stale")
    lease = open_read(world, session).result
    route = lease.route
    assert (False, True, Reason.NOT_CAUGHT_UP) == (route.is_primary, route.stale, route.reason)
    assert world.core.cluster.fallback_reads == 1


def test_over_the_limit_wait_in_vain() -> None:
    """``"wait"`` raises when no place comes free in its time."""
    world, session = _full(on_fallback_limit="wait")
    before = world.now
    assert isinstance(open_read(world, session).error, FallbackLimitError)
    assert 0.5 <= world.now - before <= 1.0


def test_over_the_limit_wait_for_a_turn() -> None:
    """``"wait"`` takes the place that comes free."""
    world, session = _full(on_fallback_limit="wait")
    read = world.core.new_read(session, None, None)
    operation = Operation(world, _plans.open_read(world.core, session, read))
    while not isinstance(operation.step, AwaitTurn):
        operation.advance(Random(CHANCE))
    operation.advance(Random(CHANCE))
    world.core.cluster.leave(world.core.cluster.nodes["primary"], fallback=True)
    assert operation.finish(Random(CHANCE)).result.route.is_primary
    assert world.core.cluster.fallback_reads == 1


def test_a_place_that_came_free_before_the_wait_is_not_missed() -> None:
    """Whoever registers after the place was given back is woken at once."""
    world, _ = _full(on_fallback_limit="wait")
    cluster = world.core.cluster
    woken: list[int] = []
    waiter = cluster.wait_for_fallback(lambda: woken.append(1))
    assert (1, []) == (len(cluster.fallback_turns), woken)
    cluster.give_up(waiter)
    cluster.leave(cluster.nodes["primary"], fallback=True)
    cluster.wait_for_fallback(lambda: woken.append(1))
    assert [1] == woken
    assert len(cluster.fallback_turns) == 0


# After a read, and around a write


@pytest.mark.parametrize("applying", [False, True])
def test_a_causal_read_advances_past_what_it_can_have_shown(applying: bool) -> None:
    """A commit is visible before the replay position covers it; the session covers it."""
    world = ready_world()
    commit(world)
    for server in world.servers:
        server.replicate(1.0, 0.0)
        server.applying = applying
    session = Session()
    lease = open_read(world, session).result
    shown = lease.conn.server.visible()
    close_read(world, session, lease)
    held = session.token.get(SYSTEM)
    assert held is not None
    assert held.lsn >= shown[-1].end
    assert len(shown) == 1 + applying


@pytest.mark.parametrize("level", [Consistency.READ_YOUR_WRITES, Consistency.EVENTUAL])
def test_other_reads_do_not_advance(level: Consistency) -> None:
    """Responses stay cacheable: only causal reads add to the token."""
    world = ready_world()
    session = Session()
    lease = open_read(world, session, level).result
    close_read(world, session, lease)
    assert Token() == session.token


def test_reads_that_end_together_share_one_probe() -> None:
    """With several reads in flight on the node the monitor is asked, once for all."""
    world = ready_world()
    session = Session()
    lease = open_read(world, session).result
    for _ in range(MANY_READS - 1):
        world.core.cluster.enter(world.core.cluster.nodes[lease.node], fallback=False)
    plan = _endings.close_read(world.core, session, lease, interrupted=False)
    operation = Operation(world, plan)
    started = world.now
    seen = []
    while not operation.done:
        seen.append(operation.step)
        operation.advance(Random(CHANCE))
    assert not any(isinstance(step, Fetch) for step in seen)
    awaited = next(step for step in seen if isinstance(step, AwaitObservation))
    assert (lease.node, True) == (awaited.node, awaited.after >= started)
    assert session.token.get(SYSTEM) is not None


def test_a_choice_is_taken_again_while_nothing_has_changed() -> None:
    """The same route for the same session, level and token, until something new is known."""
    world = ready_world()
    core = world.core
    session = Session(token_now(world))
    level = Consistency.READ_YOUR_WRITES
    close_read(world, session, open_read(world, session, level).result)
    first = core.choose_at_once(session, None, level)
    assert first is not None
    assert first is core.choose_at_once(session, None, level)
    lease = open_read(world, session, level).result
    assert first.route is lease.route is session.last_route
    assert first is session.choice


def test_a_choice_that_was_made_is_forgotten_with_every_change() -> None:
    """A failure, another token or level, another read, and the time: each asks anew."""
    world = ready_world()
    core = world.core
    token = token_now(world)
    session = Session(token)
    first = core.choose_at_once(session, None, None)
    assert first is not None
    core.failed(first.route.name, ConnectionError("gone"))
    second = core.choose_at_once(session, None, None)
    assert second is None or second.route.name != first.route.name
    world.probe_all(Random(CHANCE))
    session = Session(token)
    assert core.choose_at_once(session, None, None) is not None
    assert core.choose_at_once(session, None, Consistency.STRONG) is None
    ahead = Token([Position(SYSTEM, 1, Lsn(token.positions[SYSTEM].lsn + 1_000_000))])
    assert core.choose_at_once(session, ahead, None) is None
    session.advance(ahead)
    assert core.choose_at_once(session, None, None) is None
    session = Session(token)
    made = core.choose_at_once(session, None, None)
    assert made is not None
    elsewhere = "c" if made.route.name != "c" else "b"
    core.new_read(session, None, None)
    core.note(session, replace(made.route, name=elsewhere))
    other = core.choose_at_once(session, None, None)
    assert other is not None
    assert elsewhere == other.route.name
    world.now += world.core.settings.max_lag_seconds + 1
    assert core.choose_at_once(session, None, None) is None


def test_few_reads_ask_on_their_own_connections() -> None:
    """One round trip takes less time than to wait for the monitor's next probe."""
    world = ready_world()
    session = Session()
    lease = open_read(world, session).result
    for _ in range(MANY_READS - 2):
        world.core.cluster.enter(world.core.cluster.nodes[lease.node], fallback=False)
    closing = Operation(world, _endings.close_read(world.core, session, lease, interrupted=False))
    assert isinstance(closing.step, Fetch)
    assert closing.step.conn is lease.conn
    closing.finish(Random(CHANCE))
    assert session.token.get(SYSTEM) is not None


@pytest.mark.parametrize("others", [MANY_READS - 2, MANY_READS - 1])
def test_a_read_keeps_to_how_it_takes_its_position(others: int) -> None:
    """Whether others end or begin during its COMMIT, it asks with it or not at all."""
    world = ready_world()
    session = Session()
    lease = open_read(world, session).result
    node, cluster = world.core.cluster.nodes[lease.node], world.core.cluster
    for _ in range(others):
        cluster.enter(node, fallback=False)
    few = others < MANY_READS - 1
    committing = _plans.Reading(None, None, None).commit(world.core, lease)
    assert few is (committing is not None)
    (cluster.enter if few else cluster.leave)(node, fallback=False)
    lease.conn.in_transaction = False
    closing = Operation(world, _endings.close_read(world.core, session, lease, interrupted=False))
    seen = {type(closing.step)}
    while not closing.done:
        closing.advance(Random(CHANCE))
        if not closing.done:
            seen.add(type(closing.step))
    assert few is (Fetch in seen)
    assert few is not (AwaitObservation in seen)
    assert session.token.get(SYSTEM) is not None


def test_an_interrupted_read_pins() -> None:
    """What an interrupted read has shown is unknown: the session keeps to the primary."""
    world = ready_world()
    session = Session()
    lease = open_read(world, session).result
    run(world, _endings.close_read(world.core, session, lease, interrupted=True))
    assert session.token.pin_until == pytest.approx(UNIX_EPOCH + world.now + PIN, abs=0.01)
    assert any(isinstance(event, PositionUnknown) for event in world.events)
    assert open_read(world, session).result.route.reason is Reason.PRIMARY_REQUIRED


def test_a_token_of_an_older_timeline_is_issued_anew() -> None:
    """After a promotion the primary serves, and the session moves to the new timeline."""
    world = ready_world()
    session = Session(token_now(world))
    old = world.endpoints["primary"].servers[0]
    old.stop()
    promoted = next(s for s in world.servers if s.name == "a")
    promoted.promote(2)
    world.probe_all(Random(CHANCE))
    lease = open_read(world, session, Consistency.READ_YOUR_WRITES).result
    assert ("a", Reason.TIMELINE_CHANGED) == (lease.node, lease.route.reason)
    close_read(world, session, lease)
    held = session.token.get(SYSTEM)
    assert held is not None
    assert held.timeline == 2


def test_a_write_advances_past_its_commit() -> None:
    """The position is taken after COMMIT, on the connection of the write."""
    world = ready_world()
    session = Session()
    lease = run(world, _writes.open_write(world.core, session)).result
    done = lease.conn.server.log.commit(world.now, asynchronous=True)
    closing = Operation(world, _writes.close_write(world.core, session, lease, interrupted=False))
    assert isinstance(closing.step, Fetch)
    assert closing.step.conn is lease.conn
    closing.finish(Random(CHANCE))
    assert session.wrote
    assert Position(SYSTEM, 1, Lsn(done.end)) == session.token.get(SYSTEM)
    assert session.token.pin_until is None


def test_a_write_asks_for_its_position_and_no_more() -> None:
    """Whatever else is known of the primary stays what its monitor has observed."""
    world = ready_world()
    lease = run(world, _writes.open_write(world.core, Session())).result
    known = world.core.cluster.nodes["primary"].newest
    answered = lease.facts.answered_at
    closing = Operation(world, _writes.close_write(world.core, Session(), lease, interrupted=False))
    assert isinstance(closing.step, Fetch)
    assert _sql.POSITION == closing.step.statement
    closing.finish(Random(CHANCE))
    assert known is world.core.cluster.nodes["primary"].newest
    assert answered < lease.facts.answered_at


def test_a_connection_of_a_write_that_leads_to_a_standby_gives_no_position() -> None:
    """It says that it has no insert position; then it is observed, and the primary asked."""
    world = ready_world()
    session = Session()
    lease = run(world, _writes.open_write(world.core, session)).result
    lease.conn.server = next(server for server in world.servers if server.name == "a")
    closing = Operation(world, _writes.close_write(world.core, session, lease, interrupted=False))
    statements = []
    while not closing.done:
        if isinstance(closing.step, Fetch) and closing.reply is None:
            statements.append(closing.step.statement)
        closing.advance(Random(CHANCE))
    assert [_sql.POSITION, _sql.PROBE_PRIMARY, _sql.IDENTIFY] == statements[:3]
    assert session.token.get(SYSTEM) is not None or session.token.pin_until is not None
    primary = next(server for server in world.servers if server.is_primary)
    held = session.token.get(SYSTEM)
    assert held is None or held.lsn >= primary.log.insert


def test_a_lost_write_takes_a_fresh_position() -> None:
    """If the connection dies between COMMIT and capture, the primary is asked anew."""
    world = ready_world()
    session = Session()
    lease = run(world, _writes.open_write(world.core, session)).result
    done = lease.conn.server.log.commit(world.now, asynchronous=True)
    lease.conn.closed = True
    run(world, _writes.close_write(world.core, session, lease, interrupted=False))
    held = session.token.get(SYSTEM)
    assert held is not None
    assert held.lsn >= done.end


def test_a_write_without_a_position_pins() -> None:
    """If the primary is gone after COMMIT, reads keep to the primary: fail closed."""
    world = ready_world()
    session = Session()
    lease = run(world, _writes.open_write(world.core, session)).result
    lease.conn.server.stop()
    run(world, _writes.close_write(world.core, session, lease, interrupted=False))
    assert session.token.pin_until is not None
    assert session.token.get(SYSTEM) is None


def test_a_sticky_write_pins_for_its_seconds() -> None:
    """At the sticky level no LSN is read; the session is pinned for the level's time."""
    world = ready_world()
    for take in ("write", "capture"):
        session = Session()
        with at_level(Consistency.sticky(7)):
            if take == "capture":
                run(world, _writes.capture(world.core, session))
            else:
                lease = run(world, _writes.open_write(world.core, session)).result
                run(world, _writes.close_write(world.core, session, lease, interrupted=False))
        assert session.token.positions == {}
        assert session.token.pin_until == pytest.approx(UNIX_EPOCH + world.now + 7, abs=0.01)
        assert session.wrote


def test_a_write_never_goes_to_a_former_primary() -> None:
    """A promoted standby stays the primary while it is unreachable and the former one runs."""
    world = ready_world()
    promoted = next(s for s in world.servers if s.name == "a")
    promoted.promote(2)
    world.probe_all(Random(CHANCE))
    promoted.stop()
    world.probe_all(Random(CHANCE))
    opened = run(world, _writes.open_write(world.core, Session()))
    assert isinstance(opened.error, ConnectionError)


def test_a_write_without_a_primary_says_who_is_none() -> None:
    """`NoNodeAvailableError` names every node and what it is."""
    world = ready_world()
    primary = world.endpoints["primary"].servers[0]
    primary.is_primary = False
    world.probe_all(Random(CHANCE))
    error = run(world, _writes.open_write(world.core, Session())).error
    assert isinstance(error, NoNodeAvailableError)
    assert set(error.failures) == {"primary", "a", "b", "c"}


def test_the_token_of_the_primary_and_none_without_it() -> None:
    """`primary_token` is the position now, or an error; a capture pins instead."""
    world = ready_world()
    commit(world)
    assert token_now(world) == run(world, _writes.primary_token(world.core)).result
    session = Session()
    run(world, _writes.capture(world.core, session))
    assert token_now(world) == session.token
    world.endpoints["primary"].servers[0].stop()
    error = run(world, _writes.primary_token(world.core)).error
    assert isinstance(error, NoNodeAvailableError)
    run(world, _writes.capture(world.core, session))
    assert session.token.pin_until is not None


def test_a_forced_node_is_known_and_not_judged() -> None:
    """``node=`` skips the decision; a name that is no node's is a configuration error."""
    world = ready_world()
    commit(world)
    session = Session(token_now(world))
    read = world.core.new_read(session, None, None)
    lease = run(world, _plans.open_forced(world.core, session, read, "b")).result
    assert ("b", "replica", Reason.FORCED) == (lease.node, lease.route.role, lease.route.reason)
    error = run(world, _plans.open_forced(world.core, session, read, "nowhere")).error
    assert isinstance(error, ConfigurationError)
    assert "'nowhere'" in str(error)


def test_a_choice_opens_nothing() -> None:
    """`choose` takes no connection, and tells the hook where it went."""
    world = ready_world()
    session = Session(token_now(world))
    route = run(
        world, _plans.choose(world.core, session, world.core.new_read(session, None, None))
    ).result
    assert (Reason.CAUGHT_UP, "replica") == (route.reason, route.role)
    assert [[], [], [], []] == [each.idle for each in world.endpoints.values()]
    assert ReadRouted(route) in world.events
    assert session.node == route.name
    assert session.last_route is route


def test_reads_are_read_only_and_writes_are_not() -> None:
    """The same connection of the primary serves both, in turn."""
    for autocommit in (False, True):
        world = ready_world(autocommit=autocommit)
        session = Session()
        for _ in range(3):
            lease = open_read(world, session, Consistency.STRONG).result
            assert lease.conn.only_reads
            close_read(world, session, lease)
            written = run(world, _writes.open_write(world.core, session)).result
            assert not written.conn.only_reads
            run(world, _writes.close_write(world.core, session, written, interrupted=False))


def test_a_given_connection_of_a_promoted_server_is_made_read_only() -> None:
    """A connection that was opened on a standby survives the promotion."""
    world = ready_world(given=True, autocommit=True)
    session = Session()
    read = world.core.new_read(session, None, None)
    lease = run(world, _plans.open_forced(world.core, session, read, "a")).result
    close_read(world, session, lease)
    world.endpoints["primary"].servers[0].stop()
    lease.conn.server.promote(2)
    world.probe_all(Random(CHANCE))
    again = open_read(world, Session(), Consistency.STRONG).result
    assert again.conn is lease.conn
    assert again.conn.only_reads


def test_begin_behind_a_pooler_is_read_committed() -> None:
    """A snapshot of REPEATABLE READ would be taken before the check."""
    assert b"read committed read only" in _sql.BEGIN_READ_COMMITTED


def test_what_an_interruption_left_behind_is_made_up_for() -> None:
    """A connection whose attribute was set by a read that never began is writable for a write."""
    world = ready_world()
    session = Session()
    read = world.core.new_read(session, None, Consistency.STRONG)
    operation = Operation(world, _plans.open_read(world.core, session, read))
    while not isinstance(operation.step, SetReadOnly):
        operation.advance(Random(CHANCE))
    conn = operation.step.conn
    operation.interrupt(KeyboardInterrupt(), late=True)
    operation.finish(Random(CHANCE))
    assert conn.read_only is True
    written = run(world, _writes.open_write(world.core, session)).result
    assert (conn, None) == (written.conn, written.conn.read_only)


def test_hidden_servers_share_no_probe() -> None:
    """Behind an endpoint of several servers only the connection reaches the server that read."""
    world = ready_world(hidden=True)
    for seed in range(20):
        world.endpoints["x"].monitor = world.endpoints["x"].identity = None
        world.probe("x", Random(seed))
    node = world.core.cluster.nodes["x"]
    assert node.hides_servers
    session = Session()
    read = world.core.new_read(session, None, None)
    read.excluded = read.excluded | {"a"}
    lease = run(world, _plans.open_read(world.core, session, read)).result
    for _ in range(MANY_READS):
        world.core.cluster.enter(node, fallback=False)
    closing = Operation(world, _endings.close_read(world.core, session, lease, interrupted=False))
    assert isinstance(closing.step, Fetch)
    assert closing.step.conn is lease.conn
    closing.finish(Random(CHANCE))


def test_a_shared_probe_of_a_restarted_server_is_no_bound() -> None:
    """The server that read is gone: what it showed is bounded by the primary, not by the next."""
    world = ready_world()
    session = Session()
    lease = open_read(world, session).result
    shown = lease.conn.server.visible()
    world.core.cluster.enter(world.core.cluster.nodes[lease.node], fallback=False)
    closing = Operation(world, _endings.close_read(world.core, session, lease, interrupted=False))
    lease.conn.server.crash(1.0)
    for _ in range(2):
        world.probe(lease.node, Random(CHANCE))
    seen = world.core.cluster.nodes[lease.node].newest
    assert seen is not None
    assert seen.bound_position is not None
    assert seen.bound_position.lsn < shown[-1].end
    closing.finish(Random(CHANCE))
    held = session.token.get(SYSTEM)
    assert held is not None
    assert held.lsn >= shown[-1].end


def test_a_connection_counts_from_its_first_observation() -> None:
    """The time of a connection is when its first observation was sent: it was there by then."""
    world = ready_world()
    lease = open_read(world, Session()).result
    facts = world.core.facts_of(lease.conn)
    seen = world.core.cluster.nodes[lease.node].newest
    assert facts is not None
    assert seen is not None
    assert facts.opened_at == seen.sent_at


def test_a_demoted_primary_gives_no_position_after_a_write() -> None:
    """What a standby says of itself does not cover a commit: the session is pinned."""
    world = ready_world()
    session = Session()
    lease = run(world, _writes.open_write(world.core, session)).result
    lease.conn.server.is_primary = False
    run(world, _writes.close_write(world.core, session, lease, interrupted=False))
    assert session.token.get(SYSTEM) is None
    assert session.token.pin_until is not None


def test_an_endpoint_of_both_primaries_writes_to_the_promoted_one() -> None:
    """A connection that reaches the former primary takes no write, whatever it says of itself."""
    world = ready_world(hidden=True)
    former = world.endpoints["primary"].servers[0]
    promoted = next(server for server in world.servers if server.name == "a")
    promoted.promote(2)
    world.probe("a", Random(CHANCE))
    world.endpoints["primary"].servers.append(promoted)
    world.endpoints["a"].servers[0] = promoted
    written = []
    for seed in range(20):
        session = Session()
        opened = Operation(world, _writes.open_write(world.core, session)).finish(Random(seed))
        if opened.error is None:
            written.append(opened.result.conn.server)
            world.endpoints[opened.result.node].idle.clear()
        world.core.cluster.primary = world.core.cluster.nodes["primary"]
    assert former not in written
    assert promoted in written
