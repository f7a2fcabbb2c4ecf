"""Plans keep their promises at the server that runs the statement, and give back what they took."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lsn_consistency import Consistency, Position, Reason, Session, Token, _endings, _plans, _writes
from lsn_consistency._leases import Lease
from lsn_consistency._steps import Plan
from lsn_consistency.exceptions import NoNodeAvailableError, RoutingError
from lsn_consistency.lsn import Lsn
from tests.properties.fake_cluster import TICK, UNIX_EPOCH, Endpoint, Operation, Simulation
from tests.simulation.servers import BLOCK, SYSTEM, UNIT, Commit, Log, Server

START = 16 * BLOCK - 5 * UNIT
MAX_LAG = 1.5
PIN = 3.0
LEVELS = (
    Consistency.CAUSAL,
    Consistency.READ_YOUR_WRITES,
    Consistency.STRONG,
    Consistency.EVENTUAL,
    Consistency.bounded(0.7),
)
NAMES = ("p", "a", "b", "c")
WRITING = _writes.Writing()
names = st.sampled_from(NAMES)
shares = st.sampled_from((0.0, 0.4, 1.0))
seeds = st.integers(0, 2**16)


@dataclass
class Client:
    """Be one session, and remember what it must never miss again."""

    session: Session = field(default_factory=Session)
    must_see: list[Commit] = field(default_factory=list)

    def covers(self, commit: Commit) -> bool:
        held = self.session.token.get(SYSTEM)
        return held is not None and held >= Position(SYSTEM, commit.timeline, Lsn(commit.end))


class Work(ABC):
    """
    Be one read or write: its opening plan, what happens on the connection, its closing plan.
    """

    def __init__(self, world: Simulation, client: Client, level: Consistency) -> None:
        self.world = world
        self.client = client
        self.level = level
        self.lease: Lease | None = None
        self.finished = False
        # The highest timeline that was known when the work began.
        self.timeline = world.core.cluster.timeline
        self.operation = self.opened()

    @abstractmethod
    def opened(self) -> Operation:
        """Begin the opening plan."""

    @abstractmethod
    def body(self, lease: Lease, chance: Random) -> Operation:
        """Use the connection, and begin the closing plan."""

    @abstractmethod
    def closed(self, lease: Lease) -> None:
        """Judge what the work has promised."""

    def advance(self, chance: Random) -> None:
        if not self.operation.done:
            self.operation.advance(chance)
        self.turn(chance)

    def interrupt(self, chance: Random, *, late: bool) -> None:
        if not self.operation.done:
            kind = chance.choice((asyncio.CancelledError, KeyboardInterrupt))
            self.operation.interrupt(kind(), late=late)
        self.turn(chance)

    def turn(self, chance: Random) -> None:
        if self.finished or not self.operation.done:
            return
        error = self.operation.error
        if self.lease is None and error is None:
            self.lease = self.operation.result
            assert self.lease is not None
            self.operation = self.body(self.lease, chance)
            self.turn(chance)
            return
        self.finished = True
        assert error is None or isinstance(error, EXPECTED), repr(error)
        assert "attempts" not in str(error)
        if self.lease is not None:
            assert error is None or isinstance(error, CANCELLATIONS), repr(error)
            self.closed(self.lease)


CANCELLATIONS = (asyncio.CancelledError, KeyboardInterrupt)
EXPECTED = (*CANCELLATIONS, RoutingError, ConnectionError, TimeoutError)


class ReadWork(Work):
    """Read, and check against the server that ran the statement."""

    def __init__(self, *args: Any, forced: str | None = None) -> None:
        self.forced = forced
        super().__init__(*args)

    def opened(self) -> Operation:
        world, session = self.world, self.client.session
        self.reading = _plans.Reading(None, self.level, self.forced)
        self.must_see = list(self.client.must_see)
        self.seen: list[Commit] = []
        self.covered = [commit for commit in self.must_see if self.client.covers(commit)]
        return Operation(world, self.reading.open(world.core, session))

    def body(self, lease: Lease, chance: Random) -> Operation:
        world = self.world
        conn = lease.conn
        interrupted = chance.random() < 0.1
        assert conn in world.endpoints[lease.node].out
        if conn.is_alive:
            conn.reroute(chance)
            self.run(lease, conn.server)
            # A standby's given connection is left as it is; a promotion may come at this moment.
            left = conn.endpoint.given and conn.autocommit and not lease.route.is_primary
            assert conn.only_reads or left
            if self.level == Consistency.CAUSAL:
                self.seen = conn.server.visible()
        else:
            conn.closed = True
        return Operation(world, self.end(lease, interrupted))

    def end(self, lease: Lease, interrupted: bool) -> Plan[None]:
        core, session = self.world.core, self.client.session
        try:
            if not interrupted:
                yield from self.reading.commit(core, lease) or ()
        except BaseException:
            interrupted = True
            raise
        finally:
            # The block's end closes the transaction that the check opened.
            lease.conn.in_transaction = False
            yield from _endings.close_read(core, session, lease, interrupted=interrupted)

    def run(self, lease: Lease, server: Server) -> None:
        """Judge what the statement sees, by the truth."""
        route = lease.route
        if route.reason is Reason.FORCED or route.stale:
            return
        if route.reason is Reason.PRIMARY_REQUIRED or self.level == Consistency.STRONG:
            assert route.is_primary
        if route.is_primary:
            assert server.is_primary
            assert server.log.timeline >= self.timeline, "a former primary serves a read"
        elif route.reason in (Reason.CAUGHT_UP, Reason.WITHIN_LAG):
            limit = self.level.lag_limit(MAX_LAG)
            # It was judged when the connection was there, or later.
            since = self.world.now - self.operation.connected_at
            assert server.staleness(self.world.now) <= limit + since
        if self.level.uses_token:
            # What only a pin covered, a replica shows by its bounded lag.
            due = self.covered if route.reason is Reason.PRIMARY_DOWN else self.must_see
            shown = set(server.visible())
            missing = [c for c in due if c not in shown and not _is_lost(c, server)]
            assert missing == [], f"{route} misses {missing} of {server.name}"

    def closed(self, lease: Lease) -> None:
        pinned = _is_pinned(self.client.session, self.world)
        if self.level == Consistency.CAUSAL and not self.limited(lease):
            assert pinned or all(map(self.client.covers, self.seen))
            # From now on: what runs beside this read need not be in its order.
            self.client.must_see += self.seen

    def limited(self, lease: Lease) -> bool:
        # Without a walreceiver and without a primary there is no bound; docs/limits.md says so.
        return not lease.route.is_primary and bool(
            self.world.core.cluster.nodes["primary"].failures
        )


class WriteWork(Work):
    """Write, and check that the session knows of it afterwards."""

    def opened(self) -> Operation:
        self.commit: Commit | None = None
        return Operation(self.world, _writes.open_write(self.world.core, self.client.session))

    def body(self, lease: Lease, chance: Random) -> Operation:
        world, conn = self.world, lease.conn
        what = chance.choice(("commit", "commit", "asynchronous", "nothing", "lost"))
        if conn.is_alive:
            conn.reroute(chance)
            if conn.server.is_primary:
                assert conn.server.log.timeline >= self.timeline, "a former primary takes a write"
            assert not conn.read_only
            assert not conn.session_read_only
        if conn.is_alive and conn.server.is_primary and what != "nothing":
            log = conn.server.log
            self.commit = log.commit(world.now, asynchronous=what == "asynchronous")
        if what == "lost" or not conn.is_alive:
            conn.closed = True
        world.pass_time(TICK)
        interrupted = chance.random() < 0.2
        return Operation(world, self.end(lease, interrupted))

    def end(self, lease: Lease, interrupted: bool) -> Plan[None]:
        core, session = self.world.core, self.client.session
        try:
            if not interrupted:
                yield from WRITING.commit(core, lease) or ()
        except BaseException:
            interrupted = True
            raise
        finally:
            yield from _writes.close_write(core, session, lease, interrupted=interrupted)

    def closed(self, lease: Lease) -> None:
        assert self.client.session.wrote
        if self.commit is not None:
            pinned = _is_pinned(self.client.session, self.world)
            assert pinned or self.client.covers(self.commit)
            self.client.must_see.append(self.commit)


def _is_pinned(session: Session, world: Simulation) -> bool:
    until = session.token.pin_until
    return until is not None and until > UNIX_EPOCH + world.now


def _is_lost(commit: Commit, server: Server) -> bool:
    """Tell whether a crash, or a failover to this server's timeline, dropped the commit."""
    if commit in server.log.lost:
        return True
    return commit.timeline < server.log.timeline and commit not in server.log.commits


