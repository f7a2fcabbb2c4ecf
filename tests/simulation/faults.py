"""
What goes wrong, and when: a schedule of faults that only the seed decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import TYPE_CHECKING, Final

from lsn_consistency import Position, Token
from lsn_consistency.lsn import Lsn
from lsn_consistency.tokens import MAX_SYSTEMS
from tests.simulation.clients import Cancelled, Client
from tests.simulation.loop import Steps, Task
from tests.simulation.servers import UNIT, Server
from tests.simulation.shape import FAULTS

if TYPE_CHECKING:
    from tests.simulation.world import World

SHARES: Final = (0.0, 0.2, 0.6, 1.0)


class Faults:
    """Do harm to a world, and undo it."""

    def __init__(self, world: World, chance: Random) -> None:
        self.world = world
        self.chance = chance
        self.active = True
        self.tasks: Mapping[Client, Task] = {}
        kinds: dict[str, Callable[[], object]] = {
            "pause": self._pause,
            "delay": self._delay,
            "lag": self._lag,
            "hold": self._hold,
            "cut replication": self._cut_replication,
            "crash": self._crash,
            "freeze": self._freeze,
            "stop": self._stop,
            "partition": self._partition,
            "slow link": self._slow_link,
            "failover": self._failover,
            "zombie": self._zombie,
            "same timeline": self._same_timeline,
            "restore": self._restore,
            "follow": self._follow,
            "cancel": self._cancel,
            "full pool": self._full_pool,
            "restartpoint": self.restartpoints,
            "kill connection": self._kill,
            "revoke": self._revoke,
            "hand over": self._hand_over,
            "full token": self._fill_token,
        }
        # The others are of no use without these two.
        enabled = world.shape.faults | {"hand over", "follow"}
        self.kinds = {name: kinds[name] for name in FAULTS if name in enabled}
        self.names = list(self.kinds)

    def start(self, tasks: Mapping[Client, Task]) -> None:
        self.tasks = tasks
        self.world.loop.start(self._run())

    def _run(self) -> Steps:
        while self.active:
            yield self.chance.expovariate(1 / self.world.shape.fault_seconds)
            if self.active:
                name = self.chance.choice(self.names)
                if self.kinds[name]() is not False:
                    self.world.count(f"faults: {name}")

    def _for_a_while(self, undo: Callable[[], object]) -> None:
        seconds = self.chance.choice((0.05, 0.3, 0.8, 1.5))
        self.world.loop.call_later(seconds, undo)

    def _note(self, *what: object) -> None:
        self.world.trace("    fault:", *what)

    def _server(self) -> Server:
        return self.chance.choice(self.world.servers)

    def _standby(self) -> Server:
        standbys = [server for server in self.world.servers if not server.is_primary]
        return self.chance.choice(standbys or self.world.servers)

    # Replication

    def _pause(self) -> None:
        server = self._standby()
        server.paused = True
        self._note("pause", server.name)
        self._for_a_while(lambda: setattr(server, "paused", False))

    def _delay(self) -> None:
        server = self._standby()
        self.world.delays[server] = self.chance.choice((0.2, 1.0))
        server.delayed = True
        self._note("delay", server.name)

        def undo() -> None:
            server.delayed = False
            self.world.delays.pop(server, None)

        self._for_a_while(undo)

    def _lag(self) -> None:
        server = self._standby()
        self.world.slowness[server] = self.chance.choice((0.0, 0.1, 0.3))
        self._note("lag", server.name)
        self._for_a_while(lambda: self.world.slowness.pop(server, None))

    def _hold(self) -> None:
        """Nothing arrives, and nobody has noticed."""
        server = self._standby()
        self.world.held.add(server)
        self._note("hold", server.name)
        self._for_a_while(lambda: self.world.held.discard(server))

    def _cut_replication(self) -> None:
        server = self._standby()
        if server in self.world.upstream:
            self._cut(server.name, self.world.upstream[server].name)

    def _cut(self, here: str, there: str) -> None:
        self._note("cut", here, there)
        self.world.network.cut.add((here, there))
        self._for_a_while(lambda: self.world.network.cut.discard((here, there)))

    # Servers

    def _crash(self) -> None:
        server = self._server()
        if not server.alive:
            return
        postmaster = self.chance.random() < 0.6
        self._note_loss(server)
        server.crash(self.chance.choice(SHARES), postmaster=postmaster)
        server.replay_known = False
        self._note("crash", server.name, server.replay)
        self._notice(server)

    def _notice(self, server: Server) -> None:
        """A server that dies closes its sockets, unless its host died with it."""
        if self.world.shape.silent:
            return
        for process in self.world.processes:
            if self.world.network.is_cut(process.name, server.name):
                continue
            for monitor in process.monitors.values():
                if monitor.conn is not None and monitor.conn.server is server:
                    self.world.loop.call_later(self.chance.random() * 0.02, monitor.suspect)

    def _freeze(self) -> None:
        server = self._server()
        server.frozen = True
        self._note("freeze", server.name)
        self._for_a_while(lambda: setattr(server, "frozen", False))

    def _stop(self) -> None:
        server = self._server()
        if not server.alive:
            return
        self._stop_now(server)
        self._note("stop", server.name)
        self._notice(server)
        self._for_a_while(lambda: setattr(server, "alive", True))

    def _stop_now(self, server: Server) -> None:
        self._note_loss(server)
        server.stop()

    def _note_loss(self, server: Server) -> None:
        log = server.log
        if server.is_primary and log.flush < log.insert:
            self.world.count("crashes with loss")
            self.world.went_back.setdefault(log.timeline, []).append(log.flush)

    # Networks

    def _partition(self) -> None:
        process = self.chance.choice(self.world.processes)
        for server in self.chance.sample(self.world.servers, self.chance.choice((1, 1, 2))):
            self._cut(process.name, server.name)

    def _slow_link(self) -> None:
        process, server = self.chance.choice(self.world.processes), self._server()
        link = (process.name, server.name)
        self.world.network.slow[link] = self.chance.choice((0.02, 0.2, 0.7))
        self._note("slow link", *link)
        self._for_a_while(lambda: self.world.network.slow.pop(link, None))

    def _full_pool(self) -> None:
        process = self.chance.choice(self.world.processes)
        endpoint = self.chance.choice(list(process.endpoints.values()))
        endpoint.full = True
        self._for_a_while(lambda: setattr(endpoint, "full", False))

    def _kill(self) -> bool:
        process = self.chance.choice(self.world.processes)
        for endpoint in process.endpoints.values():
            for conn in [*endpoint.idle, *endpoint.out]:
                conn.killed = True
        return True

    def _revoke(self) -> None:
        server = self._standby()
        server.wal_functions = False
        self._note("revoke", server.name)
        self._for_a_while(lambda: setattr(server, "wal_functions", True))

    # Roles

    def _failover(self) -> bool:
        """Promote a standby, often not the most advanced, and often with the old one running."""
        world, chance = self.world, self.chance
        old, new = world.primary, self._standby()
        if new.is_primary or not new.alive or new.frozen:
            return False
        if new.log is not old.log or new in world.hidden_servers:
            return False
        if chance.random() < 0.3:
            # A planned one: the old primary is stopped, and everything is shipped.
            self._stop_now(old)
            new.receive = new.replay = old.log.insert
        elif chance.random() < 0.6:
            self._stop_now(old)
        self._notice(old)
        lost = sum(1 for commit in old.log.commits if commit.end > new.replay)
        world.count("commits beyond a switch point", lost)
        world.count("promotions with loss", lost > 0)
        world.count("promotions")
        new.paused = False
        new.promote(1 + max(server.log.timeline for server in world.servers))
        world.logs.append(new.log)
        world.primary = new
        world.upstream.pop(new, None)
        self._note("promote", new.name, "to", new.log.timeline, "from", old.name, "lost", lost)
        for server in world.servers:
            if server not in (old, new) and chance.random() < 0.6:
                world.loop.call_later(chance.choice((0.0, 0.1, 0.8)), self._following(server))
        if chance.random() < 0.5:
            world.loop.call_later(chance.choice((0.3, 1.0)), self._following(old))
        return True

    def _following(self, server: Server) -> Callable[[], None]:
        return lambda: self.make_follow(server)

    def make_follow(self, server: Server) -> None:
        """Have a server stream from the primary, rewound or copied anew where that is needed."""
        world = self.world
        primary = world.primary
        if server is primary or (not self.active and server.log is primary.log):
            return
        if server.log is primary.log and not server.is_primary:
            return
        log = primary.log
        if not server.is_primary and server.alive and self._can_go_on(server):
            # The new primary's timeline descends from its own: no restart is needed.
            server.log = log
        else:
            was = server.is_primary
            self._notice(server)
            server.follow(log)
            world.count("old primaries that came back as standbys", was)
        if server.log is not log:
            return
        world.upstream[server] = primary
        self._note(server.name, "follows", primary.name, log.timeline)

    def _can_go_on(self, server: Server) -> bool:
        log = self.world.primary.log
        end = log.ancestors.get(server.log.timeline)
        return end is not None and max(server.replay, server.receive) <= end

    def _follow(self) -> bool:
        server = self._server()
        if server.log is self.world.primary.log:
            return False
        self.make_follow(server)
        return True

    def _zombie(self) -> bool:
        """A former primary is started again as one."""
        for server in self.world.servers:
            if server.is_primary and server is not self.world.primary:
                server.alive = True
                self._note("zombie", server.name)
                return True
        return False

    def _same_timeline(self) -> bool:
        """Two standbys are promoted at once: both take the same number."""
        world = self.world
        other = self._standby()
        primary = world.primary
        past = (
            other in world.hidden_servers,
            other.is_primary,
            not other.alive,
            primary.log.timeline == 1,
        )
        if any(past) or other.log.timeline >= primary.log.timeline:
            return False
        other.paused = False
        other.promote(primary.log.timeline)
        world.logs.append(other.log)
        world.upstream.pop(other, None)
        world.is_split = True
        self._note("same timeline", other.name)
        return True

    def _restore(self) -> bool:
        """The primary is restored from a backup on the same timeline, and its standbys copied."""
        world = self.world
        primary = world.primary
        log = primary.log
        back = self.chance.choice((2, 10, 40)) * UNIT
        at = max(log.start + UNIT, log.insert - back)
        if at >= log.insert or world.is_split:
            return False
        primary.life += 1
        primary.started += 1
        primary.log = log.restored(at)
        world.logs.append(primary.log)
        world.went_back.setdefault(log.timeline, []).append(at)
        primary.recovery_end = None
        self._note("restore", primary.name, "to", at)
        for server in world.servers:
            if server.log is log and not server.is_primary:
                server.follow(primary.log)
                # A copy that was made from the same backup.
                server.replay = server.receive = at
            self._notice(server)
        return True

    def restartpoints(self) -> None:
        """Every standby's control file now names the timeline that it replays."""
        for server in self.world.servers:
            if server.is_primary:
                server.restartpoint = server.log.timeline
            else:
                server.restartpoint = server.log.timeline_at(server.replay)

    # Clients

    def _cancel(self) -> None:
        task = self.chance.choice(list(self.tasks.values()))
        self.world.loop.cancel(task, Cancelled())

    def _hand_over(self) -> None:
        giver, taker = self.chance.choice(list(self.tasks)), self.chance.choice(list(self.tasks))
        giver.tell(taker)

    def _fill_token(self) -> None:
        """A client comes from services with newer databases, as many as a token can hold."""
        count = self.chance.choice((1, MAX_SYSTEMS - 1, MAX_SYSTEMS))
        positions = [Position(2**63 + number, 1, Lsn(UNIT)) for number in range(count)]
        client = self.chance.choice(list(self.tasks))
        client.told.append((Token(positions), frozenset()))

    # The end

    def heal_all(self) -> None:
        """Undo everything; whatever does not follow the primary is made to."""
        world = self.world
        self.active = False
        world.network.cut.clear()
        world.network.slow.clear()
        world.delays.clear()
        world.slowness.clear()
        world.held.clear()
        for process in world.processes:
            for endpoint in process.endpoints.values():
                endpoint.full = False
        for server in world.servers:
            server.alive, server.frozen, server.paused = True, False, False
            server.wal_functions, server.delayed = True, False
        for server in world.servers:
            self.make_follow(server)
