"""
The summary of a run as a page of the documentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from tests.faults.kinds import describe_kinds
from tests.faults.verdict import KindSummary, Summary, failures

SHOWN: Final = 5
"""How many unanswered reads of a kind the page shows."""

_INTRODUCTION: Final = """\
# The nemesis run

Clients write and read through one `AsyncRouter` while servers crash, hang, lag, are cut off and
change places, one fault at a time. A checker judges every read against everything that its
client, and every other client, had seen and written before: read your writes, monotonic reads,
writes follow reads, monotonic writes and bounded staleness. The clients read with `CAUSAL`,
`READ_YOUR_WRITES`, `bounded` and `STRONG`, commit synchronously and with
`synchronous_commit=off`, keep their token as a cookie would, and now and then give up in the
middle of an operation.

This page was written by

```sh
$ {command}
```

The seed replays the same faults and the same choices of the clients; times differ.
"""

_EXPLANATION: Final = """\
## By kind of fault

A read counts for the last fault that had begun when it ended, so what a fault leaves behind
counts for it too. *Excused* are reads for which no server was left that could have kept their
promise while the primary was away: those of `STRONG`; of sessions that are [pinned to the
primary](guarantees.md) because the position of a write, or of an interrupted read, could not be
taken; of sessions that are ahead of every replica; and of `bounded`, which needs the primary to
tell how old a replica is. All others are owed an answer, and while a fault
hits a replica nothing is excused. *From replicas* is the share of replicas
in the answers while the fault was there.
"""

_GRANTS: Final[Mapping[str, str]] = {
    "none": "none",
    "statistics": "`pg_read_all_stats`",
    "replication": "`pg_read_all_stats`, `REPLICATION`",
}


def markdown(summary: Summary) -> str:
    """
    Return the whole page.
    """
    return "\n".join(
        [
            _INTRODUCTION.format(command=summary.command),
            *_facts(summary),
            "",
            _EXPLANATION,
            *_table(summary),
            "",
            *_verdict(summary),
            *_unanswered(summary),
            "",
            "## The kinds",
            "",
            *(f"* `{name}`: {text}" for name, text in describe_kinds().items()),
            "",
        ]
    )


def _facts(summary: Summary) -> Iterator[str]:
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
    yield "grants of the router's account", _GRANTS[summary.grants]
    yield "time", f"{summary.minutes:.1f} minutes, {faults} faults"
    yield "clients", f"{summary.clients}, {summary.sessions:,} sessions"
    yield "operations", _counted(summary)
    yield "reads judged", f"{summary.judged_reads:,}"
    yield "**violations**", f"**{len(summary.violations)}**"
    yield (
        "exceptions from replica to primary",
        f"{summary.exceptions}, {summary.exception_rate:.3%} of "
        f"{summary.from_replica_to_primary:,} reads in which [one](limits.md) could have come",
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
        f"{summary.availability:.4%} of the {summary.reads:,} that a server was left for, "
        f"{summary.answered_of_all:.2%} of all",
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


def _verdict(summary: Summary) -> Iterator[str]:
    failed = failures(summary)
    yield "Every criterion is met." if not failed else "Not met:"
    yield ""
    yield from (f"* {line}" for line in failed)


def _unanswered(summary: Summary) -> Iterator[str]:
    for kind in summary.kinds:
        if kind.examples:
            yield ""
            yield f"Not answered during {kind.name}:"
            yield ""
            yield from (f"* {_one_line(example)}" for example in kind.examples[:SHOWN])


def _one_line(text: str) -> str:
    return " ".join(text.split())
