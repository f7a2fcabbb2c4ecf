"""
Routers with one well-known mistake each: what the checker must catch.

`RandomReplica` and `LagOnly` know no tokens. The others carry the position of what a client wrote
or saw, check it before the read on the connection that reads, and go to the primary when no
replica has reached it. `TokenRouter` is what these have in common, and without a mistake as long
as no server is promoted; each of them has the one that its docstring names.

All else is as plain as can be: a replica that cannot be reached fails the read.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Final

import psycopg

from lsn_consistency import Lsn
from tests.faults.workload import Answer, Client, NotCommittedError, fetch

PRIMARY: Final = "primary"
CONNECT_SECONDS: Final = 5
Connection = psycopg.AsyncConnection[Any]
Rows = list[tuple[Any, ...]]


class Control:
    """
    Write on the primary and read where a subclass says; keeps connections until it is closed.
    """

    def __init__(self, primary: str, replicas: Mapping[str, str], seed: int = 0) -> None:
        self.replicas = list(replicas)
        self.random = Random(seed)
        self._conninfos = {PRIMARY: primary, **replicas}
        self._idle: dict[str, list[Connection]] = defaultdict(list)

    def session(self) -> Client:
        return ControlClient(self)

    async def read(self, client: ControlClient, *query: Any) -> Rows:
        """
        Run a query that only reads.
        """
        async with self.connection(await self.route()) as conn:
            return await fetch(conn, *query)

    async def route(self) -> str:
        """
        Return the node that serves a read.
        """
        return PRIMARY

    async def after_write(self, client: ControlClient, conn: Connection) -> None:
        """
        Let the client know what it has to see from now on; ``conn`` is that of the write.
        """

    def shuffled(self) -> list[str]:
        """
        Return the replicas in any order.
        """
        return self.random.sample(self.replicas, len(self.replicas))

    @asynccontextmanager
    async def connection(self, node: str) -> AsyncIterator[Connection]:
        """
        Lend a connection to a node; after an error it is closed.
        """
        conn = await self._alive(node) or await psycopg.AsyncConnection.connect(
            self._conninfos[node], autocommit=True, connect_timeout=CONNECT_SECONDS
        )
        try:
            yield conn
        except BaseException:
            await conn.close()
            raise
        self._idle[node].append(conn)

    async def _alive(self, node: str) -> Connection | None:
        """
        Return a connection that is not in use and still works, as the check of a pool does.
        """
        idle = self._idle[node]
        while idle:
            conn = idle.pop()
            try:
                await conn.execute("")
            except psycopg.OperationalError:
                await conn.close()
            else:
                return conn
        return None

    async def aclose(self) -> None:
        """
        Close all connections.
        """
        for idle in self._idle.values():
            while idle:
                await idle.pop().close()


class ControlClient:
    """
    Hold the token of one session, as text.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self.token: str | None = None

    async def write(self, statement: str, parameters: Sequence[Any]) -> Answer:
        before = self.token
        committing = False
        try:
            async with self._control.connection(PRIMARY) as conn:
                async with conn.transaction():
                    rows = await fetch(conn, statement, parameters)
                    committing = True
                await self._control.after_write(self, conn)
        except psycopg.Error as error:
            if committing:
                raise
            raise NotCommittedError(str(error)) from error
        return Answer(rows, before, self.token)

    async def read(self, statement: str, parameters: Sequence[Any]) -> Answer:
        before = self.token
        rows = await self._control.read(self, statement, parameters)
        return Answer(rows, before, self.token)


class RandomReplica(Control):
    """
    Read from any replica.
    """

    async def route(self) -> str:
        return self.random.choice(self.replicas)


class LagOnly(Control):
    """
    Read from any replica whose lag in time is small: the rule of dorm's LagAwareReadRouter.

    Lag is the age of the last commit that was replayed, unknown is no lag, and what was measured
    holds for some seconds. Limits are its defaults.
    """

    MAX_LAG_SECONDS: Final = 2.0
    CACHE_SECONDS: Final = 5.0
    LAG: Final = "SELECT extract(epoch FROM now() - pg_last_xact_replay_timestamp())"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._measured: dict[str, tuple[float, float]] = {}

    async def route(self) -> str:
        for node in self.shuffled():
            if await self._lag(node) <= self.MAX_LAG_SECONDS:
                return node
        return PRIMARY

    async def _lag(self, node: str) -> float:
        lag, until = self._measured.get(node, (0.0, 0.0))
        if time.monotonic() >= until:
            async with self.connection(node) as conn:
                lag = float((await fetch(conn, self.LAG))[0][0] or 0.0)
            self._measured[node] = (lag, time.monotonic() + self.CACHE_SECONDS)
        return lag


class TokenRouter(Control):
    """
    Read from a replica that has replayed the client's token, else from the primary.
    """

    POSITION = "SELECT pg_current_wal_insert_lsn()::text"
    REPLAYED: Final = "SELECT pg_last_wal_replay_lsn()::text"
    SHOWN: Final = "SELECT greatest(pg_last_wal_replay_lsn(), pg_last_wal_receive_lsn())::text"

    async def read(self, client: ControlClient, *query: Any) -> Rows:
        for node in self.shuffled():
            async with self.connection(node) as conn:
                if client.token is None or await self.has(node, conn, client.token):
                    rows = await fetch(conn, *query)
                    self._advance(client, await _text(conn, self.SHOWN))
                    return rows
        async with self.connection(PRIMARY) as conn:
            rows = await fetch(conn, *query)
            self._advance(client, await _text(conn, self.POSITION))
            return rows

    async def after_write(self, client: ControlClient, conn: Connection) -> None:
        self._advance(client, await _text(conn, self.POSITION))

    async def has(self, node: str, conn: Connection, token: str) -> bool:
        """
        Tell whether a replica shows all that a token stands for.
        """
        return self.reached(await _text(conn, self.REPLAYED), token)

    def reached(self, position: str, token: str) -> bool:
        """
        Compare two positions.
        """
        return Lsn.parse(position) >= Lsn.parse(token)

    def _advance(self, client: ControlClient, position: str) -> None:
        if client.token is None or self.reached(position, client.token):
            client.token = position


class WritePosition(TokenRouter):
    """
    Take ``pg_current_wal_lsn()`` after COMMIT, which an asynchronous commit has not reached yet.
    """

    POSITION = "SELECT pg_current_wal_lsn()::text"


class TextOrder(TokenRouter):
    """
    Compare positions as the text that PostgreSQL prints, in which ``0/F000000 > 0/10000000``.

    PostgreSQL 19 prints zeros in front, which puts the mistake off to ``F/0`` and ``10/0``; here
    they are taken away.
    """

    def reached(self, position: str, token: str) -> bool:
        return str(Lsn.parse(position)) >= str(Lsn.parse(token))


class TrustedObservations(TokenRouter):
    """
    Remember what each replica had replayed, since replay only goes forward: not over a crash.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._observed: dict[str, str] = {}

    async def has(self, node: str, conn: Connection, token: str) -> bool:
        known = self._observed.get(node)
        if known is not None and self.reached(known, token):
            return True
        replayed = await _text(conn, self.REPLAYED)
        if known is None or self.reached(replayed, known):
            self._observed[node] = replayed
        return self.reached(replayed, token)


async def _text(conn: Connection, statement: str) -> str:
    return str((await fetch(conn, statement))[0][0])
