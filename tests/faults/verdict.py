"""
What a run amounts to, and the criteria.

Pure: a `Summary` is plain numbers and texts, `failures` says which criteria it does not meet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from tests.faults.kinds import KINDS, Scope

AVAILABILITY: Final = 0.999
"""The share of reads that must be answered, in the whole run and during each kind of fault."""

FORGIVEN: Final = 1
"""Unanswered reads of one kind of fault that are no verdict: a short run has too few for a rate."""

REPLICA_SHARES: Final[Mapping[Scope, float]] = {"replica": 0.3, "failover": 0.25, "primary": 0.0}
"""The least share of replicas in the answers while a fault is there, by whom it hits."""

ENOUGH_READS: Final = 50
"""A kind of fault with fewer reads while it lasted says nothing about shares."""

ENOUGH_FAILOVERS: Final = 3
"""Of fewer, all kinds are judged together: how soon a replica serves after one is chance."""


@dataclass(frozen=True)
class KindSummary:
    """
    What the clients saw during one kind of fault, or during one pair of kinds.

    Of the reads that were not answered, ``excused`` counts by reason those for which no server was
    left that could have kept their promise; ``owed`` are the others, with some ``examples``.
    """

    name: str
    times: int
    seconds: float
    answered: int
    excused: Mapping[str, int]
    owed: int
    given_up: int
    writes: Mapping[str, int]
    median_seconds: float
    p99_seconds: float
    max_seconds: float
    replica_share: float | None
    active_reads: int
    reasons: Mapping[str, int]
    examples: Sequence[str]

    @property
    def reads(self) -> int:
        """
        Return the reads that somebody could answer.
        """
        return self.answered + self.owed

    @property
    def availability(self) -> float:
        """
        Return the share of them that were answered.
        """
        return self.answered / self.reads if self.reads else 1.0


@dataclass(frozen=True)
class Summary:
    """
    Everything that a run has found.

    ``limit_seconds`` is what the router's settings allow a read; ``lost`` counts the acknowledged
    writes that a fault may lose and has lost, ``problems`` are losses without excuse and other
    wrongs of the ledger, ``stuck`` the sessions that waited twice for a lost position.
    """

    seed: int
    command: str
    version: int
    minutes: float
    clients: int
    replicas: int
    pairs: bool
    grants: str
    sessions: int
    operations: int
    judged_reads: int
    outcomes: Mapping[str, int]
    violations: Sequence[str]
    exceptions: int
    from_replica_to_primary: int
    lost: Mapping[str, int]
    problems: Sequence[str]
    lost_positions: int
    stuck: Sequence[str]
    limit_seconds: float
    limit_text: str
    kinds: Sequence[KindSummary]
    events: Mapping[str, int]
    errors: Sequence[str]

    @property
    def reads(self) -> int:
        """
        Return the reads that somebody could answer.
        """
        return sum(kind.reads for kind in self.kinds)

    @property
    def owed(self) -> int:
        """
        Return how many of them were not answered.
        """
        return sum(kind.owed for kind in self.kinds)

    @property
    def excused(self) -> Counter[str]:
        """
        Count the reads that nobody could answer, by reason.
        """
        total: Counter[str] = Counter()
        for kind in self.kinds:
            total.update(kind.excused)
        return total

    @property
    def availability(self) -> float:
        """
        Return the share of answers among the reads that somebody could answer.
        """
        return 1 - self.owed / self.reads if self.reads else 0.0

    @property
    def answered_of_all(self) -> float:
        """
        Return the share of answers among all reads, also those that nobody could answer.
        """
        total = self.reads + self.excused.total()
        return (self.reads - self.owed) / total if total else 0.0

    @property
    def exception_rate(self) -> float:
        """
        Return the exceptions per read of the primary after one of the same key on a replica.
        """
        reads = self.from_replica_to_primary
        return self.exceptions / reads if reads else 0.0


def failures(summary: Summary, *, patience: float = 1.0) -> list[str]:
    """
    Return the criteria that a run does not meet, each in a line.

    ``patience`` stretches the limit of a read, for a machine that has much else to do.
    """
    return [*_wrong(summary), *_unavailable(summary, patience)]


def _wrong(summary: Summary) -> Iterator[str]:
    yield from (f"violation: {text}" for text in summary.violations)
    yield from summary.problems
    yield from summary.stuck
    yield from (f"the nemesis failed: {text}" for text in summary.errors)
    if not summary.judged_reads:
        yield "no read was judged"


def _unavailable(summary: Summary, patience: float) -> Iterator[str]:
    if summary.pairs or summary.grants == "none":
        # Two faults at once may leave nobody who can keep a promise; and to a plain role a standby
        # without its primary does not say which timeline it is on.
        return
    if summary.availability < AVAILABILITY:
        yield f"{summary.availability:.3%} of the reads that somebody could answer were answered"
    for kind in summary.kinds:
        if kind.owed > max(FORGIVEN, (1 - AVAILABILITY) * kind.reads):
            yield f"{kind.name}: {kind.owed} of {kind.reads} reads were not answered"
        if kind.p99_seconds > patience * summary.limit_seconds:
            yield (
                f"{kind.name}: p99 is {kind.p99_seconds:.2f} s, over the "
                f"{summary.limit_seconds:.2f} s of {summary.limit_text}"
            )
        if kind.active_reads >= ENOUGH_READS and not _is_rare_failover(kind):
            yield from _rarely_a_replica(kind.name, [kind])
    rare = [kind for kind in summary.kinds if _is_rare_failover(kind)]
    if sum(kind.active_reads for kind in rare) >= ENOUGH_READS:
        yield from _rarely_a_replica(", ".join(kind.name for kind in rare), rare)


def _rarely_a_replica(name: str, kinds: Sequence[KindSummary]) -> Iterator[str]:
    from_replicas = sum((kind.replica_share or 0.0) * kind.active_reads for kind in kinds)
    share = from_replicas / sum(kind.active_reads for kind in kinds)
    scope = _scope(kinds[0])
    if scope is not None and share < REPLICA_SHARES[scope]:
        yield f"{name}: only {share:.0%} of the answers came from replicas"


def _is_rare_failover(kind: KindSummary) -> bool:
    return _scope(kind) == "failover" and kind.times < ENOUGH_FAILOVERS


def _scope(kind: KindSummary) -> Scope | None:
    return KINDS[kind.name].scope if kind.name in KINDS else None


def as_json(summary: Summary) -> dict[str, Any]:
    """
    Return the summary as JSON can hold it, with what follows from it.
    """
    return {
        **asdict(summary),
        "availability": summary.availability,
        "answered_of_all": summary.answered_of_all,
        "exception_rate": summary.exception_rate,
        "failures": failures(summary),
    }
