"""
Let a standby say when it has replayed a position, instead of asking again and again.

PostgreSQL 19 has ``WAIT FOR LSN``, which the startup process wakes. It knows no timeline, so its
answer proves nothing: it only tells when a probe is worth while, and the probe decides. Where the
statement is missing, refused or interrupted, the monitor polls as it does without.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from lsn_consistency import _sql, _wire
from lsn_consistency._core import Core
from lsn_consistency._observation import Observation
from lsn_consistency._steps import Fetch, NodeFailure, identify
from lsn_consistency.lsn import Lsn, Position

WAIT_SECONDS: Final = 1.0
"""How long one statement waits; nothing stays on a server for longer when all have given up."""

FIRST_RETRY_SECONDS: Final = 1.0
MAX_RETRY_SECONDS: Final = 600.0
"""Times of polling after a failed wait; a server that lacks the statement is tried again too."""

IDLE_SECONDS: Final = 30.0
"""A connection that no read has needed for so long is closed."""

_logger = logging.getLogger("lsn_consistency")


class ReplayWait:
    """
    Wait on one node's server for the least position that a read waits for.

    ``wake`` has the monitor look; ``connect`` opens a connection, of which there is one at most.
    """

    def __init__(self, connect: Any, core: Core, wake: Callable[[], None]) -> None:
        self._connect = connect
        self._core = core
        self._wake = wake
        self._conn: Any = None
        self._task: asyncio.Task[None] | None = None
        self._target: Position | None = None
        self._retry = FIRST_RETRY_SECONDS
        self._tries_at = float("-inf")
        self._used_at = float("-inf")

    def covers(self, seen: Observation | None) -> bool:
        """
        Tell whether a wait is under way that no waiting read's position is before.
        """
        if self._task is None or self._target is None or seen is None:
            return False
        least = self._core.cluster.least_awaited(seen)
        same = (seen.server.system_id, seen.timeline) == self._target[:2]
        return same and least is not None and least >= self._target.lsn

    def tend(self, seen: Observation) -> None:
        """
        Begin a wait if a read waits for what a standby observed so has not replayed.
        """
        now = self._core.clock()
        if self._conn is not None and self._task is None and now - self._used_at > IDLE_SECONDS:
            self.close()
        least = self._core.cluster.least_awaited(seen)
        if self._task is not None or least is None or now < self._tries_at:
            return
        if not seen.in_recovery or seen.pooled or seen.timeline is None:
            return
        target = Position(seen.server.system_id, seen.timeline, least)
        if target == self._target:
            # The server has said yes, and the probe no: another timeline, or a server that lies.
            self._back_off(now)
            return
        self._used_at = now
        self._target = target
        self._task = asyncio.create_task(self._wait(seen, least), name="lsn_consistency wait")

    def close(self) -> None:
        """
        Close the connection, if there is one, and end what waits on it.
        """
        if self._task is not None:
            self._task.cancel()
        if self._conn is not None:
            self._conn.pgconn.finish()
        self.forget()

    async def stop(self) -> None:
        """
        Close the connection and return when nothing waits on it any more.
        """
        task = self._task
        self.close()
        if task is not None:
            await asyncio.gather(task, return_exceptions=True)

    def forget(self) -> None:
        """
        Let go of what belongs to the parent process.
        """
        self._conn = self._task = self._target = None

    async def _wait(self, seen: Observation, lsn: Lsn) -> None:
        try:
            answer = await self._ask(seen, lsn)
        except Exception as error:
            _logger.debug("%s cannot be waited on: %s", seen.server, error)
            self._task = None
            self.close()
            self._back_off(self._core.clock())
        else:
            self._task = None
            self._retry = FIRST_RETRY_SECONDS
            if answer != _sql.REACHED:
                # A wait that ran into its time-out may begin again.
                self._target = None
        self._wake()

    async def _ask(self, seen: Observation, lsn: Lsn) -> str | None:
        timeout = self._core.settings.probe_timeout
        if self._conn is None:
            async with asyncio.timeout(self._core.settings.connect_timeout):
                self._conn = await self._connect()
            if self._conn.info.server_version < _sql.WAIT_FOR_VERSION:
                raise NodeFailure(ValueError("the server is older than WAIT FOR LSN"))
            identity, _ = await _wire.run_async(identify(self._conn), timeout)
            if identity.pooled or identity.server != seen.server:
                raise NodeFailure(ConnectionError("the connection is of another server"))
            await _wire.fetch_async(Fetch(self._conn, _sql.READ_COMMITTED), timeout)
        statement = _sql.wait_for(lsn, WAIT_SECONDS)
        reply = await _wire.fetch_async(
            Fetch(self._conn, statement, simple=True), WAIT_SECONDS + timeout
        )
        return reply.row[0] if reply.row else None

    def _back_off(self, now: float) -> None:
        self._target = None
        self._tries_at = now + self._retry
        self._retry = min(2 * self._retry, MAX_RETRY_SECONDS)
