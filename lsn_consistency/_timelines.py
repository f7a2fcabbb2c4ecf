"""
What is known about the timelines of a system: pure state, no I/O, no clock.

After a promotion the same LSN stands for different log on the old timeline and on the new one. A
position of an older timeline is proven to be on the newer one by the history of that, which is
learned from a replication connection (``TIMELINE_HISTORY``) or by watching a promotion.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from lsn_consistency._observation import Observation, Server
from lsn_consistency.lsn import Lsn, Position, TimelineHistory

MAX_HISTORIES: Final = 16
FIRST_TIMELINE: Final = 1


class Timelines:
    """
    Keep the histories that are known, each by its system and timeline, and where they begin.
    """

    __slots__ = ("_floors", "_histories", "_sources")

    def __init__(self) -> None:
        self._histories: dict[tuple[int, int], TimelineHistory] = {}
        self._sources: dict[tuple[int, int], Server] = {}
        self._floors: dict[tuple[int, int], Lsn] = {}

    def history(self, system_id: int, timeline: int) -> TimelineHistory:
        """
        Return what is known of a timeline's history, which may be nothing.
        """
        known = self._histories.get((system_id, timeline))
        if known is not None:
            return known
        return TimelineHistory(timeline, MappingProxyType({}), timeline == FIRST_TIMELINE)

    def learn(self, server: Server, history: TimelineHistory) -> None:
        """
        Take a history from a server; one that is complete is never replaced by one that is not.
        """
        key = (server.system_id, history.timeline)
        if self.history(*key).complete and not history.complete:
            return
        self._histories[key] = history
        self._sources[key] = server
        while len(self._histories) > MAX_HISTORIES:
            oldest = next(iter(self._histories))
            del self._histories[oldest], self._sources[oldest]

    def lead(self, seen: Observation) -> None:
        """
        Take an observation of the primary.

        Where two servers were promoted without knowing of each other, both timelines have the same
        number: the history that one gave says nothing of the other's.
        """
        if seen.timeline is None or seen.lsn is None:
            return
        key = (seen.server.system_id, seen.timeline)
        source = self._sources.get(key)
        if source is not None and not _is_same(source, seen.server):
            for known in (self._histories, self._sources, self._floors):
                known.pop(key, None)
        # After a crash the primary can be a little behind where it was.
        self._floors[key] = min(seen.lsn, self._floors.get(key, seen.lsn))
        while len(self._floors) > MAX_HISTORIES:
            del self._floors[next(iter(self._floors))]

    def own_position(self, seen: Observation, lsn: Lsn | None) -> Position | None:
        """
        Return a position at or after ``lsn`` in the own part of the observed timeline, or None.

        A standby that follows a timeline can still be in the part that it shares with an earlier
        one. Its position there, named by the later timeline, would stand for less than positions
        of the earlier one that are beyond it.
        """
        if lsn is None or seen.timeline is None:
            return None
        position = Position(seen.server.system_id, seen.timeline, lsn)
        if seen.timeline in (FIRST_TIMELINE, seen.begun_timeline):
            return position
        floor = self._floor(position)
        return None if floor is None else position._replace(lsn=max(lsn, floor))

    def _floor(self, position: Position) -> Lsn | None:
        history = self.history(position.system_id, position.timeline)
        if history.complete:
            # The timeline begins where it left its parent.
            return history.switch_points[max(history.switch_points)]
        return self._floors.get((position.system_id, position.timeline))

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
        if before.pooled or after.pooled:
            # A pooler's connection outlives a restart as well.
            return
        if before.timeline is None or after.timeline is None or after.switch_point is None:
            return
        # The server may have followed further timelines after the first observation, all of them
        # below the new one: only without a number in between is the ancestor certain.
        if after.timeline == before.timeline + 1:
            parent = self.history(after.server.system_id, before.timeline)
            self.learn(after.server, parent.continued(after.timeline, after.switch_point))

    def contains(self, timeline: int, position: Position) -> bool | None:
        """
        Tell whether the log of ``timeline`` has ``position``: yes, no, or None for unknown.
        """
        return self.history(position.system_id, timeline).contains(position)


def _is_same(one: Server, other: Server) -> bool:
    # A server that was restarted, or one that is reached at another address.
    return one.place == other.place or one.started == other.started
