"""
What a history is made of, and what the checker says about it; values only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["CAUSAL", "Guarantee", "Kind", "Operation", "Report", "Violation"]

Guarantee: TypeAlias = Literal[
    "read_your_writes",
    "monotonic_reads",
    "writes_follow_reads",
    "monotonic_writes",
    "bounded_staleness",
]
Kind: TypeAlias = Literal["write", "read"]

CAUSAL: frozenset[Guarantee] = frozenset(
    {"read_your_writes", "monotonic_reads", "writes_follow_reads", "monotonic_writes"}
)
"""The four guarantees of a session; `bounded_staleness` is promised by its bound."""

SHOWN_VIOLATIONS = 5
SHOWN_VALUES = 5


@dataclass(frozen=True, slots=True)
class Operation:
    """
    Record one thing that one client did, as that client saw it.

    ``values`` of a write are those that it adds to each key, of a read all that it saw in each
    key that it asked for, an empty set where there was nothing. ``began`` and ``ended`` are
    seconds of one monotonic clock. ``node`` and ``role`` are the server's own word, ``promised``
    are the guarantees that the operation was made under, ``staleness_seconds`` is the bound that
    was promised to a read.
    """

    client: str
    kind: Kind
    began: float
    ended: float
    # Any hashable type of key and value; Hashable itself would refuse a dict[str, ...].
    values: Mapping[Any, frozenset[Any]]
    outcome: Literal["ok", "failed", "unknown"] = "ok"
    node: str | None = None
    role: Literal["primary", "replica"] | None = None
    token_in: str | None = None
    token_out: str | None = None
    staleness_seconds: float | None = None
    promised: frozenset[Guarantee] = CAUSAL
    reason: str | None = None

    def __str__(self) -> str:
        where = "".join(f" {part}" for part in (self.role, self.node, self.reason) if part)
        outcome = "" if self.outcome == "ok" else f" ({self.outcome})"
        return f"{self.kind} of {self.client} [{self.began:.6f}, {self.ended:.6f}]{where}{outcome}"


@dataclass(frozen=True, slots=True)
class Violation:
    """
    Say which rule a read broke: what it should have shown, and because of which operations.

    ``because`` are the operations that oblige the read: for read your writes the writes, for
    monotonic reads the earlier reads, for the two orders of writes those and then the write that
    the read does show, for bounded staleness the writes that were acknowledged long before.
    """

    rule: Guarantee
    read: Operation
    missing: Mapping[Hashable, frozenset[Hashable]]
    because: tuple[Operation, ...]

    @property
    def client(self) -> str:
        """
        Return the client that made the read.
        """
        return self.read.client

    def __str__(self) -> str:
        lacks = "; ".join(f"{_some(values)} of {key}" for key, values in self.missing.items())
        first = f"{self.rule.replace('_', ' ')}: {self.read} does not show {lacks}"
        return "\n    after ".join([first, *map(str, self.because)])


@dataclass(frozen=True, slots=True)
class Report:
    """
    Hold what `check` found, at most one violation of each rule for each read.

    ``exceptions`` are the documented ones from a replica to the primary, which are no violations;
    ``replica_to_primary`` is the number of reads in which one could have come: reads on the
    primary of a client that had read one of their keys on a replica before.
    """

    operations: int
    reads: int
    violations: tuple[Violation, ...]
    exceptions: tuple[Violation, ...]
    replica_to_primary: int

    @property
    def ok(self) -> bool:
        """
        Return whether nothing was violated.
        """
        return not self.violations

    @property
    def exception_rate(self) -> float:
        """
        Return the share of reads with an exception among those in which one could have come.
        """
        reads = {id(exception.read) for exception in self.exceptions}
        return len(reads) / self.replica_to_primary if self.replica_to_primary else 0.0

    def count(self, rule: Guarantee) -> int:
        """
        Return how many reads violated one rule.
        """
        return Counter(violation.rule for violation in self.violations)[rule]

    def __str__(self) -> str:
        rules = Counter(violation.rule for violation in self.violations)
        counts = ", ".join(f"{count} of {rule.replace('_', ' ')}" for rule, count in rules.items())
        first = (
            f"{self.operations} operations, {self.reads} reads judged, "
            f"{len(self.violations)} violations{f' ({counts})' if counts else ''}, "
            f"{len(self.exceptions)} exceptions from a replica to the primary "
            f"({self.exception_rate:.3%} of {self.replica_to_primary} such reads)"
        )
        return "\n  ".join([first, *map(str, self.violations[:SHOWN_VIOLATIONS])])


def _some(values: frozenset[Hashable]) -> str:
    """Name a few of some values."""
    names = sorted(map(str, values))
    more = f" and {len(names) - SHOWN_VALUES} more" if len(names) > SHOWN_VALUES else ""
    return "{" + ", ".join(names[:SHOWN_VALUES]) + "}" + more
