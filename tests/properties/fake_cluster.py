"""
A driver for the plans over servers that know the truth (`tests.simulation.servers`).

`Simulation` carries out the steps of the plans as the routers do, on a clock of its own, one step
at a time and in any order: Hypothesis is the scheduler. Rows go through the reading of rows in
`_sql`, so what a plan learns is what a server would have said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from lsn_consistency import _connections, _sql
from lsn_consistency._core import Core
from lsn_consistency._observation import Observation
from lsn_consistency._settings import Settings
from lsn_consistency._sql import Identity, Row
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
    identify,
    observe,
)
from lsn_consistency._waiters import Waiter
from lsn_consistency.events import Event
from tests.simulation.servers import Server

UNIX_EPOCH: Final = 1_700_000_000.0
TICK: Final = 1e-6


class Connection:
    """
    Be a psycopg connection as far as the plans look at one.

    Behind a pooler it outlives its server, and each transaction may reach another.
    """

    _pids = 0

    def __init__(self, server: Server, endpoint: Endpoint) -> None:
        Connection._pids += 1
        self.pid = Connection._pids
        self.endpoint = endpoint
        self.server = server
        self.life = server.life
        self.closed = False
        self.autocommit = endpoint.autocommit
        self.read_only: bool | None = endpoint.own_read_only
        self.session_read_only = False
        self.in_transaction = False
        self.transactions = 0

    @property
    def is_alive(self) -> bool:
        if self.closed:
            return False
        if self.endpoint.pooled and not self.in_transaction:
            return any(server.alive for server in self.endpoint.servers)
        return self.server.alive and self.server.life == self.life

    def reroute(self, chance: Random) -> None:
        if self.endpoint.pooled and not self.in_transaction:
            self.server = chance.choice([s for s in self.endpoint.servers if s.alive])
            self.life = self.server.life

    def run(self, statement: bytes) -> Row:
        if not self.in_transaction:
            self.transactions += 1
        server = self.server
        pid = self.pid + 1_000_000 if self.endpoint.pooled else self.pid
        if statement == _sql.BEGIN_READ_COMMITTED:
            self.in_transaction = True
        elif statement == _sql.ROLLBACK:
            self.in_transaction = False
        elif statement == _sql.READ_ONLY:
            self.session_read_only = True
        elif statement == _sql.READ_WRITE:
            self.session_read_only = False
        else:
            return server.answer(statement, pid, self.transactions)
        return ()

    @property
    def only_reads(self) -> bool:
        return bool(
            self.session_read_only
            or self.in_transaction
            or (self.read_only and not self.autocommit)
            or not self.server.is_primary
        )


@dataclass(eq=False)
class Endpoint:
    """
    Be what a conninfo leads to: a server, several, or a pooler before them; and its pool.
    """

    name: str
    servers: list[Server]
    pooled: bool = False
    given: bool = False
    autocommit: bool = False
    own_read_only: bool | None = None
    full: bool = False
    idle: list[Connection] = field(default_factory=list)
    out: set[Connection] = field(default_factory=set)
    monitor: Connection | None = None
    identity: Identity | None = None
    in_recovery: bool = False

    def connect(self, chance: Random) -> Connection:
        alive = [server for server in self.servers if server.alive and not server.frozen]
        if not alive:
            raise NodeFailure(ConnectionError(f"{self.name} refuses"))
        return Connection(chance.choice(alive), self)


class Simulation:
    """
    Carry out plans on endpoints, as a router does.
    """

    def __init__(self, endpoints: Iterable[Endpoint], **options: Any) -> None:
        self.endpoints = {each.name: each for each in endpoints}
        self.now = 1000.0
        self.events: list[Event] = []
        self.warnings: list[str] = []
        self.kicked: list[str] = []
        self.core = Core(
            self.endpoints,
            Settings.of(options),
            given=[each.name for each in self.endpoints.values() if each.given],
            clock=lambda: self.now,
            unix_clock=lambda: UNIX_EPOCH + self.now,
            emit=self.events.append,
            kick=self.kicked.append,
            warn=self.warnings.append,
        )

    @property
    def servers(self) -> list[Server]:
        found = {server.name: server for each in self.endpoints.values() for server in each.servers}
        return list(found.values())

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for server in self.servers:
            if server.is_primary and server.alive:
                server.log.flush_due(self.now)

    def probe(self, name: str, chance: Random) -> None:
        """Do what the monitor of a node does at its turn, at once."""
        endpoint = self.endpoints[name]
        try:
            conn = endpoint.monitor
            if conn is None or not conn.is_alive:
                broken, endpoint.monitor, endpoint.identity = conn is not None, None, None
                if broken:
                    raise NodeFailure(ConnectionError("the server closed the connection"))
                endpoint.monitor = conn = endpoint.connect(chance)
            if endpoint.identity is None:
                endpoint.identity, seen = self.fetch_all(identify(conn), chance)
            else:
                probe = observe(conn, endpoint.identity, in_recovery=endpoint.in_recovery)
                seen = self.fetch_all(probe, chance)
        except NodeFailure as failure:
            endpoint.monitor = endpoint.identity = None
            self.core.failed(name, failure.cause)
        else:
            endpoint.in_recovery = seen.in_recovery
            self.core.observed(name, seen, sample=True)

    def probe_all(self, chance: Random) -> None:
        for name in self.endpoints:
            self.probe(name, chance)

    def fetch_all(self, plan: Plan[Any], chance: Random) -> Any:
        """Carry out a plan of fetches at once."""
        try:
            step = next(plan)
            while True:
                assert isinstance(step, Fetch)
                try:
                    reply = self.answer(step, chance)
                except NodeFailure as failure:
                    step = plan.throw(failure)
                else:
                    step = plan.send(reply._replace(received_at=self.now))
        except StopIteration as done:
            return done.value

    def answer(self, step: Fetch, chance: Random) -> Reply:
        """Have a server answer a statement; the answer still has to arrive."""
        conn = step.conn
        self.pass_time(TICK)
        sent_at = self.now
        if not conn.is_alive or conn.server.frozen:
            conn.closed = True
            raise NodeFailure(ConnectionError("the connection is lost"))
        conn.reroute(chance)
        self.pass_time(TICK)
        return Reply(conn.run(step.statement), conn.pid, sent_at, self.now)

    def commit(self, step: Commit, chance: Random) -> Reply | None:
        """End a transaction, and have the server answer after that, or fail to."""
        step.conn.in_transaction = False
        if step.statement is None or step.conn.autocommit or chance.random() < 0.3:
            return None
        try:
            return self.answer(Fetch(step.conn, step.statement), chance)
        except NodeFailure:
            return None

    def checkout(self, step: Checkout, chance: Random) -> Connection:
        endpoint = self.endpoints[step.node]
        if endpoint.full:
            self.pass_time(step.timeout or 0.0)
            raise NodeFailure(TimeoutError("the pool is full"), down=False)
        endpoint.idle = [conn for conn in endpoint.idle if conn.is_alive]
        self.pass_time(TICK)
        if endpoint.idle and chance.random() < 0.8:
            conn = endpoint.idle.pop(chance.randrange(len(endpoint.idle)))
        else:
            conn = endpoint.connect(chance)
            if not endpoint.given:
                self.fetch_all(_connections.meet(self.core, step.node, conn), chance)
        endpoint.out.add(conn)
        return conn

    def give_back(self, step: Return) -> None:
        endpoint = self.endpoints[step.node]
        assert step.conn in endpoint.out, "a connection is returned that is not in use"
        endpoint.out.remove(step.conn)
        step.conn.in_transaction = False
        if step.discard:
            step.conn.closed = True
        elif step.conn.closed:
            self.core.lost(step.node)
        else:
            endpoint.idle.append(step.conn)

    def register(
        self, step: AwaitPosition | AwaitObservation | AwaitTurn, wake: Callable[[], object]
    ) -> Waiter:
        cluster = self.core.cluster
        if isinstance(step, AwaitPosition):
            return cluster.wait_for_position(step.required, wake, step.since)
        if isinstance(step, AwaitObservation):
            return cluster.wait_for_observation(step.node, step.after, wake)
        return cluster.wait_for_fallback(wake)

    def check_idle(self) -> None:
        """Hold that nothing is left over when nobody does anything."""
        cluster = self.core.cluster
        assert {name: set() for name in self.endpoints} == {
            name: each.out for name, each in self.endpoints.items()
        }
        assert dict.fromkeys(self.endpoints, 0) == {
            name: node.in_flight for name, node in cluster.nodes.items()
        }
        assert cluster.fallback_reads == 0
        assert len(cluster.positions) == 0
        assert len(cluster.fallback_turns) == 0
        assert [0 for _ in cluster.all_nodes] == [len(node.waiting) for node in cluster.all_nodes]
        for endpoint in self.endpoints.values():
            for conn in endpoint.idle:
                facts = self.core.facts_of(conn)
                owed = facts is not None and facts.changed
                own = facts.own_read_only if facts is not None and owed else conn.read_only
                # A restoring that was interrupted is remembered, and made up for at the next use.
                assert own == endpoint.own_read_only
                assert not (endpoint.given and conn.session_read_only)


class Operation:
    """
    Run one plan, a step or half a step at a time.
    """

    def __init__(self, simulation: Simulation, plan: Plan[Any]) -> None:
        self.simulation = simulation
        self.plan = plan
        self.step: Any = None
        self.reply: Reply | None = None
        self.waiter: Waiter | None = None
        self.ends = 0.0
        self.connected_at = 0.0
        self.steps = 0
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._go(lambda: next(plan))

    def _go(self, move: Callable[[], Any]) -> None:
        self.reply = self.waiter = None
        try:
            self.step = move()
            self.steps += 1
        except StopIteration as finished:
            self.done, self.result = True, finished.value
        except BaseException as error:
            self.done, self.error = True, error

    def advance(self, chance: Random) -> None:
        """Do the next thing that the plan asks for, or wait on for a moment."""
        simulation = self.simulation
        step = self.step
        try:
            if isinstance(step, Fetch) and self.reply is None:
                self.reply = simulation.answer(step, chance)
                return
            if isinstance(step, Commit) and self.reply is None:
                self.reply = simulation.commit(step, chance)
                if self.reply is not None:
                    return
            result = self._do(step, chance)
        except NodeFailure as failure:
            error = failure
            self._go(lambda: self.plan.throw(error))
            return
        if result is not _PENDING:
            self._go(lambda: self.plan.send(result))

    def _do(self, step: Any, chance: Random) -> Any:
        simulation = self.simulation
        if isinstance(step, Commit) and self.reply is None:
            return None
        if isinstance(step, Fetch | Commit):
            assert self.reply is not None
            simulation.pass_time(TICK)
            return self.reply._replace(received_at=simulation.now)
        if isinstance(step, Checkout):
            conn = simulation.checkout(step, chance)
            self.connected_at = simulation.now
            return conn
        if isinstance(step, Return):
            return simulation.give_back(step)
        if isinstance(step, SetReadOnly):
            step.conn.read_only = step.value
            return None
        return self._wait(step, chance)

    def _wait(self, step: Any, chance: Random) -> Any:
        simulation = self.simulation
        if self.waiter is None:
            if isinstance(step, AwaitObservation):
                known = simulation.core.cluster.nodes[step.node].newest
                if known is not None and known.sent_at >= step.after:
                    return known
                seconds = simulation.core.settings.probe_timeout
            else:
                seconds = step.seconds
            self.waiter = simulation.register(step, lambda: None)
            self.ends = simulation.now + seconds
            return _PENDING
        if self.waiter.active and simulation.now < self.ends:
            simulation.pass_time(min(0.02, self.ends - simulation.now + TICK))
            for name in simulation.endpoints if isinstance(step, AwaitPosition) else ():
                simulation.probe(name, chance)
            if isinstance(step, AwaitObservation) and chance.random() < 0.5:
                simulation.probe(step.node, chance)
            return _PENDING
        simulation.core.cluster.give_up(self.waiter)
        seen: Observation | None = self.waiter.seen
        return seen if isinstance(step, AwaitObservation) else None

    def interrupt(self, error: BaseException, *, late: bool = False) -> None:
        """Cancel at the pending step, or ``late``: after it took effect, before it was reported."""
        step = self.step
        if self.waiter is not None:
            self.simulation.core.cluster.give_up(self.waiter)
        if isinstance(step, Fetch | Commit):
            # What the connection would receive next is unknown: the wire closes it.
            step.conn.closed = True
        elif isinstance(step, Return):
            self.simulation.give_back(step)
        elif isinstance(step, SetReadOnly) and late:
            step.conn.read_only = step.value
        self._go(lambda: self.plan.throw(error))

    def finish(self, chance: Random, limit: int = 3000) -> Operation:
        """Run to the end; fails when there is none."""
        for _ in range(limit):
            if self.done:
                return self
            self.advance(chance)
        raise AssertionError(f"the plan goes on for ever; it asks for {self.step!r}")


_PENDING: Final = object()
