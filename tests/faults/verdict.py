"""
What a run amounts to: the criteria, and the summary as text, JSON and Markdown.

Pure: a `Summary` is plain numbers and texts, `failures` says which criteria it does not meet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from tests.faults.kinds import KINDS

AVAILABILITY: Final = 0.999
"""The share of reads that must be answered, in the whole run and during each kind of fault."""

FORGIVEN: Final = 1
"""Unanswered reads of one kind of fault that are no verdict: a short run has too few for a rate."""

REPLICA_SHARE: Final = 0.5
"""The least share of replicas in the answers while a fault touches one replica of three."""

SHOWN: Final = 5
"""How many unanswered reads of a kind the page shows."""

ENOUGH_READS: Final = 50
"""A kind of fault with fewer reads while it lasted says nothing about shares."""


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
        touches_replica = kind.name in KINDS and KINDS[kind.name].scope == "replica"
        share = kind.replica_share
        if touches_replica and kind.active_reads >= ENOUGH_READS and (share or 0) < REPLICA_SHARE:
            yield f"{kind.name}: only {share or 0:.0%} of the answers came from replicas"


def as_json(summary: Summary) -> dict[str, Any]:
    """
    Return the summary as JSON can hold it, with what follows from it.
    """
    return {
        **asdict(summary),
        "availability": summary.availability,
        "exception_rate": summary.exception_rate,
        "failures": failures(summary),
    }


def markdown(summary: Summary) -> str:
    """
    Return the summary as a section of a page.
    """
    return "\n".join([*_facts(summary), "", *_table(summary), "", *_notes(summary), ""])


def _facts(summary: Summary) -> Iterator[str]:
    yield f"`{summary.command}`"
    yield ""
    yield "| | |"
    yield "|---|---|"
    for name, value in _rows(summary):
        yield f"| {name} | {value} |"


def _rows(summary: Summary) -> Iterator[tuple[str, str]]:
    lost = summary.lost
    faults = sum(kind.times for kind in summary.kinds)
    yield "seed", str(summary.seed)
    yield "PostgreSQL", str(summary.version)
    yield "cluster", f"a primary and {summary.replicas} replicas"
    yield "time", f"{summary.minutes:.1f} minutes, {faults} faults"
    yield "clients", f"{summary.clients}, {summary.sessions:,} sessions"
    yield "operations", _counted(summary)
    yield "reads judged", f"{summary.judged_reads:,}"
    yield "**violations**", f"**{len(summary.violations)}**"
    yield (
        "exceptions from replica to primary",
        f"{summary.exceptions}, {summary.exception_rate:.3%} of "
        f"{summary.from_replica_to_primary:,} reads in which one could have come",
    )
    yield (
        "acknowledged writes lost",
        f"{lost.get('acknowledged', 0)} in failovers, {lost.get('asynchronous', 0)} asynchronous "
        f"ones in crashes, {len(summary.problems)} without excuse",
    )
    yield (
        "reads that asked for a lost position",
        f"{summary.lost_positions}; sessions that did so twice: {len(summary.stuck)}",
    )
    yield (
        "reads answered",
        f"{summary.availability:.4%} of the {summary.reads:,} that a server was left for",
    )
    yield "reads that no server was left for", _listed(summary.excused) or "0"
    yield "limit of a read", f"{summary.limit_seconds:g} s: {summary.limit_text}"


def _counted(summary: Summary) -> str:
    return f"{summary.operations:,}; values written: {_listed(summary.outcomes)}"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))


_HEADERS: Final = (
    "fault",
    "times",
    "seconds",
    "reads",
    "answered",
    "unanswered",
    "excused",
    "median",
    "p99",
    "longest",
    "from replicas",
)


def _table(summary: Summary) -> Iterator[str]:
    yield f"| {' | '.join(_HEADERS)} |"
    yield "|---" + "|---:" * (len(_HEADERS) - 1) + "|"
    for kind in summary.kinds:
        yield f"| {' | '.join(_cells(kind))} |"


def _cells(kind: KindSummary) -> Iterator[str]:
    yield kind.name
    yield str(kind.times)
    yield f"{kind.seconds:.0f}"
    yield f"{kind.reads:,}"
    yield f"{kind.availability:.3%}"
    yield str(kind.owed)
    yield str(sum(kind.excused.values()))
    for seconds in (kind.median_seconds, kind.p99_seconds, kind.max_seconds):
        yield f"{seconds * 1000:.0f} ms"
    yield "" if kind.replica_share is None else f"{kind.replica_share:.0%}"


def _notes(summary: Summary) -> Iterator[str]:
    failed = failures(summary)
    yield "Every criterion is met." if not failed else "Not met:"
    yield from (f"* {line}" for line in failed)
    for kind in summary.kinds:
        if kind.examples:
            yield ""
            yield f"Not answered during {kind.name}:"
            yield ""
            yield from (f"* {_one_line(example)}" for example in kind.examples[:SHOWN])


def _one_line(text: str) -> str:
    return " ".join(text.split())
