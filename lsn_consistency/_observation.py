"""
What one server said of itself, and how a lag is measured from two such statements.

Pure values; times are those of one monotonic clock, in seconds, handed in by the caller.
"""

from __future__ import annotations

import math
from bisect import bisect_right
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


class Observation(NamedTuple):
    """
    Hold what one query saw of one server; None means unknown, never "caught up".

    ``lsn`` is the replay position of a standby, or the normalised insert position of a primary.
    ``bound`` is at or above everything that reads before ``sent_at`` can have shown.
    ``pooled`` tells that a pooler stands between: the next statement may reach another server.

    A standby's ``timeline`` is only a lower bound unless ``timeline_is_certain``. ``streaming``
    tells that it has a walreceiver. ``switch_point`` is where a server that is no standby any more
    ended its last recovery, whatever that recovery was for. ``transaction`` names the one in which
    the server was identified. The log up to ``lsn`` has gone beyond the beginning of
    ``begun_timeline``, a lower bound of ``timeline``.
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
    timeline_is_certain: bool = True
    streaming: bool = False
    switch_point: Lsn | None = None
    transaction: str | None = None
    begun_timeline: int | None = None

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

    def is_of_same_state(self, known: Observation) -> bool:
        """
        Tell whether the same server was in the same role and on the same timeline before.
        """
        return (
            self.server == known.server
            and self.in_recovery == known.in_recovery
            and self.timeline == known.timeline
        )

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

    The insert position covers every commit, but on a quiet primary it can stay ahead of what is
    flushed, and so of what a standby can have, for as long as 15 s (``LOG_SNAPSHOT_INTERVAL_MS``
    in bgwriter.c). So a second series holds flush positions. They count only when the insert
    position has stood still for three times ``wal_writer_delay``: an asynchronous commit is
    flushed within that time (PostgreSQL's documentation of ``synchronous_commit``), so what is
    not flushed by then is no commit.
    """

    __slots__ = ("_flushes", "_inserts", "_origin", "_server", "_still_since")

    def __init__(self, spacing_seconds: float) -> None:
        self._origin: tuple[int, int] | None = None
        self._server: Server | None = None
        self._still_since = math.inf
        self._inserts = _Series(spacing_seconds)
        self._flushes = _Series(spacing_seconds)

    @property
    def newest_at(self) -> float:
        """
        Return when the newest sample was taken; minus infinity before the first.
        """
        return self._inserts.newest_at

    def add(self, seen: Observation) -> None:
        """
        Take an observation of the primary; one without a position, or out of order, is left out.
        """
        if seen.lsn is None or seen.timeline is None or seen.sent_at <= self.newest_at:
            return
        flush = seen.lsn if seen.flush_lsn is None else seen.flush_lsn
        origin = (seen.server.system_id, seen.timeline)
        # A primary that crashed may have lost WAL that was inserted and never flushed.
        went_back = seen.lsn < self._inserts.newest or flush < self._flushes.newest
        if origin != self._origin or went_back:
            self._origin = origin
            self._inserts.clear()
            self._flushes.clear()
        if seen.lsn != self._inserts.newest or seen.server != self._server:
            # The position may have been reached as late as this.
            self._still_since = seen.received_at
        self._server = seen.server
        self._inserts.add(seen.sent_at, seen.lsn)
        if seen.sent_at - self._still_since >= seen.flush_delay_seconds:
            self._flushes.add(seen.sent_at, flush)

    def interrupt(self) -> None:
        """
        Take the loss of the primary: after a crash, other WAL may stand at the same position.
        """
        self._server = None

    def lag_seconds(self, seen: Observation, now: float) -> float:
        """
        Return an upper bound on the age of what ``seen`` shows at ``now``; infinity if unknown.

        The age of the observation is part of it.
        """
        return now - self.moment_of(seen)

    def moment_of(self, seen: Observation) -> float:
        """
        Return a time of which ``seen`` shows everything; minus infinity if none is known.
        """
        if seen.lsn is None or self._origin != (seen.server.system_id, seen.timeline):
            return -math.inf
        if seen.lsn > self._inserts.newest and seen.received_at <= self.newest_at:
            # No standby of this primary can be ahead of it: it follows another.
            return -math.inf
        return max(self._inserts.time_of(seen.lsn), self._flushes.time_of(seen.lsn))


class _Series:
    """
    Hold positions that only grow, each with the newest time at which it was seen.
    """

    __slots__ = ("_lsns", "_spacing", "_times")

    def __init__(self, spacing_seconds: float) -> None:
        self._spacing = spacing_seconds
        self._times: list[float] = []
        self._lsns: list[int] = []

    @property
    def newest(self) -> int:
        return self._lsns[-1] if self._lsns else -1

    @property
    def newest_at(self) -> float:
        return self._times[-1] if self._times else -math.inf

    def add(self, time: float, lsn: int) -> None:
        # An idle primary adds no samples, a busy one at most one per spacing. Leaving an older
        # sample out makes a lag look greater, never smaller.
        crowded = len(self._times) > 1 and self._times[-1] - self._times[-2] < self._spacing
        if lsn == self.newest or crowded:
            self._times.pop()
            self._lsns.pop()
        self._times.append(time)
        self._lsns.append(lsn)
        if len(self._times) > MAX_SAMPLES:
            del self._times[: MAX_SAMPLES // 2]
            del self._lsns[: MAX_SAMPLES // 2]

    def time_of(self, lsn: int) -> float:
        """
        Return the newest time at which the position was at most ``lsn``.
        """
        index = bisect_right(self._lsns, lsn)
        return self._times[index - 1] if index else -math.inf

    def clear(self) -> None:
        self._times.clear()
        self._lsns.clear()
