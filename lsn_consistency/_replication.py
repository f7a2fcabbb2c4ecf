"""
What only a replication connection tells: a standby's timeline, and the history of a timeline.

A role with the REPLICATION attribute may ask for both at any time (``IDENTIFY_SYSTEM``,
``TIMELINE_HISTORY``). One without it is refused; then the router knows less, and is as safe.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from lsn_consistency import _wire
from lsn_consistency._core import Core
from lsn_consistency._observation import Observation, Server
from lsn_consistency._steps import ask_timeline

FIRST_PATIENCE_SECONDS: Final = 2.0
MAX_PATIENCE_SECONDS: Final = 600.0
"""Times between two tries where the last one failed; most roles are refused every time."""

_logger = logging.getLogger("lsn_consistency")


class TimelineSource:
    """
    Ask one node's server about timelines, while there is a question that nothing else answers.

    ``connect(replication=True)`` opens a replication connection.
    """

    def __init__(self, name: str, connect: Any, core: Core) -> None:
        self._name = name
        self._connect = connect
        self._core = core
        self._conn: Any = None
        self._asked: tuple[Server, int | None] | None = None
        self._patience = FIRST_PATIENCE_SECONDS
        self._asks_at = float("-inf")

    async def ask(self, seen: Observation) -> None:
        """
        Learn what is missing about the server of an observation; a failure changes nothing.
        """
        cluster = self._core.cluster
        if seen.pooled or not (cluster.wants_history(seen) or cluster.wants_timeline(seen)):
            self.close()
            return
        question = (seen.server, max(seen.timeline or 0, cluster.timeline))
        if question != self._asked:
            self._asked, self._patience = question, FIRST_PATIENCE_SECONDS
        elif self._core.clock() < self._asks_at:
            return
        try:
            await self._learn(seen)
        except Exception as error:
            # Also a history that cannot be read: what is not known is not believed.
            _logger.debug("%s tells nothing of timelines: %s", self._name, error)
            self.close()
            self._asks_at = self._core.clock() + self._patience
            self._patience = min(2 * self._patience, MAX_PATIENCE_SECONDS)

    def close(self) -> None:
        """
        Close the connection, if there is one.
        """
        if self._conn is not None:
            self._conn.pgconn.finish()
        self._conn = None

    def forget(self) -> None:
        """
        Let go of a connection that belongs to the parent process.
        """
        self._conn = None

    async def _learn(self, seen: Observation) -> None:
        core = self._core
        if self._conn is None:
            async with asyncio.timeout(core.settings.connect_timeout):
                self._conn = await self._connect(replication=True)
        plan = ask_timeline(self._conn, seen.server)
        timeline, history = await _wire.run_async(plan, core.settings.probe_timeout)
        # A standby's copy of a history may be of another leader with the same timeline.
        known = None if seen.in_recovery else history
        core.cluster.learn(self._name, seen.server, timeline, known)
        if seen.in_recovery:
            # The question came after the observation, so the position is in this timeline's log.
            certain = max(timeline, seen.timeline or 0)
            core.observed(self._name, seen._replace(timeline=certain, timeline_is_certain=True))
