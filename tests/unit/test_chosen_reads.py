"""Reads whose replica is chosen at once: the short way, and every turn that leaves it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from lsn_consistency import Consistency, Reason, Session, _connections, _plans
from lsn_consistency._steps import Checkout, Fetch, SetReadOnly
from lsn_consistency.events import ReadRouted
from tests.properties.fake_cluster import Operation, Simulation
from tests.unit.test_plans import CHANCE, close_read, open_read, ready_world, token_now

LEVEL = Consistency.READ_YOUR_WRITES
READING = _plans.Reading(None, LEVEL, None)


def warm_world(**options: Any) -> tuple[Simulation, Session]:
    """Build a cluster with one connection of each replica that has read, and a session of one."""
    world = ready_world(**options)
    session = Session(token_now(world))
    for name in ("a", "b", "c"):
        session.node = name
        close_read(world, session, open_read(world, session, LEVEL).result)
    world.probe_all(Random(CHANCE))
    session.node = "a"
    return world, session


def routed(world: Simulation) -> int:
    """Count the reads that the hook was told of."""
    return sum(isinstance(event, ReadRouted) for event in world.events)


def in_flight(world: Simulation) -> dict[str, int]:
    """Return the nodes that a read is counted on."""
    return {node.name: node.in_flight for node in world.core.cluster.all_nodes if node.in_flight}


def opened(
    world: Simulation, session: Session, meanwhile: Callable[[], object] = lambda: None
) -> tuple[Operation, list[type]]:
    """Open a read; ``meanwhile`` happens while it waits for its connection."""
    operation = Operation(world, READING.open(world.core, session))
    steps = [type(operation.step)]
    assert [Checkout] == steps
    meanwhile()
    while not operation.done:
        operation.advance(Random(CHANCE))
        if not operation.done and operation.reply is None:
            steps.append(type(operation.step))
    return operation, steps


def test_a_warm_read_takes_its_connection_and_nothing_else() -> None:
    """One step, one event, one read in flight, and the session's token of that moment."""
    world, session = warm_world()
    before = routed(world)
    operation, steps = opened(world, session)
    lease = operation.result
    assert [Checkout] == steps
    assert ("a", Reason.CAUGHT_UP) == (lease.node, lease.route.reason)
    assert (session.token, lease.route) == (lease.token, session.last_route)
    assert (before + 1, {"a": 1}) == (routed(world), in_flight(world))
    close_read(world, session, lease)
    assert {} == in_flight(world)


def test_news_meanwhile_are_no_detour() -> None:
    """What was observed since is looked at, and the replica still serves."""
    world, session = warm_world()
    operation, steps = opened(world, session, lambda: world.probe_all(Random(CHANCE)))
    assert [Checkout] == steps
    assert "a" == operation.result.node


def test_a_connection_that_was_not_used_yet_is_made_read_only() -> None:
    """It is not given back and taken again: what is left to do is done with it."""
    world, session = warm_world()
    endpoint = world.endpoints["a"]
    conn = endpoint.connect(Random(CHANCE))
    world.fetch_all(_connections.meet(world.core, "a", conn), Random(CHANCE))
    endpoint.idle = [conn]
    world.probe_all(Random(CHANCE))
    operation, steps = opened(world, session)
    assert [Checkout, SetReadOnly] == steps
    assert operation.result.conn is conn
    assert conn.read_only is True
    assert session.token == operation.result.token


def test_a_pool_that_is_full_leaves_the_read_to_another_replica() -> None:
    """The read is counted on the node that serves it, and told once."""
    world, session = warm_world(connect_timeout=0.1)
    world.endpoints["a"].full = True
    before = routed(world)
    operation, steps = opened(world, session)
    lease = operation.result
    assert [Checkout, Checkout] == steps[:2]
    assert lease.node in ("b", "c")
    assert ({lease.node: 1}, before + 1) == (in_flight(world), routed(world))
    assert lease.node == session.node


def test_a_failure_meanwhile_has_the_connection_asked() -> None:
    """Its node has failed and is well again: a connection from before may lead nowhere."""
    world, session = warm_world()

    def fail() -> None:
        world.core.failed("a", ConnectionError("no answer"))
        world.pass_time(0.1)
        world.probe("a", Random(CHANCE))

    operation, steps = opened(world, session, fail)
    assert Fetch in steps
    assert {operation.result.node: 1} == in_flight(world)


@pytest.mark.parametrize("probed", [False, True])
def test_a_replica_that_went_back_meanwhile_does_not_serve(probed: bool) -> None:
    """It has restarted without the token's position, whether or not a probe has told so yet."""
    world, session = warm_world()

    def crash() -> None:
        next(server for server in world.servers if server.name == "a").crash(1.0)
        if probed:
            world.probe("a", Random(CHANCE))

    lease = opened(world, session, crash)[0].result
    assert lease.node != "a"
    assert {lease.node: 1} == in_flight(world)
    out = {name: len(endpoint.out) for name, endpoint in world.endpoints.items() if endpoint.out}
    assert {lease.node: 1} == out


def test_a_promotion_meanwhile_leaves_the_replicas_of_the_old_timeline() -> None:
    """Whatever a replica has replayed, it is on a timeline that the primary has left."""
    world, session = warm_world()

    def promote() -> None:
        next(server for server in world.servers if server.name == "b").promote(2)
        world.probe("b", Random(CHANCE))

    lease = opened(world, session, promote)[0].result
    assert ("b", True) == (lease.node, lease.route.is_primary)


def test_the_lag_bound_holds_when_the_connection_is_there() -> None:
    """A choice is not older than its replica's bound, however long the connection took."""
    limit = 0.3
    world, session = warm_world(max_lag_seconds=limit)
    choice = world.core.choose_at_once(session, None, LEVEL)
    assert choice is not None
    late = choice.candidate.until + 0.001
    # The observation itself is not overdue yet: it is the lag that decides.
    newest = world.core.cluster.nodes["a"].newest
    assert newest is not None
    facts = world.core.facts_of(next(iter(world.endpoints["a"].idle)))
    assert facts is not None
    assert world.core.usable(facts, late) is newest
    operation, steps = opened(world, session, lambda: world.pass_time(late - world.now))
    assert [Checkout] != steps
    assert operation.result.route.lag_seconds <= limit


@pytest.mark.parametrize("late", [False, True])
def test_a_cancelled_checkout_counts_no_read(late: bool) -> None:
    """Neither a read in flight nor an event is left, and the session is as it was."""
    world, session = warm_world()
    before = (routed(world), session.token, session.last_route)
    operation = Operation(world, READING.open(world.core, session))
    operation.interrupt(KeyboardInterrupt(), late=late)
    while not operation.done:
        operation.advance(Random(CHANCE))
    assert isinstance(operation.error, KeyboardInterrupt)
    assert {} == in_flight(world)
    assert before == (routed(world), session.token, session.last_route)
