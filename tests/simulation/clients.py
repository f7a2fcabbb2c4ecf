"""
Clients: what they do through a router, what they record, and what is judged on the spot.

A client works in units, each a session with the client's token, in one process. What it must never
miss again is known exactly here, so each read is judged by the truth of the server that ran it. The
history goes to the checker, which knows nothing of all this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, Final

from lsn_consistency import Consistency, Position, Reason, Session, Token, _endings, _plans, _writes
from lsn_consistency._leases import Lease
from lsn_consistency.exceptions import RoutingError
from lsn_consistency.lsn import Lsn
from lsn_consistency.testing.checker import CAUSAL, Guarantee, Operation
from tests.simulation.loop import Steps
from tests.simulation.network import Connection
from tests.simulation.process import UNIX_EPOCH, Process
from tests.simulation.servers import SYSTEM, Commit, Server

if TYPE_CHECKING:
    from tests.simulation.world import World

THREAD_SECONDS: Final = 0.01
KEYS: Final = ("x", "y", "z")
NO_GUARANTEE: Final[frozenset[Guarantee]] = frozenset()
OWN_WRITES: Final[frozenset[Guarantee]] = frozenset({"read_your_writes"})
BOUNDED: Final = Consistency.bounded(0.25)
LEVELS: Final = (
    *(Consistency.CAUSAL,) * 8,
    Consistency.READ_YOUR_WRITES,
    Consistency.STRONG,
    Consistency.EVENTUAL,
    BOUNDED,
)

WRITING: Final = _writes.Writing()
REFUSALS: Final = (RoutingError, ConnectionError, TimeoutError, PermissionError)


class Cancelled(BaseException):
    """Cancel an operation, as a task or a thread is cancelled."""


class Violated(AssertionError):
    """A promise was broken, by the truth that the servers know."""


@dataclass(eq=False)
class Client:
    """Be one client, wherever its requests are served."""

    name: str
    world: World
    chance: Random
    token: Token = field(default_factory=Token)
    must_see: set[Commit] = field(default_factory=set)
    known: frozenset[Commit] = frozenset()
    told: list[tuple[Token, frozenset[Commit]]] = field(default_factory=list)

    def run(self, units: Callable[[], bool]) -> Steps:
        """Make requests, in any process, for as long as there is time."""
        while units():
            process = self.chance.choice(self.world.processes)
            try:
                yield self.chance.expovariate(1 / self.world.shape.think_seconds)
                yield from self.unit(process)
            except Cancelled:
                self.world.count("cancelled operations")

    def unit(self, process: Process) -> Steps:
        """Serve one request, which begins with what other services said."""
        for token, commits in self.told:
            self.token = self.token.merge(token)
            self.must_see |= commits
        self.told.clear()
        session = Session(self.token)
        try:
            for _ in range(self.chance.choice((1, 1, 2, 3))):
                one = self._two if self.chance.random() < 0.08 else self._one
                yield from one(process, session)
        finally:
            self.token = session.token
            self.known = frozenset(self.must_see)

    def _two(self, process: Process, session: Session) -> Steps:
        """Two threads of one request share its session."""
        self.world.count("requests with two threads")
        interrupted: Cancelled | None = None
        other = self.world.loop.start(self._one(process, session))
        try:
            yield from self._one(process, session)
        except Cancelled as error:
            interrupted = error
        while not other.done:
            try:
                yield THREAD_SECONDS
            except Cancelled as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def _one(self, process: Process, session: Session) -> Steps:
        draw = self.chance.random()
        if draw < 0.36:
            yield from Write(self, process, session).run()
        elif draw < 0.92:
            yield from ReadOnce(self, process, session, self.chance.choice(LEVELS)).run()
        elif draw < 0.95:
            yield from self._choose(process, session)
        elif draw < 0.97:
            yield from self._forced(process, session)
        else:
            yield from self._capture(process, session)

    def tell(self, other: Client) -> None:
        """Hand the token over, as `inject` and `extract` do between services."""
        other.told.append((self.token, self.known))

    def _choose(self, process: Process, session: Session) -> Steps:
        core = process.core
        read = core.new_read(session, None, Consistency.CAUSAL)
        try:
            yield from process.run(_plans.choose(core, session, read))
        except RoutingError:
            self.world.count("choices without a node")

    def _forced(self, process: Process, session: Session) -> Steps:
        """A read by name promises nothing, and must do no harm."""
        core = process.core
        read = core.new_read(session, None, Consistency.CAUSAL)
        name = self.chance.choice(list(process.endpoints))
        try:
            lease = yield from process.run(_plans.open_forced(core, session, read, name))
        except REFUSALS:
            return
        assert lease.conn.only_reads or _is_left_alone(lease)
        yield from process.run(_endings.close_read(core, session, lease, interrupted=False))

    def _capture(self, process: Process, session: Session) -> Steps:
        """Write with an engine of one's own, and take the position afterwards."""
        core = process.core
        primary = core.cluster.primary
        servers = process.endpoints[primary.name].servers if primary is not None else []
        server = servers[0] if len(servers) == 1 else None
        if server is not None and self._can_write(server, process):
            commit = server.log.commit(
                self.world.loop.now, asynchronous=True, key="own", value=self.world.next_value()
            )
            self.world.written(commit, server.log)
            yield from process.run(_writes.capture(core, session))
            assert session.wrote
            if _covers(session, commit) or _is_pinned(session, process):
                self.must_see.add(commit)
            else:
                known = core.cluster.timeline
                line = server.log.timeline
                # It was a former primary, or the primary of another moment.
                if line >= known and commit in self.world.line and not self.world.is_split:
                    raise Violated(f"{self.name}: capture() does not cover {commit}")

    def _can_write(self, server: Server, process: Process) -> bool:
        cut = self.world.network.is_cut(process.name, server.name)
        return server.is_primary and server.alive and not server.frozen and not cut


