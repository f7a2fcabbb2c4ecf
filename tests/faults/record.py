"""
What a run leaves behind: counts by kind of fault, the ledger, and windows to be judged.

A record takes every sample once, as it comes. What is counted is counted at once; operations are
kept for as long as their generation of keys may still be read, then judged, then forgotten.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Final, NamedTuple

from lsn_consistency import Lsn
from lsn_consistency.testing.checker import Operation, Violation, check
from tests.faults.attempts import Sample
from tests.faults.clients import KEYS
from tests.faults.ledger import Ledger
from tests.faults.nemesis import Episode, Phase
from tests.faults.tally import Tally

CALM: Final = "none"
"""The name of the time in which there is no fault yet."""

_VAIN: Final = frozenset({"not_caught_up", "timeline_changed"})


class Vain(NamedTuple):
    """
    A read that a session made at a position which no replica had.
    """

    client: str
    node: str | None
    began: float
    ended: float
    timeline: int
    lsn: Lsn


class Finding(NamedTuple):
    """
    What a worker found in one window; ``reads`` are those that it judged.
    """

    generation: int
    reads: int
    violations: tuple[Violation, ...]
    exceptions: tuple[Violation, ...]


def judge(
    generation: int,
    earlier: Iterable[Operation],
    later: Iterable[Operation],
    lost: Set[int],
) -> Finding:
    """
    Judge the reads of one generation by all that was done in it and in the one before.

    The reads of the earlier generation are judged with that one; here they say what was seen.
    """
    first = (generation - 1) * KEYS
    keys = range(first, first + 2 * KEYS)
    before = [_projected(operation, keys) for operation in earlier]
    own = [_projected(operation, keys) for operation in later]
    report = check([*before, *own], lost=lost)
    judged = {id(operation) for operation in own}
    return Finding(
        generation,
        sum(operation.kind == "read" and operation.outcome == "ok" for operation in own),
        tuple(found for found in report.violations if id(found.read) in judged),
        tuple(found for found in report.exceptions if id(found.read) in judged),
    )


def _projected(operation: Operation, keys: range) -> Operation:
    if all(key in keys for key in operation.values):
        return operation
    values = {key: values for key, values in operation.values.items() if key in keys}
    return replace(operation, values=values)


class Record:
    """
    Take the samples of a run, and have its history judged in a process beside it.

    `note` is called on the event loop, `on_phase` in the thread of the nemesis.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.tallies: dict[str, Tally] = defaultdict(Tally)
        self.findings: list[Finding] = []
        self.windows: dict[int, list[Operation]] = defaultdict(list)
        self.suspect: dict[int, list[Operation]] = {}
        self.vain: list[Vain] = []
        self.operations = 0
        self.from_replica_to_primary = 0
        self.episodes: list[Episode] = []
        self.episode: Episode | None = None
        self.phase: Phase | None = None
        self._judged = -1
        self._futures: dict[int, Future[Finding]] = {}
        # A process of its own, so that judging takes nothing from the loop that the clients use.
        self._judges = ProcessPoolExecutor(1, get_context("spawn"), os.nice, (10,))

    def close(self) -> None:
        """
        End the judging process.
        """
        self._judges.shutdown(cancel_futures=True)

    # What happens

    def enter(self, episode: Episode, phase: Phase) -> None:
        """
        Count what comes from now on as of this phase of an episode.
        """
        self.episode, self.phase = episode, phase
        if phase == "breaks":
            self.episodes.append(episode)
        if phase == "healed":
            tally = self.tallies[episode.name]
            tally.times += 1
            tally.seconds += episode.seconds

    def note(self, sample: Sample) -> None:
        """
        Take one operation.
        """
        operation = sample.operation
        self.operations += 1
        self.windows[sample.generation].append(operation)
        name = self.episode.name if self.episode else CALM
        active = self.episode is None or self.phase == "broken"
        self.tallies[name].add(sample, self.episode, active=active)
        self.from_replica_to_primary += sample.from_replica
        if operation.kind == "write":
            self.ledger.write(operation, asynchronous=sample.asynchronous)
            return
        self.ledger.read(operation)
        position = sample.position
        if operation.reason in _VAIN and position is not None:
            began, ended = operation.began, operation.ended
            client, timeline, lsn = operation.client, position.timeline, position.lsn
            self.vain.append(Vain(client, operation.node, began, ended, timeline, lsn))

    @property
    def losing(self) -> bool:
        """
        Tell whether something may be lost at the moment, so that nothing can be judged.
        """
        return (
            self.episode is not None and self.episode.loses != "nothing" and self.phase != "healed"
        )

    # What it means

    def judge_before(self, generation: int) -> None:
        """
        Hand over every generation before this one that was not yet; forget what is not needed.
        """
        lost = frozenset(self.ledger.lost)
        for number in range(self._judged + 1, generation):
            earlier, later = self.windows[number - 1], self.windows[number]
            self._futures[number] = self._judges.submit(judge, number, earlier, later, lost)
            self._judged = number
        self.collect()

    def collect(self, timeout: float | None = None) -> None:
        """
        Take the findings that are there; with a time-out wait that long for each.
        """
        for number, future in list(self._futures.items()):
            if timeout is None and not future.done():
                return
            finding = future.result(timeout)
            del self._futures[number]
            self.findings.append(finding)
            if finding.violations:
                self.suspect[number - 1] = self.windows[number - 1]
                self.suspect[number] = self.windows[number]
            # The next window needs the later of the two generations.
            self.windows.pop(number - 1, None)

    @property
    def violations(self) -> Iterator[Violation]:
        """
        Yield every violation that was found.
        """
        for finding in self.findings:
            yield from finding.violations

    def exceptions(self) -> int:
        """
        Return in how many reads a value was missing on the primary that a replica had shown.
        """
        return sum(
            len({id(found.read) for found in finding.exceptions}) for finding in self.findings
        )

    def stuck(self, switch_points: Mapping[int, Lsn]) -> list[str]:
        """
        Return the sessions that asked again for a position which a failover had lost.

        ``switch_points`` are where the earlier timelines ended. Reads that overlap are one asking.
        """
        told: dict[tuple[str, int, Lsn], float] = {}
        again: Counter[tuple[str, int, Lsn]] = Counter()
        for vain in self.lost_positions(switch_points):
            asked = vain.client, vain.timeline, vain.lsn
            if vain.began > told.setdefault(asked, vain.ended):
                again[asked] += 1
        return [
            f"session {client} asked {times + 1} times for {lsn} of the lost timeline {timeline}"
            for (client, timeline, lsn), times in again.items()
        ]

    def lost_positions(self, switch_points: Mapping[int, Lsn]) -> list[Vain]:
        """
        Return the reads that asked for a position that a failover had lost, as they began.

        What the old primary still answered itself was not lost yet.
        """
        deposed = [episode.deposed for episode in self.episodes if episode.deposed]
        found = [
            vain
            for vain in self.vain
            if vain.timeline in switch_points
            and vain.lsn > switch_points[vain.timeline]
            and vain.node != deposed[vain.timeline - 1]
        ]
        return sorted(found, key=lambda vain: vain.began)
