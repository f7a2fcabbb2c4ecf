"""
What one server said of itself, and how a lag is measured from two such statements.

Pure values; times are those of one monotonic clock, in seconds, handed in by the caller.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final, NamedTuple

from lsn_consistency.lsn import Lsn, Position

MAX_SAMPLES: Final = 4096


class Server(NamedTuple):
    """
    Tell one running server from another.

    An endpoint may hide several servers, and a restarted one is another: it may have come back in
    the past. The address is the server's own view (``inet_server_addr()``), None for a socket file.
    """

    system_id: int
    address: str | None
    port: int | None
    started: str

    @property
    def place(self) -> tuple[int, str | None, int | None]:
        """
        Return what stays the same when the server restarts.
        """
        return self.system_id, self.address, self.port


@dataclass(frozen=True, slots=True)
class Observation:
    """
    Hold what one query saw of one server; None means unknown, never "caught up".

    ``lsn`` is the replay position of a standby, or the normalised insert position of a primary.
    ``bound`` is at or above everything that reads before ``sent_at`` can have shown.
    ``pooled`` tells that a pooler stands between: the next statement may reach another server.
    """

    server: Server
    in_recovery: bool
    timeline: int | None
    lsn: Lsn | None
    sent_at: float
    received_at: float
    bound: Lsn | None = None
    flush_lsn: Lsn | None = None
    flush_delay_seconds: float = 0.0
    replay_age_seconds: float | None = None
    pooled: bool = False

    @property
    def position(self) -> Position | None:
        """
        Return the position, or None while any part of it is unknown.
        """
        return self._at(self.lsn)

    @property
    def bound_position(self) -> Position | None:
        """
        Return the bound as a position, or None while any part of it is unknown.
        """
        return self._at(self.bound)

    def reaches(self, required: Position) -> bool | None:
        """
        Tell whether everything up to ``required`` is visible here: yes, no, or None for unknown.

        Positions of another system or timeline are never compared by their numbers.
        """
        if self.server.system_id != required.system_id:
            return False
        if self.lsn is None or self.timeline is None:
            return None
        return self.timeline == required.timeline and self.lsn >= required.lsn

    def _at(self, lsn: Lsn | None) -> Position | None:
        if lsn is None or self.timeline is None:
            return None
        return Position(self.server.system_id, self.timeline, lsn)


class PrimarySamples:
    """
    Remember where the primary was and when, to tell the age of what a replica shows.

    A replica that has replayed the primary's position of 3 s ago lags for at most 3 s. That is
    right for an idle primary, needs no clock but ours, and grows while the replica is cut off.

    Two positions are kept. The insert position covers every commit, but on a quiet primary it can
    stay ahead of what is flushed, and so of what a standby can have, for as long as 15 s
    (``LOG_SNAPSHOT_INTERVAL_MS`` in bgwriter.c). The flush position has no such tail and misses
    only asynchronous commits of the last ``flush_delay_seconds`` (three times
    ``wal_writer_delay``, PostgreSQL's documentation of ``synchronous_commit``): a replica past it
    is behind by the sample's age plus that delay.
    """

    __slots__ = ("_flush_delay", "_flushes", "_inserts", "_origin", "_spacing", "_times")

    def __init__(self, spacing_seconds: float) -> None:
        self._spacing = spacing_seconds
        self._origin: tuple[int, int] | None = None
        self._flush_delay = 0.0
        self._times: list[float] = []
        self._inserts: list[int] = []
        self._flushes: list[int] = []

    def add(self, seen: Observation) -> None:
        """
        Take an observation of the primary; one without a position is left out.
        """
        if seen.lsn is None or seen.timeline is None:
            return
        if self._times and seen.sent_at <= self._times[-1]:
            return
        flush = seen.lsn if seen.flush_lsn is None else seen.flush_lsn
        origin = (seen.server.system_id, seen.timeline)
        if origin != self._origin or self._went_back(seen.lsn, flush):
            self._origin = origin
            self._drop(len(self._times))
        elif self._replaces_newest(seen.sent_at, seen.lsn, flush):
            self._times.pop()
            self._inserts.pop()
            self._flushes.pop()
        self._flush_delay = seen.flush_delay_seconds
        self._times.append(seen.sent_at)
        self._inserts.append(seen.lsn)
        self._flushes.append(flush)
        if len(self._times) > MAX_SAMPLES:
            self._drop(MAX_SAMPLES // 2)

    def lag_seconds(self, seen: Observation, now: float) -> float:
        """
        Return an upper bound on the age of what ``seen`` shows at ``now``; infinity if unknown.

        The age of the observation is part of it.
        """
        replay = seen.lsn
        if replay is None or self._origin != (seen.server.system_id, seen.timeline):
            return math.inf
        lag = math.inf
        index = bisect_right(self._inserts, replay)
        if index:
            lag = now - self._times[index - 1]
        index = bisect_right(self._flushes, replay)
        if index:
            lag = min(lag, now - self._times[index - 1] + self._flush_delay)
        return lag

    @property
    def newest_at(self) -> float:
        """
        Return when the newest sample was taken; minus infinity before the first.
        """
        return self._times[-1] if self._times else -math.inf

    def _went_back(self, insert: int, flush: int) -> bool:
        # A primary that crashed may have lost WAL that was inserted and never flushed.
        return bool(self._times) and (insert < self._inserts[-1] or flush < self._flushes[-1])

    def _replaces_newest(self, sent_at: float, insert: int, flush: int) -> bool:
        # An idle primary adds no samples, a busy one at most one per spacing. Leaving an older
        # sample out makes a lag look greater, never smaller.
        if not self._times:
            return False
        if (insert, flush) == (self._inserts[-1], self._flushes[-1]):
            return True
        return len(self._times) > 1 and self._times[-1] - self._times[-2] < self._spacing

    def _drop(self, count: int) -> None:
        del self._times[:count]
        del self._inserts[:count]
        del self._flushes[:count]
