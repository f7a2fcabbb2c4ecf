"""
One run: a cluster, processes with routers, clients and faults, all made from one seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from random import Random
from types import MappingProxyType
from typing import Any, Final

from lsn_consistency import Consistency, Session, events
from lsn_consistency.lsn import Lsn, Position
from lsn_consistency.testing.checker import Operation, Report, check
from tests.simulation.clients import Client, ReadOnce, Violated
from tests.simulation.faults import Faults
from tests.simulation.loop import Loop, Steps, Task
from tests.simulation.network import Endpoint, Network
from tests.simulation.process import Process
from tests.simulation.servers import BLOCK, FLUSH_DELAY, SYSTEM, UNIT, Commit, Log, Server
from tests.simulation.shape import PIN_SECONDS, Shape

START: Final = 16 * BLOCK - 5 * UNIT
STRANGE_SYSTEM: Final = 7_000_000_000_000_000_099
STRANGE_START: Final = 2**40
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
BUSY_SECONDS: Final = 3.0
WARM_UP_SECONDS: Final = 0.2
CATCH_UP_SECONDS: Final = 0.4
LOOK_SECONDS: Final = 0.1
SETTLE_SECONDS: Final = 12.0
SKEW_SECONDS: Final = 0.3
REST_SECONDS: Final = PIN_SECONDS + 2 * SKEW_SECONDS + 0.1
MAX_STEPS: Final = 200_000
MAX_LAG: Final = 1.2
TRACED: Final = (
    events.LostWrite,
    events.PositionUnknown,
    events.NodeFailed,
    events.RoleChanged,
)


class World:
    """Hold everything of one run; ``line`` are the commits that are not lost."""

    def __init__(
        self,
        seed: int,
        *,
        fixed: Mapping[str, Any] = NOTHING,
        seconds: float = BUSY_SECONDS,
        verbose: bool = False,
    ) -> None:
        self.seed = seed
        self.seconds = seconds
        self.verbose = verbose
        self.chance = Random(seed)
        self.shape = Shape.draw(Random(self.chance.random()), fixed)
        self.loop = Loop()
        self.counts: Counter[str] = Counter()
        self.history: list[Operation] = []
        self.commits: list[Commit] = []
        self._values = 0
        self.went_back: dict[int, list[int]] = {}
        self.is_split = False
        self.network = Network(self.loop, Random(self.chance.random()))
        log = Log(1, START)
        self.logs = [log]
        self.servers = [Server("p", log, primary=True)]
        self.servers += [Server(name, log) for name in "abc"[: self.shape.replicas]]
        self.primary = self.servers[0]
        self.upstream = dict.fromkeys(self.servers[1:], self.primary)
        self.stranger: Server | None = None
        self.delays: dict[Server, float] = {}
        self.slowness: dict[Server, float] = {}
        self.held: set[Server] = set()
        self.hidden_servers: set[Server] = set()
        self._give_servers_their_shape()
        self.processes = list(self._processes())
        self.clients = [
            Client(f"client {number}", self, Random(self.chance.random()))
            for number in range(1, 1 + self.shape.clients)
        ]
        self.faults = Faults(self, Random(self.chance.random()))

    def _give_servers_their_shape(self) -> None:
        if self.shape.stranger and len(self.servers) == 4:
            self._estrange(self.servers.pop())
        for server in self.servers:
            server.timeline_known = self.shape.privilege != "plain"
            server.restartpoint = 1
            server.applying = self.chance.random() < self.shape.applying

    def _estrange(self, server: Server) -> None:
        """A node leads to another cluster, whose positions are greater by far."""
        log = Log(1, STRANGE_START)
        self.stranger = Server(server.name, log, system=STRANGE_SYSTEM)
        self.stranger.restartpoint = 1
        del self.upstream[server]

    def _processes(self) -> Iterator[Process]:
        for number in range(1, 1 + self.shape.processes):
            yield Process(
                f"process {number}",
                self.network,
                self._endpoints(),
                Random(self.chance.random()),
                self.shape.options,
                offset=self.chance.uniform(-50, 500),
                skew=self.chance.choice((0.0, 0.0, SKEW_SECONDS, -SKEW_SECONDS)),
                replication=self.shape.privilege == "replication",
                count=self.count,
            )

    def _endpoints(self) -> list[Endpoint]:
        kept: dict[str, Any] = {
            "given": self.shape.given,
            "autocommit": self.shape.autocommit,
            "own_read_only": False if self.shape.given else None,
        }
        p, a, *rest = self.servers
        endpoints = [Endpoint("primary", [p], **kept), Endpoint("a", [a], **kept)]
        if self.stranger is not None:
            endpoints.append(Endpoint(self.stranger.name, [self.stranger], **kept))
        if len(rest) == 2 and (self.shape.hidden or self.shape.pooled):
            # Who fails over to a server that only such an endpoint leads to has no node for it.
            self.hidden_servers = set(rest)
            endpoints.append(Endpoint("x", rest, pooled=self.shape.pooled, **kept))
        else:
            endpoints += [Endpoint(server.name, [server], **kept) for server in rest]
        return endpoints

    # What is noted

    def count(self, what: str, number: int = 1) -> None:
        self.counts[what] += number

    def trace(self, *what: object) -> None:
        if self.verbose:
            print(f"{self.loop.now:9.4f}", *what)

    def next_value(self) -> int:
        self._values += 1
        return self._values

    def written(self, commit: Commit, log: Log) -> None:
        """Take a commit; an asynchronous one is flushed within three times wal_writer_delay."""
        self.commits.append(commit)
        if commit.end > log.flush:
            delay = FLUSH_DELAY * self.chance.random()
            self.loop.call_later(delay, lambda: log.flush_to(commit))

    def record(self, operation: Operation) -> None:
        # What was read before two servers shared a timeline may be of a write that ended later.
        if operation.kind == "write" or not self.is_split:
            self.history.append(operation)

    @property
    def line(self) -> list[Commit]:
        return self.primary.log.commits

    # The run

    def run(self) -> Report:
        """Play the seed; raises `AssertionError` for a broken promise."""
        for process in self.processes:
            self._listen(process)
        for server in self.servers:
            self.loop.start(self._replicate(server, Random(self.chance.random())))
        try:
            self.loop.run(self._main(), limit=MAX_STEPS)
        finally:
            self.loop.close()
        return self._judge()

    def _main(self) -> Steps:
        yield WARM_UP_SECONDS
        loop = self.loop
        tasks = {
            client: loop.start(client.run(lambda: loop.now < self.seconds))
            for client in self.clients
        }
        self.faults.start(tasks)
        yield from self._wait_for(tasks.values())
        yield from self._settle()

    def _wait_for(self, tasks: Iterable[Task]) -> Steps:
        for task in tasks:
            while not task.done:
                yield LOOK_SECONDS

    def _listen(self, process: Process) -> None:
        def note(event: events.Event) -> None:
            if isinstance(event, TRACED):
                self.count(f"events {type(event).__name__}")
                self.trace(process.name, event)
            if isinstance(event, events.LostWrite):
                self._judge_lost(event)

        process.core.emit = note

    def _judge_lost(self, event: events.LostWrite) -> None:
        """A position is only called lost where a log was left, or went back, before it."""
        position = event.position
        if self.is_split:
            return
        if position.timeline == event.timeline:
            went_back = any(to < position.lsn for to in self.went_back.get(position.timeline, ()))
            found = went_back or self._was_left(position)
        elif position.timeline > event.timeline:
            # It is this primary that was left, not the position.
            found = False
        else:
            ends = [
                log.ancestors.get(position.timeline, 0)
                for log in self.logs
                if log.timeline == event.timeline
            ]
            found = any(end < position.lsn for end in ends)
        if not found:
            raise Violated(f"{event} is not lost")

    def _was_left(self, position: Position) -> bool:
        """
        Tell whether a position can stand for one of an earlier timeline, which was left before it.

        That of a session which has read from a standby of a newer timeline is named by that one.
        """
        logs = [log for log in self.logs if log.timeline == position.timeline]
        return any(
            log.insert < position.lsn and any(end < position.lsn for end in log.ancestors.values())
            for log in logs
        )

    def _replicate(self, server: Server, chance: Random) -> Steps:
        while True:
            yield chance.expovariate(1 / self.shape.tick_seconds)
            if not server.alive or server.frozen:
                continue
            if server.is_primary:
                continue
            server.streaming = self._streams(server)
            reachable = not self.upstream[server].frozen and server not in self.held
            draw = chance.random()
            received = (0.5 if draw < 0.3 else 1.0) if server.streaming and reachable else 0.0
            speed = self.slowness.get(server, 1.0)
            replayed = speed * (0.0 if draw > 0.75 else 0.5 if draw > 0.5 else 1.0)
            before = server.replay
            server.replay_known = True
            server.replicate(received, replayed)
            if server in self.delays:
                due = self.loop.now - self.delays[server]
                young = [c.end for c in server.log.commits if c.at > due]
                server.replay = max(before, min([server.replay, *(e - UNIT for e in young)]))

    def _streams(self, server: Server) -> bool:
        upstream = self.upstream[server]
        return (
            upstream.alive
            and upstream.log is server.log
            and upstream.is_primary
            # A standby that is ahead of its upstream is refused.
            and server.receive <= upstream.log.flush + 4 * UNIT
            and not self.network.is_cut(server.name, upstream.name)
        )

    # The end

    def _settle(self) -> Steps:
        """Heal everything: then every client is served by replicas again, and soon."""
        loop = self.loop
        self.faults.heal_all()
        limit = loop.now + SETTLE_SECONDS
        while loop.now < limit and not self._is_well():
            yield LOOK_SECONDS
        self.primary.log.flush = self.primary.log.insert
        yield CATCH_UP_SECONDS
        self.faults.restartpoints()
        yield REST_SECONDS
        for client in self.clients:
            yield from self._last_reads(client)
        for process in self.processes:
            process.check_idle()

    def _is_well(self) -> bool:
        return all(node.newest for each in self.processes for node in each.core.cluster.all_nodes)

    def _last_reads(self, client: Client) -> Steps:
        for process in self.processes:
            for attempt in (1, 2):
                session = Session(client.token)
                route = yield from ReadOnce(client, process, session, Consistency.CAUSAL).run()
                client.token = session.token
                if route is None:
                    raise Violated(f"{client.name} is not served by the healed {process.name}")
                full = client.token.is_full and client.token.get(SYSTEM) is None
                if attempt == 2 and route.is_primary and not full:
                    raise Violated(
                        f"{client.name} is served by {route} of the healed {process.name}, "
                        f"with {self.token_and_place(client)}"
                    )

    def token_and_place(self, client: Client) -> str:
        log = self.primary.log
        return f"{client.token!r}; the primary is at {log.timeline}:{Lsn(log.insert)}"

    def _judge(self) -> Report:
        kept = set(self.line)
        lost = {commit.value for commit in self.commits if commit not in kept}
        self.count("commits", len(self.commits))
        self.count("commits that a failover or a crash lost", len(lost))
        self.count("operations", len(self.history))
        report = check(self.history, lost=lost)
        self.count("exceptions from a replica to the primary", len(report.exceptions))
        if not report.ok:
            raise Violated(str(report))
        return report


def play(
    seed: int,
    *,
    fixed: Mapping[str, Any] = NOTHING,
    seconds: float = BUSY_SECONDS,
    verbose: bool = False,
) -> World:
    """Play one seed to its end; raises `AssertionError` for a broken promise."""
    world = World(seed, fixed=fixed, seconds=seconds, verbose=verbose)
    world.run()
    return world