class Write:
    """Write one value through the router."""

    def __init__(self, client: Client, process: Process, session: Session) -> None:
        self.client = client
        self.process = process
        self.session = session
        self.world = client.world
        self.key = client.chance.choice(KEYS)
        self.value = self.world.next_value()
        self.commit: Commit | None = None
        self.outcome = "failed"
        self.server: Server | None = None

    def run(self) -> Steps:
        world, core = self.world, self.process.core
        began = world.loop.now
        token_in = self.session.token
        # The highest timeline that was known when the write began.
        self.timeline = core.cluster.timeline
        try:
            opening = _writes.open_write(core, self.session)
            lease = yield from self.process.run(opening)
        except REFUSALS:
            world.count("writes refused")
            return
        interrupted = False
        try:
            yield from self._insert(lease.conn)
            if commit := WRITING.commit(core, lease):
                yield from self.process.run(commit)
        except (ConnectionError, TimeoutError, PermissionError):
            world.count("writes lost on the way")
        except BaseException:
            interrupted = True
            lease.conn.closed = True
            raise
        finally:
            closing = _writes.close_write(core, self.session, lease, interrupted=interrupted)
            try:
                yield from self.process.run(closing)
            finally:
                self._note(began, token_in)

    def _insert(self, conn: Connection) -> Steps:
        chance = self.client.chance
        if chance.random() < 0.06:
            # The transaction is rolled back; it has written WAL all the same.
            yield from self.process.execute(conn, lambda: conn.server.log.write())
            return
        hold = chance.choice((0.0005, 0.001, 0.004, self.world.shape.commit_seconds))
        asynchronous = chance.random() < self.world.shape.asynchronous
        work = partial(self._commit, conn, hold, asynchronous)
        yield from self.process.execute(conn, work, hold)
        self.outcome = "ok"

    def _commit(self, conn: Connection, hold: float, asynchronous: bool) -> None:
        server = conn.server
        if not server.is_primary or conn.only_reads:
            if server.is_primary:
                raise Violated(f"{self.client.name}: a write was given a read-only connection")
            raise PermissionError("cannot execute INSERT in a read-only transaction")
        if server.log.timeline < self.timeline:
            raise Violated(f"{self.client.name}: the former primary {server.name} takes a write")
        world, log = self.world, server.log
        self.server = server
        self.outcome = "unknown"
        commit = log.commit(
            world.loop.now, asynchronous=asynchronous, key=self.key, value=self.value
        )
        log.pending.add(commit)
        world.loop.call_later(hold, lambda: log.pending.discard(commit))
        world.written(commit, log)
        self.commit = commit

    def _note(self, began: float, token_in: Token) -> None:
        client, commit = self.client, self.commit
        assert self.session.wrote
        if commit is None:
            return
        client.world.trace(client.name, "wrote", commit, self.session.token)
        assert self.server is not None
        covered = _covers(self.session, commit) or _is_pinned(self.session, self.process)
        # What a crash or a restore took away before its position was taken is covered by nothing.
        if not covered and commit in self.server.log.commits and not client.world.is_split:
            raise Violated(f"{client.name}: {self.session.token} does not cover {commit}")
        client.must_see.add(commit)
        client.world.record(
            Operation(
                client.name,
                "write",
                began,
                client.world.loop.now,
                {self.key: frozenset({self.value})},
                outcome="ok" if self.outcome == "ok" else "unknown",
                node=None if self.server is None else self.server.name,
                role="primary",
                token_in=repr(token_in),
                token_out=repr(self.session.token),
            )
        )


