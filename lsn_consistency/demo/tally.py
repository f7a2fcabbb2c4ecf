"""
What the check counts, and its verdict: pure functions of what the clients saw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

PRIMARY: Final = "primary"


@dataclass(frozen=True, slots=True)
class Sample:
    """
    Hold one read: who served it, by the server's own word and by the router's, and what it lacked.

    ``twin_stale`` is None where the twin had no answer.
    """

    node: str
    route: str
    waited_ms: float
    stale: bool
    twin_stale: bool | None


@dataclass(slots=True)
class Tally:
    """
    Count the reads of one phase.
    """

    title: str
    reads: int = 0
    by_primary: int = 0
    waits_ms: list[float] = field(default_factory=list)
    stale: int = 0
    misplaced: int = 0
    twin_reads: int = 0
    twin_stale: int = 0

    @property
    def by_replica(self) -> int:
        """
        Return how many reads a replica served.
        """
        return self.reads - self.by_primary

    def add(self, sample: Sample) -> None:
        """
        Count one read.
        """
        self.reads += 1
        self.by_primary += sample.node == PRIMARY
        if sample.waited_ms > 0:
            self.waits_ms.append(sample.waited_ms)
        self.stale += sample.stale
        self.misplaced += sample.node != sample.route
        self.twin_reads += sample.twin_stale is not None
        self.twin_stale += bool(sample.twin_stale)


def total(tallies: Iterable[Tally]) -> Tally:
    """
    Return the sum of all phases.
    """
    summed = Tally("all")
    for each in tallies:
        summed.reads += each.reads
        summed.by_primary += each.by_primary
        summed.waits_ms += each.waits_ms
        summed.stale += each.stale
        summed.misplaced += each.misplaced
        summed.twin_reads += each.twin_reads
        summed.twin_stale += each.twin_stale
    return summed


def objections(tallies: Iterable[Tally]) -> list[str]:
    """
    Return why the check failed; nothing if it passed.
    """
    found = total(tallies)
    reasons = []
    if found.stale:
        reasons.append(f"{found.stale} reads with a token were stale")
    if found.misplaced:
        reasons.append(f"{found.misplaced} reads were not served by the server that was named")
    if not found.by_replica:
        reasons.append("no read was served by a replica, so not being stale proves nothing")
    if not found.twin_stale:
        reasons.append("no read without a token was stale, so the scenario proves nothing")
    return reasons


def percentile(values: Sequence[float], share: float) -> float | None:
    """
    Return the value that ``share`` of the values do not exceed (nearest rank); None of none.
    """
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def make_table(tallies: Sequence[Tally]) -> Table:
    """
    Return a row for each phase and one for all of them; it fits into 80 columns.
    """
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", vertical="bottom", no_wrap=True)
    for each in tallies:
        table.add_row(each.title, *_cells(each))
    table.add_section()
    table.add_row("all", *_cells(total(tallies)), style="bold")
    return table


_COLUMNS = (
    "reads",
    "by\nreplica",
    "by\nprimary",
    "waited",
    "p50\nms",
    "p99\nms",
    "stale\nwith\ntoken",
    "stale\nwithout\ntoken",
)


def _cells(tally: Tally) -> list[str]:
    counts = (tally.reads, tally.by_replica, tally.by_primary, len(tally.waits_ms))
    shares = (percentile(tally.waits_ms, share) for share in (0.5, 0.99))
    waits = ("-" if each is None else f"{each:.1f}" for each in shares)
    return [*map(str, counts), *waits, str(tally.stale), str(tally.twin_stale)]
