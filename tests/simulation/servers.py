"""
PostgreSQL servers that know the truth: what is written, replayed, visible and lost.

A `Server` says of itself what a real one would say in its rows; what it really shows is known only
here. The rows go through the reading of rows in `_sql`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Final

from lsn_consistency import _sql
from lsn_consistency._sql import Row
from lsn_consistency._steps import NodeFailure
from lsn_consistency.lsn import Lsn

SYSTEM: Final = 7_000_000_000_000_000_007
UNIT: Final = 64
BLOCK: Final = 1024
SEGMENT: Final = 1024**2
FLUSH_DELAY: Final = 0.6


class Commit:
    """Hold one transaction: where its commit record ends, when it was made, what it added."""

    __slots__ = ("at", "end", "key", "timeline", "value")

    def __init__(
        self, timeline: int, end: int, at: float, key: Hashable = None, value: Hashable = None
    ) -> None:
        self.timeline = timeline
        self.end = end
        self.at = at
        self.key = key
        self.value = value

    def __repr__(self) -> str:
        return f"<{self.key}={self.value} at {self.timeline}:{Lsn(self.end)}, {self.at:.3f} s>"


class Log:
    """
    Hold the WAL of one timeline, its ancestors' part included.

    ``insert`` and ``flush`` are the ends of records; what is not flushed is lost in a crash.
    ``pending`` commits are in the log, and not yet shown by the primary itself.
    """

    def __init__(self, timeline: int, start: int, commits: Iterable[Commit] = ()) -> None:
        self.timeline = timeline
        self.start = start
        self.insert = self.flush = start
        self.commits = list(commits)
        self.pending: set[Commit] = set()
        self.lost: set[Commit] = set()
        self.ancestors: dict[int, int] = {}

    def write(self) -> None:
        self.insert += UNIT

    def commit(
        self, now: float, *, asynchronous: bool, key: Hashable = None, value: Hashable = None
    ) -> Commit:
        self.write()
        commit = Commit(self.timeline, self.insert, now, key, value)
        self.commits.append(commit)
        if not asynchronous:
            self.flush = self.insert
        return commit

    def flush_due(self, now: float) -> None:
        for commit in reversed(self.commits):
            if commit.end <= self.flush:
                return
            if commit.at + FLUSH_DELAY <= now:
                self.flush = commit.end
                return

    def flush_to(self, commit: Commit) -> None:
        """Be the walwriter, who comes to a commit in time."""
        if commit in self.commits:
            self.flush = max(self.flush, commit.end)

    def crash(self) -> None:
        self.lost.update(commit for commit in self.commits if commit.end > self.flush)
        self.commits = [commit for commit in self.commits if commit.end <= self.flush]
        self.pending.clear()
        self.insert = self.flush

    def fork(self, timeline: int, at: int) -> Log:
        log = Log(timeline, at, (commit for commit in self.commits if commit.end <= at))
        log.lost |= self.lost
        # The file names the timeline that the standby followed, even where its replay had not come
        # to the beginning of that yet: then both were left at the same place.
        log.ancestors = {each: min(end, at) for each, end in self.ancestors.items()}
        log.ancestors[self.timeline] = at
        # The end-of-recovery record.
        log.write()
        log.flush = log.insert
        return log

    def restored(self, at: int) -> Log:
        """Return the same timeline as it was, without what came after ``at``."""
        log = Log(self.timeline, at, (commit for commit in self.commits if commit.end <= at))
        log.ancestors = dict(self.ancestors)
        log.lost = self.lost | {commit for commit in self.commits if commit.end > at}
        return log

    def timeline_at(self, lsn: int) -> int:
        """Return the timeline of the record that ends at a position."""
        return next(
            (each for each, end in sorted(self.ancestors.items()) if lsn <= end), self.timeline
        )

    def history_file(self, timeline: int) -> str:
        return "".join(
            f"{each}\t{Lsn(end)}\tno recovery target specified\n"
            for each, end in sorted(self.ancestors.items())
            if each < timeline
        )


class Server:
    """
    Be one PostgreSQL server; ``life`` counts how often all of its connections died.

    ``restartpoint`` is the timeline of its last restartpoint, which is all that a plain role can
    see of it; None for nothing at all. ``timeline_known`` says that the role may see more.
    """

    def __init__(self, name: str, log: Log, *, primary: bool = False, system: int = SYSTEM) -> None:
        self.name = name
        self.log = log
        self.is_primary = primary
        self.system = system
        self.replay = self.receive = log.start
        self.streaming = True
        self.applying = False
        self.replay_known = True
        self._paused = False
        self._delayed = False
        self.frozen = False
        self.alive = True
        self.timeline_known = True
        self.restartpoint: int | None = None
        self.recovery_end: int | None = None
        self.wal_functions = True
        self.started = 1
        self.life = 1

    @property
    def paused(self) -> bool:
        """Tell whether replay is paused; the record that is being applied is still finished."""
        return self._paused

    @paused.setter
    def paused(self, value: bool) -> None:
        self.replay = self.replay if self.is_primary else self.shown
        self._paused = value

    @property
    def delayed(self) -> bool:
        """Tell whether there is a ``recovery_min_apply_delay``."""
        return self._delayed

    @delayed.setter
    def delayed(self, value: bool) -> None:
        self.replay = self.replay if self.is_primary else self.shown
        self._delayed = value

    @property
    def shown(self) -> int:
        """Return the end of what a statement on this server can see."""
        if self.is_primary:
            return self.log.insert
        if self.applying and not self.paused and not self.delayed:
            # A commit is visible a moment before the replay position covers it.
            later = [c.end for c in self.log.commits if self.replay < c.end <= self.receive]
            return min(later, default=self.replay)
        return self.replay

    def visible(self) -> list[Commit]:
        if self.is_primary:
            pending = self.log.pending
            return [commit for commit in self.log.commits if commit not in pending]
        shown = self.shown
        return [commit for commit in self.log.commits if commit.end <= shown]

    def staleness(self, now: float) -> float:
        """Return the age of the oldest commit of this server's timeline that it does not show."""
        if self.is_primary:
            return 0.0
        shown = self.shown
        missing = [commit.at for commit in self.log.commits if commit.end > shown]
        return now - min(missing) if missing else 0.0

    def replicate(self, received: float, replayed: float) -> None:
        """Receive and replay a share of what there is."""
        if self.is_primary or not self.alive:
            return
        if self.streaming:
            self.receive += _share(max(0, self.log.flush - self.receive), received)
        if not self.paused:
            self.replay += _share(max(0, self.receive - self.replay), replayed)

    def crash(self, share: float, *, postmaster: bool = True) -> None:
        """Die and come back: a primary without what was not flushed, a standby in the past."""
        self.life += 1
        self.started += postmaster
        self.frozen = False
        if self.is_primary:
            self.log.crash()
            # The function now tells of the crash recovery, not of any promotion.
            self.recovery_end = self.log.flush
            return
        self.replay -= _share(max(0, self.replay - self.log.start), share)
        self.receive = max(self.replay - 4 * UNIT, 0)

    def stop(self) -> None:
        self.life += 1
        self.started += 1
        self.alive = False
        self.recovery_end = None
        if self.is_primary:
            self.log.crash()

    def promote(self, timeline: int) -> None:
        self.recovery_end = self.replay
        self.log = self.log.fork(timeline, self.replay)
        self.is_primary = True

    def follow(self, log: Log) -> None:
        """Stream from ``log``; a server that went past the fork is rewound, which restarts it."""
        self.life += 1
        self.started += 1
        reached = self.log.flush if self.is_primary else max(self.replay, self.receive)
        place = min(reached, log.start)
        self.log, self.is_primary, self.alive = log, False, True
        self.recovery_end = None
        self.replay = self.receive = place

    # What it says

    def answer(self, statement: bytes, pid: int, transaction: int = 0) -> Row:
        """Run a statement of `_sql` that asks for something, in a numbered transaction."""
        probes = (_sql.PROBE_STANDBY, _sql.PROBE_PRIMARY)
        if statement in (*probes, _sql.POSITION, _sql.IDENTIFY) and not self.wal_functions:
            raise NodeFailure(PermissionError("permission denied"), state="42501")
        if statement in (_sql.PROBE_PRIMARY, _sql.POSITION) and not self.is_primary:
            raise NodeFailure(ValueError("recovery is in progress"), state="55000")
        if statement == _sql.POSITION:
            return (str(_raw_insert(self.log.insert)), f"{self.log.timeline:08X}")
        if statement == _sql.PROBE_STANDBY and self.is_primary:
            return (str(pid), "f", None, "0/1", "0/2", "9", None, "f", "f", None, None)
        if statement in probes:
            return self.probe_row(pid)
        if statement == _sql.IDENTIFY:
            return [*self.probe_row(pid), *self.identity_row(pid, transaction)]
        if statement == _sql.IDENTIFY_WITHOUT_WAL:
            recovery = "f" if self.is_primary else "t"
            known = (str(pid), recovery, None, None, None, None, None, "f", "f", None, None)
            _, *place, session = self.identity_row(pid, transaction)
            return (*known, "0", *place[:3], "8192", "16777216", "0", session)
        timeline = self.log.timeline if self.is_primary else self.log.timeline_at(self.replay)
        if statement == _sql.IDENTIFY_SYSTEM:
            return (str(self.system), str(timeline), str(Lsn(self.shown)), None)
        # It may have come to another timeline since it was asked for its own.
        for each in (*self.log.ancestors, self.log.timeline):
            if statement == _sql.timeline_history(each):
                return (f"{each:08X}.history", self.log.history_file(each))
        if statement.startswith(b"TIMELINE_HISTORY"):
            raise NodeFailure(FileNotFoundError("no such history file"), state="58P01")
        raise AssertionError(f"an unknown statement: {statement!r}")

    def probe_row(self, pid: int) -> Row:
        recovery = not self.is_primary
        streams = recovery and self.streaming
        known = self.log.timeline if self.timeline_known or not recovery else None
        timeline = self.restartpoint if known is None or streams else known
        received = known if streams else None
        return (
            str(pid),
            "t" if recovery else "f",
            ("paused" if self.paused else "not paused") if recovery else None,
            self._position() if recovery else str(_raw_insert(self.log.insert)),
            str(Lsn(self.receive)) if recovery else str(Lsn(self.log.flush)),
            None if timeline is None else str(timeline) if recovery else f"{timeline:08X}",
            None if received is None else str(received),
            "t" if streams else "f",
            "t" if recovery and self.delayed else "f",
            None,
            None if recovery or self.recovery_end is None else str(Lsn(self.recovery_end)),
        )

    def _position(self) -> str | None:
        # It is NULL until something was replayed after a start.
        return str(Lsn(self.replay)) if self.replay_known else None

    def identity_row(self, pid: int, transaction: int) -> Row:
        return (
            str(self.system),
            self.name,
            "5432",
            # No two servers start in the same microsecond.
            f"{self.started}.{self.name}",
            str(BLOCK),
            str(SEGMENT),
            str(FLUSH_DELAY / 3),
            f"{pid} {self.name} {transaction}",
        )


def _share(length: int, share: float) -> int:
    return round(length / UNIT * share) * UNIT


def _raw_insert(lsn: int) -> Lsn:
    # At the end of a page the server reports the place after the next page's header.
    if lsn % BLOCK:
        return Lsn(lsn)
    return Lsn(lsn + (40 if lsn % SEGMENT == 0 else 24))
