"""
What is known about the timelines of a system: pure state, no I/O, no clock.

After a promotion the same LSN stands for different log on the old timeline and on the new one. A
position of an older timeline is proven to be on the newer one by the history of that, which is
learned from a replication connection (``TIMELINE_HISTORY``) or by watching a promotion.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from lsn_consistency._observation import Observation
from lsn_consistency.lsn import Position, TimelineHistory

MAX_HISTORIES: Final = 16
FIRST_TIMELINE: Final = 1


class Timelines:
    """
    Keep the histories that are known, each by its system and timeline.
    """

    __slots__ = ("_histories",)

    def __init__(self) -> None:
        self._histories: dict[tuple[int, int], TimelineHistory] = {}

    def history(self, system_id: int, timeline: int) -> TimelineHistory:
        """
        Return what is known of a timeline's history, which may be nothing.
        """
        known = self._histories.get((system_id, timeline))
        if known is not None:
            return known
        return TimelineHistory(timeline, MappingProxyType({}), timeline == FIRST_TIMELINE)

    def learn(self, system_id: int, history: TimelineHistory) -> None:
        """
        Take a history; one that is complete is never replaced by one that is not.
        """
        if self.history(system_id, history.timeline).complete and not history.complete:
            return
        self._histories[system_id, history.timeline] = history
        while len(self._histories) > MAX_HISTORIES:
            del self._histories[next(iter(self._histories))]

    def watch(self, before: Observation, after: Observation) -> None:
        """
        Learn the switch point of a server that was promoted between two observations.

        Both must have come over one connection, which outlives a promotion and no restart. Then
        ``pg_last_wal_replay_lsn()`` has stood still where recovery ended, and that is where the
        new timeline begins. After a crash recovery the function gives another LSN, so it says
        nothing where the promotion was not watched.
        """
        if not before.in_recovery or after.in_recovery or before.server != after.server:
            return
        if before.timeline is None or after.timeline is None or after.switch_point is None:
            return
        # The server may have followed further timelines after the first observation, all of them
        # below the new one: only without a number in between is the ancestor certain.
        if after.timeline == before.timeline + 1:
            system_id = after.server.system_id
            parent = self.history(system_id, before.timeline)
            self.learn(system_id, parent.continued(after.timeline, after.switch_point))

    def contains(self, timeline: int, position: Position) -> bool | None:
        """
        Tell whether the log of ``timeline`` has ``position``: yes, no, or None for unknown.
        """
        return self.history(position.system_id, timeline).contains(position)
