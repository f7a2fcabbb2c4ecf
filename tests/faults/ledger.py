"""
What was written and what is left of it: lost, phantom and wrongly accepted writes.

A census compares the ledger with what the primary has, after every fault that may lose something
and at the end of a run. This module is pure: it is given the values that are there.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lsn_consistency.testing.checker import Operation
from tests.faults.nemesis import Episode

LOOK_BACK_SECONDS = 120.0
"""No fault lasts so long that it could lose what was written before."""


class Entry(NamedTuple):
    """
    One value: when and where it was written, and what its writer was told.
    """

    began: float
    ended: float
    outcome: Literal["ok", "failed", "unknown"]
    asynchronous: bool
    node: str | None


@dataclass(slots=True)
class Ledger:
    """
    Keep every value that was written, and say which are missing without excuse.

    ``lost`` are the values that faults have lost, acknowledged or not, and when that was found:
    nobody need see them, and nobody may see them again. ``counts`` are the acknowledged ones among
    them, by what excuses them.
    """

    entries: dict[int, Entry] = field(default_factory=dict)
    lost: dict[int, float] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _revenants: dict[int, Operation] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, operation: Operation, *, asynchronous: bool) -> None:
        """
        Take a write into the ledger.
        """
        entry = Entry(
            operation.began, operation.ended, operation.outcome, asynchronous, operation.node
        )
        with self._lock:
            for values in operation.values.values():
                for value in values:
                    self.entries[value] = entry

    def read(self, operation: Operation) -> None:
        """
        Take note of a read that shows what was lost before it began.
        """
        for values in operation.values.values():
            for value in self.lost.keys() & values:
                if self.lost[value] < operation.began:
                    self._revenants.setdefault(value, operation)

    def since(self, time: float) -> int:
        """
        Return a value below all those that a loss at ``time`` can concern.
        """
        oldest = time - LOOK_BACK_SECONDS
        recent = (value for value, entry in self._written() if entry.ended > oldest)
        return min(recent, default=1) - 1

    def census(
        self, present: Set[int], *, after: int, before: float, episode: Episode | None = None
    ) -> None:
        """
        Compare the values above ``after`` whose writes ended ``before`` with what is present.

        ``episode`` is the fault that may have lost some; without one nothing may be missing.
        """
        missing = {
            value: entry
            for value, entry in self._written()
            if after < value and entry.ended < before and entry.outcome != "failed"
            if value not in present and value not in self.lost
        }
        for value, entry in missing.items():
            if entry.outcome == "ok":
                self._acknowledged(value, entry, episode)
        # A new dictionary, since readers of the old one are in another thread.
        self.lost = {**self.lost, **dict.fromkeys(missing, before)}

    def _written(self) -> list[tuple[int, Entry]]:
        # A census is taken in the thread of the nemesis, while the clients go on writing.
        with self._lock:
            return list(self.entries.items())

    def _acknowledged(self, value: int, entry: Entry, episode: Episode | None) -> None:
        told = f"{value} is missing after {episode.name if episode else 'the end'}: {entry}"
        if not episode or not _is_excused(entry, episode):
            self.problems.append(f"lost: {told}")
        elif entry.node == episode.deposed and entry.began > episode.broken:
            self.problems.append(f"accepted by a deposed primary: {told}")
        else:
            self.counts[episode.loses] += 1

    def close(self, present: Set[int]) -> None:
        """
        Hold the last census, and blame the reads that were served from an abandoned timeline.

        A write of which its client heard nothing may have been under way during a census: what is
        there at the end was not lost.
        """
        self.census(present, after=0, before=math.inf)
        for value, entry in self._written():
            if entry.outcome == "failed" and value in present:
                self.problems.append(f"phantom: {value} is there and its write failed: {entry}")
        for value, operation in self._revenants.items():
            if value not in present:
                self.problems.append(f"abandoned: {value} was lost and is shown by {operation}")

    def outcomes(self) -> Mapping[str, int]:
        """
        Return how many values were written, by outcome.
        """
        return Counter(entry.outcome for entry in self.entries.values())


def _is_excused(entry: Entry, episode: Episode) -> bool:
    # Only what the server that failed had acknowledged may be lost with it.
    if entry.node not in episode.nodes:
        return False
    return episode.loses == "acknowledged" or (
        episode.loses == "asynchronous" and entry.asynchronous
    )
