"""No sequence of observations, failures and time makes the decision name a node wrongly."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lsn_consistency import Consistency, Position, Reason, Session, Token
from lsn_consistency._decision import admits, decide_at_once, decide_wholly
from lsn_consistency._observation import Observation
from lsn_consistency._settings import PRIMARY_NAME
from lsn_consistency._steps import NodeFailure, identify, observe
from lsn_consistency._verdicts import Fail, Read, Refresh, Serve, Wait
from lsn_consistency.exceptions import RoutingError
from lsn_consistency.lsn import Lsn
from tests.properties.fake_cluster import UNIX_EPOCH, Connection, Endpoint, Simulation
from tests.simulation.servers import BLOCK, SYSTEM, UNIT, Log, Server

START = 16 * BLOCK - 5 * UNIT
STRANGE = 99
NODES = ("primary", "a", "b", "stranger")
LEVELS = (
    Consistency.CAUSAL,
    Consistency.READ_YOUR_WRITES,
    Consistency.STRONG,
    Consistency.EVENTUAL,
    Consistency.bounded(0.7),
    Consistency.sticky(3),
)
shares = st.sampled_from((0.0, 0.3, 1.0))
nodes = st.sampled_from(NODES)
replicas = st.sampled_from(("a", "b", "a", "b", "primary"))


class DecisionMachine(RuleBasedStateMachine):
    """
    Play the servers, the network and the clock against `decide` and `admits`.

    ``believed`` is what an honest reader of the delivered observations knows of each node.
    """

    @initialize(started=st.integers(0, 3))
    def start(self, started: int) -> None:
        log = Log(1, START)
        self.chance = Random(started)
        servers = [Server(name, log, primary=name == "primary") for name in NODES[:3]]
        strange = Log(5, START)
        servers.append(Server("stranger", strange, primary=started == 1, system=STRANGE))
        strange.insert = strange.flush = 2**40
        servers[3].replay = servers[3].receive = 2**40
        self.world = Simulation(
            [Endpoint(server.name, [server]) for server in servers],
            max_lag_seconds=1.5,
            max_fallback_reads=2,
            on_fallback_limit="error",
        )
        self.server = {server.name: server for server in servers}
        self.believed: dict[str, Observation | None] = dict.fromkeys(NODES)
        self.failed_at = dict.fromkeys(NODES, -1.0)
        self.highest = 0
        self.pending: list[tuple[str, Observation]] = []
        self.connections: list[tuple[str, Connection]] = []
        self.tokens: list[Token] = [Token()]
        self.fallbacks: list[str] = []
        if started != 0:
            for name in NODES:
                self.monitor(name)

    # The world

    @rule(asynchronous=st.booleans())
    def commit(self, asynchronous: bool) -> None:
        for server in self.server.values():
            if server.is_primary and server.alive and server.system == SYSTEM:
                commit = server.log.commit(self.world.now, asynchronous=asynchronous)
                position = Position(SYSTEM, commit.timeline, Lsn(commit.end))
                self.tokens = [*self.tokens, Token([position])][-6:]

    @rule()
    def write_without_commit(self) -> None:
        self.server["primary"].log.write()

    @rule(name=replicas, received=shares, replayed=shares)
    def replicate(self, name: str, received: float, replayed: float) -> None:
        self.server[name].replicate(received, replayed)

    @rule(name=replicas, streaming=st.booleans(), paused=st.booleans())
    def hold(self, name: str, streaming: bool, paused: bool) -> None:
        self.server[name].streaming, self.server[name].paused = streaming, paused

    @rule(name=nodes, share=shares, postmaster=st.booleans())
    def crash(self, name: str, share: float, postmaster: bool) -> None:
        self.server[name].crash(share, postmaster=postmaster)

    @rule(name=nodes)
    def stop(self, name: str) -> None:
        self.server[name].stop()

    @rule(name=nodes)
    def restart(self, name: str) -> None:
        self.server[name].alive = True

    @rule(name=nodes, known=st.booleans(), functions=st.booleans())
    def grant(self, name: str, known: bool, functions: bool) -> None:
        self.server[name].timeline_known = known
        self.server[name].wal_functions = functions or name == "primary"

    @rule(name=st.sampled_from(("a", "b")), fenced=st.booleans())
    def promote(self, name: str, fenced: bool) -> None:
        """A branch may be abandoned with its former primary still running, and standbys ahead."""
        promoted = self.server[name]
        if promoted.is_primary or not promoted.alive:
            return
        for server in self.server.values():
            if fenced and server.is_primary and server.system == SYSTEM:
                server.stop()
        promoted.promote(1 + max(server.log.timeline for server in self.ours))

    @rule(name=replicas)
    def follow(self, name: str) -> None:
        newest = max(self.ours, key=lambda server: server.log.timeline)
        if newest is not self.server[name]:
            self.server[name].follow(newest.log)

    @property
    def ours(self) -> list[Server]:
        return [server for server in self.server.values() if server.system == SYSTEM]

    @rule(seconds=st.sampled_from((0.01, 0.2, 0.5, 1.0, 4.0)))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    # What the process learns

    @rule(name=nodes)
    def monitor(self, name: str) -> None:
        """The monitor's observations come in order."""
        endpoint = self.world.endpoints[name]
        before = self.world.now
        self.world.probe(name, self.chance)
        seen = self.world.core.cluster.nodes[name].newest
        if endpoint.monitor is None:
            self.believe_failure(name)
        elif seen is not None and seen.sent_at > before:
            self.believe(name, seen)
        else:
            raise AssertionError("the monitor's observation was not taken")

    @rule(name=nodes, forget=st.sampled_from(("nothing", "nothing", "lsn", "timeline")))
    def ask(self, name: str, forget: str) -> None:
        """An answer that is on its way; what it leaves out is NULL."""
        server = self.server[name]
        if not server.alive:
            return
        conn = Connection(server, self.world.endpoints[name])
        _, seen = self.world.fetch_all(identify(conn), self.chance)
        self.pending.append((name, _without(seen, forget)))

    @precondition(lambda self: self.pending)
    @rule(index=st.integers(0, 20))
    def answer(self, index: int) -> None:
        """Answers come late and out of order."""
        name, seen = self.pending.pop(index % len(self.pending))
        self.world.pass_time(0.001)
        self.world.core.observed(name, seen)
        self.believe(name, seen)

    @rule(name=nodes)
    def lose(self, name: str) -> None:
        self.world.pass_time(0.001)
        self.world.core.failed(name, ConnectionError("lost"))
        self.believe_failure(name)

    @rule(name=nodes)
    def connect(self, name: str) -> None:
        server = self.server[name]
        if not server.alive:
            return
        conn = Connection(server, self.world.endpoints[name])
        identity, seen = self.world.fetch_all(identify(conn), self.chance)
        self.world.core.met(name, conn, identity, seen)
        self.believe(name, seen)
        self.connections.append((name, conn))

    def believe(self, name: str, seen: Observation) -> None:
        known = self.believed[name]
        if seen.sent_at <= self.failed_at[name] or (known and known.sent_at > seen.sent_at):
            return
        self.believed[name] = seen
        if not seen.in_recovery and seen.server.system_id == SYSTEM:
            self.highest = max(self.highest, seen.timeline or 0)

    def believe_failure(self, name: str) -> None:
        self.believed[name] = None
        self.failed_at[name] = self.world.now

    # Tokens and load

    @rule(
        pin=st.sampled_from((None, -1.0, 2.0)),
        mine=st.booleans(),
        others=st.sampled_from((0, 1, 8)),
    )
    def carry(self, pin: float | None, mine: bool, others: int) -> None:
        """A token may name foreign systems, be full, be pinned, or be ahead of everything."""
        positions = [Position(2**63 + number, 1, Lsn(START)) for number in range(others)]
        if mine:
            positions.append(Position(SYSTEM, 1 + self.highest, Lsn(START + 10 * UNIT)))
        until = None if pin is None else UNIX_EPOCH + self.world.now + pin
        self.tokens = [*self.tokens, Token(positions, until)][-6:]

    @rule(first=st.integers(0, 5), second=st.integers(0, 5))
    def merge(self, first: int, second: int) -> None:
        count = len(self.tokens)
        self.tokens.append(self.tokens[first % count].merge(self.tokens[second % count]))
        del self.tokens[:-6]

    @rule(name=nodes)
    def fall_back(self, name: str) -> None:
        """Count a fallback read in; over the limit it is not counted."""
        before = len(self.fallbacks)
        entered = self.world.core.cluster.enter(self.world.core.cluster.nodes[name], fallback=True)
        assert entered == (before < 2)
        if entered:
            self.fallbacks.append(name)

    @precondition(lambda self: self.fallbacks)
    @rule()
    def come_back(self) -> None:
        name = self.fallbacks.pop()
        self.world.core.cluster.leave(self.world.core.cluster.nodes[name], fallback=True)

    # Reads

    @rule(
        waited=st.booleans(),
        refreshed=st.booleans(),
        down=st.sampled_from((False, False, True)),
        excluded=st.sampled_from((None, None, "a", "b")),
        refused=st.sampled_from((None, None, "a", "b")),
    )
    def read(
        self,
        waited: bool,
        refreshed: bool,
        down: bool,
        excluded: str | None,
        refused: str | None,
    ) -> None:
        """Every level reads with every token."""
        for level in LEVELS:
            for token in self.tokens:
                read = self.world.core.new_read(Session(), token, level)
                read.waited, read.refreshed = waited, refreshed
                read.waiting_since = 0.0 if waited else None
                read.primary_error = ConnectionError("down") if down else None
                read.excluded = {excluded} if excluded else set()
                read.refused = {refused} if refused else set()
                self.check(read)

    def check(self, read: Read) -> None:
        core = self.world.core
        verdict = core.decide(read)
        self.check_at_once(read)
        if isinstance(verdict, Fail):
            assert isinstance(verdict.error, RoutingError)
            assert read.primary_error or core.cluster.primary is None or self.is_ahead(read)
        elif isinstance(verdict, Wait):
            assert not read.waited
            assert verdict.required == self.required(read)
        elif isinstance(verdict, Refresh):
            assert not read.refreshed
            assert set(verdict.names) <= set(NODES)
        elif verdict.primary:
            self.check_primary(read, verdict)
        else:
            self.check_replica(read, verdict)

    def check_at_once(self, read: Read) -> None:
        """What is decided at once is what the rules say, for whichever replica is preferred."""
        now, random = self.world.now, self.chance.random
        cluster = self.world.core.cluster
        for preferred in (None, *NODES):
            known = cluster.listed()
            found = decide_at_once(known, read.level, read.token, preferred, now, random)
            if found is None or not read.is_new:
                continue
            candidate, required = found
            asked = replace(read, preferred=candidate.node.name)
            ruled = decide_wholly(cluster, asked, now, UNIX_EPOCH + now, random)
            assert isinstance(ruled, Serve)
            assert (candidate.node, required) == (ruled.node, ruled.required)
            assert ruled.lag_seconds == now - candidate.moment
            assert (False, False, False) == (ruled.primary, ruled.ask, ruled.stale)
            preference = read.preferred if preferred is None else preferred
            if preference != candidate.node.name:
                asked = replace(read, preferred=preference)
                other = decide_wholly(cluster, asked, now, UNIX_EPOCH + now, random)
                assert isinstance(other, Serve)
                assert other.node.name != preference, "the preferred replica could serve"

    def required(self, read: Read) -> Position | None:
        system = self.world.core.cluster.system_id
        if not read.level.uses_token:
            return None
        if system is None and len(read.token.positions) == 1:
            return next(iter(read.token.positions.values()))
        return None if system is None else read.token.get(system)

    def is_ahead(self, read: Read) -> bool:
        looks = read.level.uses_token or read.level == Consistency.STRONG
        named = read.token.get(SYSTEM) if looks else None
        return named is not None and named.timeline > self.highest

    def check_primary(self, read: Read, serve: Serve) -> None:
        """The primary is named only while it is, by what was observed, the primary."""
        seen = self.believed[serve.node.name]
        assert read.primary_error is None
        if seen is None:
            # Nothing is known of it: it was the primary last, or is configured so.
            return
        assert not seen.in_recovery
        assert seen.server.system_id == SYSTEM or self.believed[PRIMARY_NAME] is None
        if seen.server.system_id == SYSTEM:
            assert (seen.timeline or 0) == self.highest
        assert serve.reason in {
            Reason.PRIMARY_REQUIRED,
            Reason.NOT_CAUGHT_UP,
            Reason.LAG_EXCEEDED,
            Reason.TIMELINE_CHANGED,
            Reason.NO_REPLICA,
        }

    def check_replica(self, read: Read, serve: Serve) -> None:
        """A replica is named only on YES, by what was observed and by what is true."""
        cluster = self.world.core.cluster
        name = serve.node.name
        seen = self.believed[name]
        required = self.required(read)
        assert seen is not None, "an unknown replica is named"
        assert seen.in_recovery
        assert name not in read.excluded | read.refused
        assert read.level != Consistency.STRONG
        until = read.token.pin_until
        if read.level.uses_token or read.level.name == "sticky":
            assert until is None or until <= UNIX_EPOCH + self.world.now
        if read.level.uses_token and read.token.is_full:
            assert required is not None, "a full token may have lost our position"
        assert serve.required == required
        assert seen.server.system_id == (
            cluster.system_id if required is None else required.system_id
        )
        if required is not None:
            assert seen.timeline == required.timeline
            assert seen.lsn is not None
            assert seen.lsn >= required.lsn
        if serve.reason is Reason.PRIMARY_DOWN:
            primary = cluster.primary
            unreachable = primary is None or self.believed[primary.name] is None
            assert read.primary_error is not None or unreachable
            assert read.level.uses_token
        else:
            assert serve.reason is (Reason.CAUGHT_UP if required else Reason.WITHIN_LAG)
        self.check_connections(read, serve, required)

    def check_connections(self, read: Read, serve: Serve, required: Position | None) -> None:
        core = self.world.core
        for name, conn in self.connections:
            if name != serve.node.name or not conn.is_alive:
                continue
            facts = core.facts_of(conn)
            assert facts is not None
            known = core.usable(facts, self.world.now)
            try:
                probe = observe(conn, facts.identity, in_recovery=facts.in_recovery)
                asked = self.world.fetch_all(probe, self.chance)
            except NodeFailure:
                continue
            for seen in (known, asked):
                if seen is not None and admits(core.cluster, read, serve, seen, self.world.now):
                    self.check_truth(conn.server, read, serve, required)

    def check_truth(
        self, server: Server, read: Read, serve: Serve, required: Position | None
    ) -> None:
        assert server.system == SYSTEM or self.believed[PRIMARY_NAME] is None
        if required is not None:
            assert required.system_id == server.system
            # One that was promoted a moment ago shows what it had replayed.
            assert server.is_primary or required.timeline == server.log.timeline
            assert required.lsn <= server.replay
        if serve.reason is not Reason.PRIMARY_DOWN:
            assert server.staleness(self.world.now) <= read.lag_limit + 1e-3

    @invariant()
    def a_former_primary_stays_one(self) -> None:
        if not hasattr(self, "world"):
            return
        cluster = self.world.core.cluster
        primary = cluster.primary
        if primary is not None and primary.newest is not None and cluster.system_id == SYSTEM:
            assert (primary.newest.timeline or 0) >= self.highest


def _without(seen: Observation, what: str) -> Observation:
    if what == "lsn":
        return seen._replace(lsn=None, bound=None)
    return seen._replace(timeline=None) if what == "timeline" else seen


TestDecision = DecisionMachine.TestCase
TestDecision.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestDecision = pytest.mark.timeout(120)(TestDecision)
