"""
Whoever knows every replica's true replay position: nobody can keep more reads off the primary.

It waits for a position as long as this library does, `Settings.wait_seconds`, and otherwise has
no cost of its own: no token, no signature, no rule about lag, and what it asks the servers goes
over connections that do nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import psycopg
from starlette.requests import Request

from lsn_consistency import Lsn
from lsn_consistency._settings import Settings
from tests.benchmarks.shop.strategies import PRIMARY, Strategy
from tests.benchmarks.shop.trace import SESSION_COOKIE

POLL_SECONDS: Final = 0.001
WAIT_SECONDS: Final = Settings().wait_seconds

_REPLAYED: Final = "SELECT pg_last_wal_replay_lsn()::text"
# A commit that is synchronous has been flushed when it returns. There is no lower position that
# surely covers it, the insert position of this library's tokens is at or above it.
_WRITTEN: Final = "SELECT pg_current_wal_flush_lsn()::text"


class Oracle(Strategy):
    """
    Read from any replica that has the session's last write, the one with the fewest reads.
    """

    def __init__(self, primary: str, replicas: Mapping[str, str], connections: int) -> None:
        super().__init__(primary, replicas, connections)
        self._conninfos = {PRIMARY: primary, **replicas}
        self._asking: dict[str, _Asked] = {}
        self._written: dict[str, Lsn] = {}
        self._in_flight = dict.fromkeys(self._conninfos, 0)

    async def open(self) -> None:
        await super().open()
        for name, conninfo in self._conninfos.items():
            conn = await psycopg.AsyncConnection.connect(conninfo, autocommit=True)
            self._asking[name] = _Asked(conn, _WRITTEN if name == PRIMARY else _REPLAYED)

    async def close(self) -> None:
        await super().close()
        for asked in self._asking.values():
            await asked.conn.close()

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[Any]:
        name = await self._find(self._written.get(request.cookies.get(SESSION_COOKIE, "")))
        self._in_flight[name] += 1
        try:
            async with self.pools[name].connection() as conn:
                yield conn
        finally:
            self._in_flight[name] -= 1

    @asynccontextmanager
    async def write(self, request: Request) -> AsyncIterator[Any]:
        async with self.pools[PRIMARY].connection() as conn:
            yield conn
        session = request.cookies.get(SESSION_COOKIE, "")
        written = await self._asking[PRIMARY].ask(time.monotonic())
        self._written[session] = max(written, self._written.get(session, Lsn(0)))

    async def _find(self, required: Lsn | None) -> str:
        ends = time.monotonic() + WAIT_SECONDS
        while True:
            # A position that was reached once stays so: only those that were not are asked for.
            reached = self._reached(required)
            if not reached:
                now = time.monotonic()
                await asyncio.gather(*(self._asking[name].ask(now) for name in self.replicas))
                reached = self._reached(required)
            if reached:
                return min(reached, key=lambda name: self._in_flight[name])
            if time.monotonic() >= ends:
                return PRIMARY
            await asyncio.sleep(POLL_SECONDS)

    def _reached(self, required: Lsn | None) -> list[str]:
        return [
            name
            for name in self.replicas
            if required is None or self._asking[name].known >= required
        ]


class _Asked:
    """
    Ask one server for its position; those who ask meanwhile share the next answer.
    """

    def __init__(self, conn: psycopg.AsyncConnection[Any], statement: str) -> None:
        self.conn = conn
        self.known = Lsn(0)
        self._statement = statement
        self._lock = asyncio.Lock()
        self._sent_at = float("-inf")

    async def ask(self, since: float) -> Lsn:
        """
        Return a position that was asked for after ``since``.
        """
        async with self._lock:
            if self._sent_at < since:
                sent_at = time.monotonic()
                row = await (await self.conn.execute(self._statement.encode())).fetchone()
                assert row is not None
                self.known, self._sent_at = Lsn.parse(row[0]), sent_at
            return self.known
