"""
One process with a router: its core, its pools and monitors, and the carrying out of plans.

The steps are done as the routers do them, cancellations included: whatever is raised in a step is
thrown into the plan. The monitors follow the rules of `_monitor` on the virtual clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from random import Random
from typing import Any, Final

from lsn_consistency import _connections
from lsn_consistency._core import Core
from lsn_consistency._settings import Settings
from lsn_consistency._sql import Row
from lsn_consistency._steps import (
    AwaitObservation,
    AwaitPosition,
    AwaitTurn,
    Checkout,
    Commit,
    Fetch,
    NodeFailure,
    Plan,
    Reply,
    Return,
    SetReadOnly,
)
from lsn_consistency._waiters import Waiter
from lsn_consistency.events import Event
from tests.simulation.loop import Loop, Signal, Steps
from tests.simulation.monitor import Monitor
from tests.simulation.network import Connection, Endpoint, Network

UNIX_EPOCH: Final = 1_700_000_000.0
POOL_SECONDS: Final = 3.0
RECONNECT_SECONDS: Final = 0.1
STATEMENT_SECONDS: Final = 3.0


class Process:
    """
    Run a router: ``offset`` is where its monotonic clock began, ``skew`` how wrong its date is.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        endpoints: Iterable[Endpoint],
        chance: Random,
        options: Mapping[str, Any],
        *,
        offset: float = 0.0,
        skew: float = 0.0,
        replication: bool = False,
        count: Callable[[str], None],
    ) -> None:
        self.name = name
        self.network = network
        self.loop: Loop = network.loop
        self.endpoints = {each.name: each for each in endpoints}
        self.chance = chance
        self.offset = offset
        self.skew = skew
        self.replication = replication
        self.count = count
        self.events: list[Event] = []
        self.warnings: list[str] = []
        self.core = Core(
            self.endpoints,
            Settings.of(options),
            given=[each.name for each in self.endpoints.values() if each.given],
            clock=self.clock,
            unix_clock=lambda: UNIX_EPOCH + self.loop.now + skew,
            emit=self.events.append,
            kick=self.kick,
            warn=self.warnings.append,
            random=chance.random,
        )
        self.monitors = {each: Monitor(each, self) for each in self.endpoints}
        for monitor in self.monitors.values():
            self.loop.start(monitor.run())

    def clock(self) -> float:
        return self.loop.now + self.offset

    def unix_clock(self) -> float:
        return UNIX_EPOCH + self.loop.now + self.skew

    def kick(self, name: str) -> None:
        self.monitors[name].kick()

    # Plans

    def run(self, plan: Plan[Any]) -> Steps:
        """Carry out a plan, as `AsyncRouter._run` does."""
        try:
            step = next(plan)
            while True:
                try:
                    result = yield from self.do(step)
                except BaseException as error:
                    step = plan.throw(error)
                else:
                    step = plan.send(result)
        except StopIteration as done:
            return done.value

    def do(self, step: Any) -> Steps:
        if isinstance(step, Fetch):
            return (yield from self.fetch(step))
        if isinstance(step, Commit):
            return (yield from self._commit(step))
        if isinstance(step, Checkout):
            return (yield from self._checkout(step))
        if isinstance(step, Return):
            return self._return(step)
        if isinstance(step, SetReadOnly):
            step.conn.read_only = step.value
            return None
        return (yield from self._await(step))

    def fetch(self, step: Fetch) -> Steps:
        conn: Connection = step.conn
        if conn.closed:
            raise NodeFailure(ConnectionError("the connection is lost"))
        sent_at = self.clock()
        work = partial(conn.run, step.statement)
        try:
            row: Row = yield from self.network.exchange(
                self.name, conn, work, self.core.settings.probe_timeout
            )
        except NodeFailure:
            # The server has refused the statement; the connection is well.
            raise
        except (ConnectionError, TimeoutError) as error:
            conn.closed = True
            raise NodeFailure(error) from None
        except BaseException:
            # What the connection would receive next is unknown: the wire closes it.
            conn.closed = True
            raise
        return Reply(row, conn.pid, sent_at, self.clock())

    def _commit(self, step: Commit) -> Steps:
        """End a transaction, which was committed when its work was done, and ask; that may fail."""
        step.conn.end_transaction()
        if step.statement is None or step.conn.autocommit or self.chance.random() < 0.3:
            return None
        try:
            return (yield from self.fetch(Fetch(step.conn, step.statement)))
        except NodeFailure:
            return None

    def execute(self, conn: Connection, work: Callable[[], Any], hold: float = 0) -> Steps:
        """Run a user's statement; an interrupted or failed one costs the connection."""
        if conn.closed:
            raise ConnectionError("the connection is lost")
        try:
            return (
                yield from self.network.exchange(self.name, conn, work, STATEMENT_SECONDS, hold)
            )
        except PermissionError:
            raise
        except BaseException:
            conn.closed = True
            raise

    # Pools

    def _checkout(self, step: Checkout) -> Steps:
        endpoint = self.endpoints[step.node]
        timeout = POOL_SECONDS if step.timeout is None else step.timeout
        dead = False
        while endpoint.idle and not endpoint.full:
            conn = endpoint.idle.pop(self.chance.randrange(len(endpoint.idle)))
            if conn.is_alive:
                endpoint.out.add(conn)
                return conn
            dead, timeout = True, step.renew_seconds
        deadline = self.loop.now + timeout
        while (left := deadline - self.loop.now) > 0:
            if endpoint.full:
                yield min(left, RECONNECT_SECONDS)
                continue
            try:
                conn = yield from self.connect(endpoint, left)
            except (ConnectionError, TimeoutError, NodeFailure):
                yield max(0.0, min(RECONNECT_SECONDS, deadline - self.loop.now))
                continue
            endpoint.out.add(conn)
            return conn
        raise NodeFailure(TimeoutError(f"no connection of {step.node} in time"), down=dead)

    def connect(self, endpoint: Endpoint, seconds: float) -> Steps:
        """Open a connection as a pool's worker does: a pool of the router's own meets it."""
        conn = yield from self.network.connect(self.name, endpoint, seconds)
        if not endpoint.given:
            yield from self.run(_connections.meet(self.core, endpoint.name, conn))
        return conn

    def _return(self, step: Return) -> None:
        endpoint = self.endpoints[step.node]
        conn: Connection = step.conn
        assert conn in endpoint.out, "a connection is returned that is not in use"
        endpoint.out.remove(conn)
        conn.in_transaction = False
        if step.discard:
            conn.closed = True
        elif conn.closed:
            self.core.lost(step.node)
        else:
            endpoint.idle.append(conn)

    # Waits

    def _await(self, step: AwaitPosition | AwaitObservation | AwaitTurn) -> Steps:
        cluster = self.core.cluster
        if isinstance(step, AwaitPosition):
            return (
                yield from self._wait(
                    partial(cluster.wait_for_position, step.required, since=step.since),
                    self.endpoints,
                    step.seconds,
                )
            )
        if isinstance(step, AwaitTurn):
            return (yield from self._wait(cluster.wait_for_fallback, (), step.seconds))
        known = cluster.nodes[step.node].newest
        if known is not None and known.sent_at >= step.after:
            return known
        waiter = yield from self._wait(
            partial(cluster.wait_for_observation, step.node, step.after),
            (step.node,),
            self.core.settings.probe_timeout,
        )
        return waiter.seen

    def _wait(self, register: Callable[..., Waiter], kick: Iterable[str], seconds: float) -> Steps:
        released = Signal(self.loop)
        waiter = register(wake=released.set)
        for name in kick:
            self.kick(name)
        try:
            yield released, seconds
        finally:
            self.core.cluster.give_up(waiter)
        return waiter

    # At rest

    def check_idle(self) -> None:
        """Hold that nothing is left over when nobody does anything."""
        cluster = self.core.cluster
        assert {name: set() for name in self.endpoints} == {
            name: each.out for name, each in self.endpoints.items()
        }, "a connection has leaked"
        assert dict.fromkeys(self.endpoints, 0) == {
            name: node.in_flight for name, node in cluster.nodes.items()
        }, "a read in flight was not ended"
        assert cluster.fallback_reads == 0
        assert len(cluster.positions) == 0, "a waiter has leaked"
        assert len(cluster.fallback_turns) == 0, "a waiter has leaked"
        assert [0 for _ in cluster.all_nodes] == [len(node.waiting) for node in cluster.all_nodes]
        for endpoint in self.endpoints.values():
            for conn in endpoint.idle:
                self._check_own_settings(conn, endpoint)

    def _check_own_settings(self, conn: Connection, endpoint: Endpoint) -> None:
        facts = self.core.facts_of(conn)
        owed = facts is not None and facts.changed
        own = facts.own_read_only if facts is not None and owed else conn.read_only
        # A restoring that was interrupted is remembered, and made up for at the next use.
        assert own == endpoint.own_read_only
        assert not (endpoint.given and conn.session_read_only)