class ReadOnce:
    """Read through the router, and judge what the statement saw."""

    def __init__(
        self, client: Client, process: Process, session: Session, level: Consistency
    ) -> None:
        self.client = client
        self.process = process
        self.session = session
        self.level = level
        self.world = client.world
        self.keys = KEYS if client.chance.random() < 0.5 else (client.chance.choice(KEYS),)
        self.due = frozenset[Commit]()
        self.shown: set[Commit] | None = None
        self.server: Server | None = None

    def run(self) -> Steps:
        """Return the route, or None without one; what it saw is recorded and judged."""
        world, core, session = self.world, self.process.core, self.session
        self.began = world.loop.now
        self.due = frozenset(self.client.must_see)
        self.timeline = core.cluster.timeline
        self.token = session.token
        reading = _plans.Reading(None, self.level, None)
        try:
            lease = yield from self.process.run(reading.open(core, session))
        except REFUSALS as error:
            self._refused(error)
            return None
        self.opened = world.loop.now
        self.role = lease.route.role
        interrupted = False
        try:
            yield from self.process.execute(lease.conn, partial(self._see, lease))
            if self.client.chance.random() < 0.2:
                # The user has ended the transaction, and a pooler may change the server.
                lease.conn.end_transaction()
            if commit := reading.commit(core, lease):
                yield from self.process.run(commit)
        except (ConnectionError, TimeoutError):
            world.count("reads lost on the way")
            self.shown = None
        except BaseException:
            self.shown = None
            interrupted = True
            raise
        finally:
            lease.conn.end_transaction()
            plan = _endings.close_read(core, session, lease, interrupted=interrupted)
            yield from self.process.run(plan)
        if self.shown is not None:
            self._note(lease)
        return lease.route

    def _refused(self, error: BaseException) -> None:
        assert "attempts" not in str(error), error
        self.world.count("reads refused")
        self.world.trace(self.client.name, "was refused", self.level, error)

    def _see(self, lease: Lease) -> None:
        """Be the statement at the server: one snapshot, and the truth about it."""
        server: Server = lease.conn.server
        route = lease.route
        self.server = server
        shown = self.shown = set(server.visible())
        world = self.world
        world.count(f"reads {route.reason.value}")
        world.trace(self.client.name, "reads", self.level, route, "on", server.name)
        if not lease.conn.only_reads and not _is_left_alone(lease):
            raise Violated(f"{self.client.name}: a read on {server.name} could write")
        if route.stale:
            world.count("stale reads, said to be")
            return
        self._judge_role(lease, server)
        self._judge_lag(lease, server)
        # Two branches of one number cannot be told apart until both are seen.
        if not world.is_split and (self.level.uses_token or self.level == Consistency.STRONG):
            self._judge_order(lease, server, shown)

    @property
    def _is_misled(self) -> bool:
        """
        Tell whether a plain role cannot know that a replica went over to a newer primary.

        The former primary runs on, and the process reaches that one only; see docs/limits.md.
        """
        server = self.server
        if server is None or server.timeline_known or self.role == "primary":
            return False
        return server.log.timeline > self.timeline

    @property
    def _is_unwarned(self) -> bool:
        """
        Tell whether a former primary served a session whose token cannot say that there is another.

        It has a pin, or is full of other systems, but no position of the newer timeline; the
        process reaches the former primary only; see docs/limits.md.
        """
        if self.server is None or not self.server.is_primary:
            return False
        held = self.token.get(SYSTEM)
        timeline = self.server.log.timeline
        if timeline >= self.world.primary.log.timeline:
            return False
        unnamed = held is None or held.timeline <= timeline
        return unnamed and (self.token.is_full or self.token.pin_until is not None)

    @property
    def _knows_two_primaries(self) -> bool:
        """Tell whether the process has seen two primaries of its newest timeline."""
        cluster = self.process.core.cluster
        newest = [node.newest for node in cluster.all_nodes if node.newest is not None]
        primaries = {
            seen.server
            for seen in newest
            if not seen.in_recovery
            and seen.timeline == cluster.timeline
            and seen.server.system_id == SYSTEM
        }
        return len({server.address for server in primaries}) > 1

    def _judge_role(self, lease: Lease, server: Server) -> None:
        route = lease.route
        if server.system != SYSTEM:
            raise Violated(f"{self.client.name}: {server.name} is of another system, {route}")
        unnoticed = self.process.core.cluster.conflict is None and self._knows_two_primaries
        if route.is_primary and unnoticed:
            raise Violated(f"{self.client.name}: {server.name} is one of two primaries, {route}")
        if self.level == Consistency.STRONG and not route.is_primary:
            raise Violated(f"{self.client.name}: STRONG was served by {route}")
        if route.is_primary:
            if not server.is_primary:
                raise Violated(f"{self.client.name}: {server.name} is no primary, {route}")
            if server.log.timeline < self.timeline:
                raise Violated(f"{self.client.name}: the former primary {server.name} serves")

    def _judge_lag(self, lease: Lease, server: Server) -> None:
        route = lease.route
        if route.reason not in (Reason.CAUGHT_UP, Reason.WITHIN_LAG) or self.world.is_split:
            return
        limit = self.level.lag_limit(self.process.core.settings.max_lag_seconds)
        if limit < 1e9 and server.log.timeline < self.timeline:
            raise Violated(f"{self.client.name}: {server.name} is on an abandoned timeline")
        now = self.world.loop.now
        # It was judged when the connection was there.
        stale = server.staleness(now) - (now - self.opened)
        if stale > limit + 1e-3:
            raise Violated(
                f"{self.client.name}: {server.name} is {stale:.3f} s old, "
                f"the limit is {limit:g}; {route}"
            )
        if server.log is self.world.primary.log and server.log.timeline > 1:
            self.world.count("reads on a replica of a new timeline")

    def _judge_order(self, lease: Lease, server: Server, shown: set[Commit]) -> None:
        if self._is_misled:
            return
        log = server.log
        held = self.token.get(SYSTEM)
        if held is not None and lease.route.reason is Reason.CAUGHT_UP:
            end = held.lsn if held.timeline == log.timeline else log.ancestors.get(held.timeline, 0)
            if held.lsn > end:
                raise Violated(
                    f"{self.client.name}: {held} is not in the log of {server.name}, which left "
                    f"that timeline at {Lsn(end)}: {lease.route}"
                )
        missing = self.due - shown
        for commit in missing:
            if _is_lost(commit, server):
                self.world.count("reads that miss what a failover lost")
            elif server.is_primary and commit in log.pending:
                self.world.count("commits that the primary does not show yet")
            elif not _position_covers(self.token, commit):
                self.world.count("reads after a pin")
                # What only a pin covers, a former primary may not have.
                known = lease.route.reason is not Reason.PRIMARY_DOWN
                if known and commit.timeline <= log.timeline:
                    raise Violated(f"{self.client.name}: {lease.route} misses {commit}, pinned")
            else:
                raise Violated(
                    f"{self.client.name}: {lease.route} on {server.name}, {log.timeline}:"
                    f"{Lsn(server.shown)}, misses {commit} of {self.token}"
                )

    def _note(self, lease: Lease) -> None:
        world, client, shown = self.world, self.client, self.shown
        assert shown is not None
        assert self.server is not None
        route = lease.route
        promised = NO_GUARANTEE
        if self._is_misled:
            world.count("reads of a plain role on a replica of an unknown timeline")
        elif self._is_unwarned:
            world.count("reads of a former primary without a position")
        elif self.level.advances_on_reads and not route.stale:
            promised = CAUSAL
            if self._has_no_bound(lease):
                # docs/limits.md: without a walreceiver and a primary there is no bound.
                world.count("reads without a bound")
                promised = OWN_WRITES
            else:
                self._learn(shown)
        elif self.level == Consistency.READ_YOUR_WRITES and not route.stale:
            promised = OWN_WRITES
        limit = None
        if not route.stale and route.reason is not Reason.PRIMARY_DOWN:
            limit = {"bounded": BOUNDED.seconds, "eventual": None}.get(
                self.level.name, self.process.core.settings.max_lag_seconds
            )
        if self.timeline < world.primary.log.timeline:
            # A process that was not told of a promotion cannot bound what it does not know.
            limit = None
        seen: dict[str, set[Any]] = {key: set() for key in self.keys}
        for commit in shown:
            if commit.key in seen:
                seen[commit.key].add(commit.value)
        world.record(
            Operation(
                client.name,
                "read",
                self.began,
                world.loop.now,
                {key: frozenset(values) for key, values in seen.items()},
                node=self.server.name,
                role=route.role,
                token_in=repr(self.token),
                token_out=repr(self.session.token),
                staleness_seconds=limit,
                promised=promised,
                reason=route.reason.value,
            )
        )

    def _learn(self, shown: set[Commit]) -> None:
        session = self.session
        if not _is_pinned(session, self.process):
            held = session.token.get(SYSTEM)
            place = (0, 0) if held is None else (held.timeline, held.lsn)
            assert self.server is not None
            kept = self.server.log.commits
            beyond = [c for c in shown if (c.timeline, c.end) > place and c in kept]
            if beyond and not self.world.is_split and not _has_no_room(session.token):
                raise Violated(f"{self.client.name}: {session.token} does not cover {beyond}")
        self.client.must_see |= shown

    def _has_no_bound(self, lease: Lease) -> bool:
        if lease.route.is_primary:
            return False
        primary = self.process.core.cluster.primary
        return primary is None or bool(primary.failures)


def _is_left_alone(lease: Lease) -> bool:
    # A standby's given connection is left as it is; a promotion may come at this moment.
    endpoint = lease.conn.endpoint
    return bool(endpoint.given and endpoint.autocommit and not lease.route.is_primary)


def _covers(session: Session, commit: Commit) -> bool:
    return _has_no_room(session.token) or _position_covers(session.token, commit)


def _has_no_room(token: Token) -> bool:
    """Tell whether a token holds so many other systems that ours was left out."""
    return token.is_full and token.get(SYSTEM) is None


def _position_covers(token: Token, commit: Commit) -> bool:
    held = token.get(SYSTEM)
    return held is not None and held >= Position(SYSTEM, commit.timeline, Lsn(commit.end))


def _is_pinned(session: Session, process: Process) -> bool:
    until = session.token.pin_until
    return until is not None and until > UNIX_EPOCH + process.loop.now + process.skew


def _is_lost(commit: Commit, server: Server) -> bool:
    """Tell whether a crash, or a failover to this server's timeline, dropped the commit."""
    log = server.log
    if commit in log.lost:
        return True
    return commit.timeline <= log.timeline and commit not in log.commits
