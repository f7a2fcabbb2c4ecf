"""
What routers ask replicas for positions: as they send it, and as the replicas see it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import psycopg

from lsn_consistency import _wire
from lsn_consistency._steps import Fetch, Reply
from lsn_consistency.testing import Node

MONITOR: Final = "lsn_consistency"
"""The application name of a monitor's connection."""

LOOK_SECONDS: Final = 0.005
# What asks a standby for its position calls this; nothing else here does.
_FUNCTION: Final = b"pg_last_wal_replay_lsn()"
_SERVED: Final = f"""
    SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements
    WHERE query LIKE '%{_FUNCTION.decode()}%' AND query NOT LIKE '%pg_stat_statements%'
"""
# A monitor may have a second connection for WAIT FOR LSN, which is no probe.
_AT_WORK: Final = f"""
    SELECT count(*) FROM pg_stat_activity WHERE application_name = '{MONITOR}'
    AND state = 'active' AND query LIKE '%{_FUNCTION.decode()}%'
"""


@dataclass(frozen=True, slots=True)
class Asked:
    """
    Hold how many statements asked replicas for a position.

    ``most_in_flight`` is that of monitors' probes to one server at any time.
    """

    by_monitors: int
    by_reads: int
    most_in_flight: int


class Sent:
    """
    Count the statements of async routers as they send them, for the time of a `with` block.
    """

    def __init__(self) -> None:
        self._fetch = _wire.fetch_async
        self._by_monitors = 0
        self._by_reads = 0
        self._in_flight: Counter[bytes] = Counter()
        self._most = 0

    def __enter__(self) -> Self:
        _wire.fetch_async = self._counted
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _wire.fetch_async = self._fetch

    def asked(self) -> Asked:
        """
        Return what was asked up to now, and begin anew with the most in flight.
        """
        self._most = max(self._in_flight.values(), default=0)
        return Asked(self._by_monitors, self._by_reads, 0)

    def since(self, before: Asked) -> Asked:
        """
        Return what was asked since then.
        """
        return Asked(
            self._by_monitors - before.by_monitors, self._by_reads - before.by_reads, self._most
        )

    async def _counted(self, step: Fetch, timeout: float) -> Reply:
        pgconn = step.conn.pgconn
        # A primary is asked for what it has written, which is no load on a replica.
        if _FUNCTION not in step.statement or pgconn.parameter_status(b"in_hot_standby") != b"on":
            return await self._fetch(step, timeout)
        if pgconn.parameter_status(b"application_name") != MONITOR.encode():
            self._by_reads += 1
            return await self._fetch(step, timeout)
        self._by_monitors += 1
        port = pgconn.port
        self._in_flight[port] += 1
        self._most = max(self._most, self._in_flight[port])
        try:
            return await self._fetch(step, timeout)
        finally:
            self._in_flight[port] -= 1


class Watched:
    """
    Read the statistics of replicas, for the time of a `with` block.
    """

    def __init__(self, replicas: Sequence[Node]) -> None:
        self._replicas = replicas
        self._conns: list[psycopg.Connection[Any]] = []

    def __enter__(self) -> Self:
        self._conns = [each.connect() for each in self._replicas]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for conn in self._conns:
            conn.close()

    def served(self) -> int:
        """
        Return how often the replicas were asked for a position up to now.
        """
        return sum(_value(conn, _SERVED) for conn in self._conns)

    @contextmanager
    def at_work(self) -> Iterator[list[int]]:
        """
        Look again and again how many probes a replica is answering, in a thread.
        """
        seen, ended = [0], threading.Event()

        def look() -> None:
            with ExitStack() as stack:
                conns = [stack.enter_context(each.connect()) for each in self._replicas]
                while not ended.wait(LOOK_SECONDS):
                    seen.extend(_value(conn, _AT_WORK) for conn in conns)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield seen
        finally:
            ended.set()
            thread.join()


def _value(conn: psycopg.Connection[Any], statement: str) -> int:
    row = conn.execute(statement.encode()).fetchone()
    assert row is not None
    return int(row[0])