class PlanMachine(RuleBasedStateMachine):
    """
    Interleave reads, writes, probes and faults, a step at a time.
    """

    @initialize(
        seed=seeds,
        hidden=st.booleans(),
        pooled=st.booleans(),
        given=st.booleans(),
        autocommit=st.booleans(),
        own=st.sampled_from((None, False)),
        limited=st.sampled_from((None, 1)),
        action=st.sampled_from(("wait", "stale", "error")),
    )
    def start(
        self,
        seed: int,
        hidden: bool,
        pooled: bool,
        given: bool,
        autocommit: bool,
        own: bool | None,
        limited: int | None,
        action: str,
    ) -> None:
        self.world = make_world(
            hidden=hidden,
            pooled=pooled,
            given=given,
            autocommit=autocommit,
            own_read_only=own,
            max_fallback_reads=limited,
            on_fallback_limit=action,
        )
        self.server = {server.name: server for server in self.world.servers}
        self.clients = [Client(), Client()]
        self.work: list[Work] = []
        self.others: list[Operation] = []
        self.world.probe_all(Random(seed))

    # The world

    @rule(asynchronous=st.booleans())
    def commit(self, asynchronous: bool) -> None:
        for server in self.server.values():
            if server.is_primary and server.alive:
                server.log.commit(self.world.now, asynchronous=asynchronous)

    @rule(received=shares, replayed=shares, name=names)
    def replicate(self, received: float, replayed: float, name: str) -> None:
        self.server[name].replicate(received, replayed)

    @rule(paused=st.booleans(), streaming=st.booleans(), applying=st.booleans(), name=names)
    def hold(self, paused: bool, streaming: bool, applying: bool, name: str) -> None:
        server = self.server[name]
        server.paused = paused
        server.streaming = streaming
        server.applying = applying and streaming

    @rule(share=shares, postmaster=st.booleans(), name=names)
    def crash(self, share: float, postmaster: bool, name: str) -> None:
        self.server[name].crash(share, postmaster=postmaster)

    @rule(name=names, what=st.sampled_from(("stop", "start", "start", "freeze", "thaw", "thaw")))
    def fault(self, name: str, what: str) -> None:
        server = self.server[name]
        if what == "stop":
            server.stop()
        elif what == "start":
            server.alive = True
        else:
            server.frozen = what == "freeze"

    @rule(node=st.sampled_from(("primary", "a", "x")), full=st.booleans())
    def fill_pool(self, node: str, full: bool) -> None:
        if node in self.world.endpoints:
            self.world.endpoints[node].full = full

    @rule(name=st.sampled_from(("a", "b")), fenced=st.booleans())
    def promote(self, name: str, fenced: bool) -> None:
        promoted = self.server[name]
        if promoted.is_primary or not promoted.alive:
            return
        for server in self.server.values():
            if fenced and server.is_primary:
                server.stop()
        promoted.promote(1 + max(server.log.timeline for server in self.server.values()))

    @rule(name=names)
    def follow(self, name: str) -> None:
        newest = max(self.server.values(), key=lambda server: server.log.timeline)
        if newest is not self.server[name] and newest.is_primary:
            self.server[name].follow(newest.log)

    @rule(seconds=st.sampled_from((0.01, 0.3, 1.0, 4.0)))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(seed=seeds)
    def probe(self, seed: int) -> None:
        self.world.probe_all(Random(seed))

    # The clients

    @precondition(lambda self: len(self.work) < 4)
    @rule(
        client=st.integers(0, 1),
        level=st.sampled_from((0, 0, 0, 1, 2, 3, 4)),
        forced=st.sampled_from((None, None, None, "a")),
    )
    def read(self, client: int, level: int, forced: str | None) -> None:
        self.work.append(ReadWork(self.world, self.clients[client], LEVELS[level], forced=forced))

    @precondition(lambda self: len(self.work) < 4)
    @rule(client=st.integers(0, 1))
    def write(self, client: int) -> None:
        self.work.append(WriteWork(self.world, self.clients[client], Consistency.CAUSAL))

    @rule(client=st.integers(0, 1), seed=seeds, behind=st.sampled_from((None, "a", "b", "c")))
    def write_and_read(self, client: int, seed: int, behind: str | None) -> None:
        """The usual course: a write, some replicas replay it, and a read that must see it."""
        chance = Random(seed)
        work: Work = WriteWork(self.world, self.clients[client], Consistency.CAUSAL)
        self.run_through(work, chance)
        for server in self.server.values():
            if server.name != behind:
                server.replicate(1.0, 1.0)
        if chance.random() < 0.5:
            self.world.probe_all(chance)
        self.run_through(ReadWork(self.world, self.clients[client], Consistency.CAUSAL), chance)

    def run_through(self, work: Work, chance: Random) -> None:
        self.work.append(work)
        for _ in range(3000):
            if work.finished:
                break
            work.advance(chance)
        assert work.finished, "a plan goes on for ever"
        self.forget()

    @precondition(lambda self: self.work)
    @rule(index=st.integers(0, 3), seed=seeds, steps=st.sampled_from((1, 1, 3, 40)))
    def advance(self, index: int, seed: int, steps: int) -> None:
        work = self.work[index % len(self.work)]
        chance = Random(seed)
        for _ in range(steps):
            work.advance(chance)
        self.forget()

    @precondition(lambda self: self.work)
    @rule(index=st.integers(0, 3), seed=seeds, late=st.booleans())
    def interrupt(self, index: int, seed: int, late: bool) -> None:
        self.work[index % len(self.work)].interrupt(Random(seed), late=late)
        self.forget()

    @rule(client=st.integers(0, 1), level=st.sampled_from((0, 1, 2)), seed=seeds)
    def choose(self, client: int, level: int, seed: int) -> None:
        core, session = self.world.core, self.clients[client].session
        plan = _plans.choose(core, session, core.new_read(session, None, LEVELS[level]))
        chosen = Operation(self.world, plan).finish(Random(seed))
        assert chosen.error is None or isinstance(chosen.error, RoutingError)

    @rule(client=st.integers(0, 1), seed=seeds)
    def capture(self, client: int, seed: int) -> None:
        """What an application commits by itself is covered after a capture."""
        world, owner = self.world, self.clients[client]
        primary = world.core.cluster.primary
        servers = world.endpoints[primary.name].servers if primary else []
        commits = [
            server.log.commit(world.now, asynchronous=True)
            for server in servers
            if server.is_primary and server.alive and len(servers) == 1
        ]
        captured = Operation(world, _writes.capture(world.core, owner.session)).finish(Random(seed))
        assert captured.error is None
        assert owner.session.wrote
        newest = max(server.log.timeline for server in self.server.values())
        for commit in commits:
            known = world.core.cluster.timeline
            if commit.timeline == newest == known and commit in servers[0].log.commits:
                assert owner.covers(commit) or _is_pinned(owner.session, world)

    @rule(seed=seeds)
    def token(self, seed: int) -> None:
        taken = Operation(self.world, _writes.primary_token(self.world.core)).finish(Random(seed))
        assert isinstance(taken.result, Token) or isinstance(taken.error, NoNodeAvailableError)

    def forget(self) -> None:
        self.work = [work for work in self.work if not work.finished]
        if not self.work:
            self.world.check_idle()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        chance = Random(1)
        for _ in range(3000):
            if not self.work:
                break
            for work in self.work:
                work.advance(chance)
            self.forget()
        assert [] == self.work
        self.world.check_idle()


def make_world(
    *,
    hidden: bool = False,
    pooled: bool = False,
    given: bool = False,
    autocommit: bool = False,
    own_read_only: bool | None = None,
    **options: Any,
) -> Simulation:
    log = Log(1, START)
    primary = Server("p", log, primary=True)
    a, b, c = (Server(name, log) for name in "abc")
    kept: dict[str, Any] = {
        "given": given,
        "autocommit": autocommit,
        "own_read_only": own_read_only,
    }
    endpoints = [Endpoint("primary", [primary], **kept), Endpoint("a", [a], **kept)]
    if hidden or pooled:
        endpoints.append(Endpoint("x", [b, c], pooled=pooled, **kept))
    else:
        endpoints += [Endpoint("b", [b], **kept), Endpoint("c", [c], **kept)]
    options = {"max_lag_seconds": MAX_LAG, "pin_seconds": PIN, "wait_seconds": 0.1, **options}
    return Simulation(endpoints, **options)


TestPlans = PlanMachine.TestCase
TestPlans.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)
TestPlans = pytest.mark.timeout(120)(TestPlans)
