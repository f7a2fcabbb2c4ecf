"""
What lies between the processes and the servers: links, connections, endpoints, poolers.

A link can be slow or cut. A statement that is under way when its link is cut, or its server is
frozen, arrives when that ends, unless its sender has given up by then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from lsn_consistency import _sql
from lsn_consistency._sql import Row
from tests.simulation.loop import Loop, Steps
from tests.simulation.servers import Server

BLOCKED_SECONDS: Final = 0.03
"""How often a message that cannot pass is tried again."""


class Network:
    """Carry messages between processes and servers, each named."""

    def __init__(self, loop: Loop, chance: Random) -> None:
        self.loop = loop
        self.chance = chance
        self.cut: set[tuple[str, str]] = set()
        self.slow: dict[tuple[str, str], float] = {}
        self.connections = 0

    def is_cut(self, here: str, there: str) -> bool:
        return bool(self.cut) and ((here, there) in self.cut or (there, here) in self.cut)

    def latency(self, here: str, server: Server) -> float:
        usual = 0.0002 + 0.002 * self.chance.random()
        slow = self.slow.get((here, server.name))
        return usual if slow is None else usual + slow * self.chance.random()

    def pass_to(self, here: str, conn: Connection, deadline: float) -> Steps:
        """Let a message reach the other end; raises `TimeoutError`, or what the server's end is."""
        loop = self.loop
        yield min(self.latency(here, conn.server), max(0.0, deadline - loop.now))
        while conn.server.frozen or self.is_cut(here, conn.server.name):
            if loop.now >= deadline:
                break
            yield min(BLOCKED_SECONDS, deadline - loop.now)
        if loop.now >= deadline:
            raise TimeoutError("no answer in time")
        if not conn.is_alive:
            raise ConnectionError("the server closed the connection")

    def exchange(
        self, here: str, conn: Connection, work: Callable[[], Any], seconds: float, hold: float = 0
    ) -> Steps:
        """Have the server do something, for ``hold`` seconds, and bring its answer."""
        deadline = self.loop.now + seconds
        conn.reroute(self.chance)
        yield from self.pass_to(here, conn, deadline)
        result = work()
        if hold:
            yield min(hold, max(0.0, deadline - self.loop.now))
        yield from self.pass_to(here, conn, deadline)
        return result

    def connect(self, here: str, endpoint: Endpoint, seconds: float) -> Steps:
        """Open a connection; raises `ConnectionError` at once, or `TimeoutError` in the end."""
        server = self.chance.choice(endpoint.servers)
        deadline = self.loop.now + seconds
        yield min(self.latency(here, server), seconds)
        while server.alive and (server.frozen or self.is_cut(here, server.name)):
            if self.loop.now >= deadline:
                raise TimeoutError(f"{endpoint.name} does not answer")
            yield min(BLOCKED_SECONDS, deadline - self.loop.now)
        if not server.alive:
            raise ConnectionError(f"{endpoint.name} refuses")
        self.connections += 1
        return Connection(self.connections, server, endpoint)


@dataclass(eq=False)
class Endpoint:
    """
    Be what a conninfo leads to in one process: a server, several, or a pooler; and its pool.

    ``own_read_only`` and ``autocommit`` are how the owner of a given pool made its connections.
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


class Connection:
    """
    Be a psycopg connection as far as the plans look at one.

    Behind a pooler it outlives its server, and each transaction may reach another.
    """

    def __init__(self, pid: int, server: Server, endpoint: Endpoint) -> None:
        self.pid = pid
        self.server = server
        self.endpoint = endpoint
        self.life = server.life
        self.closed = False
        self.killed = False
        self.autocommit = endpoint.autocommit
        self.read_only: bool | None = endpoint.own_read_only
        self.session_read_only = False
        self.in_transaction = False
        self.transactions = 0

    @property
    def is_alive(self) -> bool:
        if self.closed or self.killed:
            return False
        if self.endpoint.pooled and not self.in_transaction:
            return any(server.alive for server in self.endpoint.servers)
        return self.server.alive and self.server.life == self.life

    def reroute(self, chance: Random) -> None:
        if self.endpoint.pooled and not self.in_transaction:
            alive = [server for server in self.endpoint.servers if server.alive]
            if alive:
                self.server = chance.choice(alive)
                self.life = self.server.life

    def end_transaction(self) -> None:
        """Be the end of a block, or a COMMIT of the user's."""
        self.in_transaction = False

    def run(self, statement: bytes) -> Row:
        if not self.in_transaction:
            self.transactions += 1
        if statement == _sql.BEGIN_READ_COMMITTED:
            self.in_transaction = True
        elif statement == _sql.ROLLBACK:
            self.in_transaction = False
        elif statement == _sql.READ_ONLY:
            self.session_read_only = True
        elif statement == _sql.READ_WRITE:
            self.session_read_only = False
        else:
            pid = self.pid + 1_000_000 if self.endpoint.pooled else self.pid
            return self.server.answer(statement, pid, self.transactions)
        return ()

    @property
    def only_reads(self) -> bool:
        return bool(
            self.session_read_only
            or self.in_transaction
            or (self.read_only and not self.autocommit)
            or not self.server.is_primary
        )
