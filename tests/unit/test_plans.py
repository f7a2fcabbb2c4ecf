"""The plans, one rule at a time; and every point at which a plan can be cancelled or can fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from lsn_consistency import (
    Consistency,
    Position,
    Reason,
    Session,
    Token,
    _plans,
    _sql,
)
from lsn_consistency import consistency as at_level
from lsn_consistency._plans import Lease, is_retriable
from lsn_consistency._steps import (
    AwaitObservation,
    AwaitPosition,
    AwaitTurn,
    Checkout,
    Fetch,
    NodeFailure,
    Return,
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
from tests.properties.fake_cluster import SYSTEM, UNIX_EPOCH, Operation, Simulation
from tests.properties.test_plan_machine import PIN, Client, ReadWork, Work, WriteWork, make_world

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
    read = world.core.new_read(session, None, level)
    return run(world, _plans.open_read(world.core, session, read))


def close_read(world: Simulation, session: Session, lease: Lease) -> Operation:
    """Close a read that ended well."""
    lease.conn.in_transaction = False
    return run(world, _plans.close_read(world.core, session, lease, interrupted=False))


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
    work = _behind(world)
    return work


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
    for work, point in _disturb(world, situation, fail):
        points = max(points, point)
        if failed and failed.pop() != "primary" and situation != "forced":
            limited = isinstance(work.operation.error, FallbackLimitError)
            assert work.lease is not None or limited
    assert points >= 2
