"""
What clients saw during each kind of fault, in numbers, and which reads nobody could have answered.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from lsn_consistency import Position
from tests.faults.attempts import Sample
from tests.faults.nemesis import Episode

SAMPLE_SECONDS: Final = 1.0
"""So far apart the router's samples of the primary may be, on a machine with much to do."""


class Unanswered(NamedTuple):
    """
    A read that raised, or took longer than its client allows.

    Until ``pinned_until`` its session was bound to the primary, because the position of a write or
    of an interrupted read is not known; ``position`` is what the session asked for.
    """

    episode: Episode | None
    level: str
    began: float
    ended: float
    pinned_until: float
    position: Position | None
    error: str

    @property
    def excuse(self) -> str | None:
        """
        Return why no server that was left could have kept the promise of this read.

        Only a fault of the primary is one, and only until the primary is there again: a replica
        must not answer a strong read, a session that is pinned, or one that is ahead of every
        replica, and without a primary nothing says how old a replica is.
        """
        episode = self.episode
        if episode is None or self.began > episode.healed:
            return None
        if all(fault.scope == "replica" for fault in episode.faults):
            return None
        # After its end a pin is served by a replica that shows something later, which is known from
        # samples of the primary.
        if self.pinned_until > min(self.began, episode.began - SAMPLE_SECONDS):
            return "pinned to the primary"
        if self.level == "strong":
            return "strong"
        if self.level.startswith("bounded"):
            return "no primary to bound the lag by"
        if self.position and episode.reached and self.position.lsn > episode.reached:
            return "ahead of every replica"
        return None

    def __str__(self) -> str:
        return (
            f"{self.level}, {self.ended - self.began:.2f} s, "
            f"pin {self.pinned_until - self.began:+.2f}, {self._when()}, "
            f"at {self._where()}: {self.error}"
        )

    def _when(self) -> str:
        if self.episode is None:
            return "before any fault"
        moments = ("began", "broken", "healing", "healed")
        times = (f"{name} {getattr(self.episode, name) - self.began:+.2f}" for name in moments)
        return f"fault {' '.join(times)}"

    def _where(self) -> str:
        reached = self.episode.reached if self.episode else None
        position = self.position
        text = f"{position.lsn} of {position.timeline}" if position else "no position"
        return f"{text} (replicas {reached})" if reached else text


@dataclass(slots=True)
class Tally:
    """
    Count the reads that ended from one kind of fault's beginning to the next fault's.

    Reads that the client itself gave up count neither as answered nor as unanswered. ``active``
    counts by role the reads that were answered while the fault lasted. ``seconds`` is the time in
    which the fault was there or being healed.
    """

    times: int = 0
    seconds: float = 0.0
    answered: int = 0
    given_up: int = 0
    unanswered: list[Unanswered] = field(default_factory=list)
    writes: Counter[str] = field(default_factory=Counter)
    latencies: array[float] = field(default_factory=lambda: array("f"))
    active: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def reads(self) -> int:
        """
        Return the reads that should have been answered.
        """
        return self.answered + len(self.unanswered)

    def latency(self, share: float) -> float:
        """
        Return the seconds within which that share of the answered reads was answered.
        """
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    @property
    def replica_share(self) -> float | None:
        """
        Return the share of replicas in the answers while the fault lasted; None without answers.
        """
        total = sum(self.active.values())
        return self.active["replica"] / total if total else None

    def add(self, sample: Sample, episode: Episode | None, *, active: bool) -> None:
        """
        Count one operation; ``active`` tells that the fault lasts.
        """
        operation = sample.operation
        if operation.kind == "write":
            self.writes["given up" if sample.cancelled else operation.outcome] += 1
        elif operation.outcome == "ok":
            self.answered += 1
            self.latencies.append(operation.ended - operation.began)
            self.reasons[operation.reason or "not known"] += 1
            if active:
                self.active[operation.role or ""] += 1
        elif sample.cancelled:
            self.given_up += 1
        else:
            self.unanswered.append(
                Unanswered(
                    episode,
                    sample.level,
                    operation.began,
                    operation.ended,
                    sample.pinned_until,
                    sample.position,
                    f"{type(sample.error).__name__}: {sample.error}",
                )
            )
