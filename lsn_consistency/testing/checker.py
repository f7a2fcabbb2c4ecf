"""
Judge what clients saw: session guarantees as pure functions of a recorded history.

A history is a list of `Operation`. The keys are sets that only grow: a write adds values to keys,
and each value is added once; a read returns everything that is in the keys it asked for, in one
snapshot. So every read tells exactly which writes it saw, and nothing has to be guessed (the idea
of list-append in Elle, Kingsbury and Alvaro, 2020).

::

    report = check(history)
    assert report.ok, str(report)

The session guarantees are those of Terry et al., *Session Guarantees for Weakly Consistent
Replicated Data* (1994). Throughout:

* A session is one ``client``. Of its operations one *precedes* another if it ended before the
  other began, strictly; operations that overlap are in no order, so a simulated clock must move
  between two operations of a client. Times of different clients are compared only for bounded
  staleness and for the exception in `check`.
* Only reads with the outcome "ok" are judged, and only they count as having seen something.
* Only writes with the outcome "ok", acknowledged ones, must be seen. An "unknown" one may take
  effect at any later time or never. Once somebody has seen it, the rules for what was seen hold,
  and it comes after what its client had seen and written when it began. The same goes for values
  that no write of the history added.
* A rule relates operations that all carry it in ``promised``.
* ``lost`` values, those that a failover has lost, need not be seen by anybody.

This module knows nothing of clocks, servers or files. The time taken is about linear in the
number of operations and keys that they name: 100 000 of them take a few seconds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Set
from itertools import chain
from typing import NamedTuple

from lsn_consistency.testing._history import (
    History,
    Knowledge,
    Masks,
    Required,
    add,
    each_once,
    follow,
)
from lsn_consistency.testing._operations import (
    CAUSAL,
    Guarantee,
    Kind,
    Operation,
    Report,
    Violation,
)

__all__ = [
    "CAUSAL",
    "Guarantee",
    "Operation",
    "Report",
    "Violation",
    "bounded_staleness",
    "check",
    "monotonic_reads",
    "monotonic_writes",
    "read_your_writes",
    "writes_follow_reads",
]


def read_your_writes(
    history: Iterable[Operation], *, lost: Set[Hashable] = frozenset()
) -> list[Violation]:
    """
    Find reads that do not show what their own client had written before.

    A read must show every value of every acknowledged write of its client that precedes it, in
    the keys that it asked for.
    """
    return _violations(_same_client(History(history, lost), "read_your_writes", "write"))


def monotonic_reads(
    history: Iterable[Operation], *, lost: Set[Hashable] = frozenset()
) -> list[Violation]:
    """
    Find reads that do not show what their own client had seen before.

    A read must show every value that a read of its client that precedes it showed, in the keys
    that it asked for. The exception of `check` is left out.
    """
    return _violations(_same_client(History(history, lost), "monotonic_reads", "read"))


def writes_follow_reads(
    history: Iterable[Operation], *, lost: Set[Hashable] = frozenset()
) -> list[Violation]:
    """
    Find reads, of any client, that show a write without what its writer had seen before it.

    A read that shows any value of a write must show every value that a read of the writer that
    precedes the write showed, in the keys that it asked for. The exception of `check` is left out.
    """
    return _violations(_any_client(History(history, lost), "writes_follow_reads", "read"))


def monotonic_writes(
    history: Iterable[Operation], *, lost: Set[Hashable] = frozenset()
) -> list[Violation]:
    """
    Find reads, of any client, that show a write without what its writer had written before it.

    A read that shows any value of a write must show every value of every acknowledged write of
    the same client that precedes the write, in the keys that it asked for.
    """
    return _violations(_any_client(History(history, lost), "monotonic_writes", "write"))


def bounded_staleness(
    history: Iterable[Operation], *, lost: Set[Hashable] = frozenset()
) -> list[Violation]:
    """
    Find reads that are staler than the bound that was promised to them.

    A read with ``staleness_seconds`` must show every value whose write, of any client, was
    acknowledged more than that long before the read began, in the keys that it asked for.
    """
    return _violations(_not_too_old(History(history, lost)))


def check(history: Iterable[Operation], *, lost: Set[Hashable] = frozenset()) -> Report:
    """
    Judge a history by all five rules.

    One thing is counted apart, in `Report.exceptions`: a commit can be visible on a replica while
    the primary is still completing it (`RecordTransactionCommit` in xact.c writes the record
    before the transaction leaves the list of running ones). That can make a read break monotonic
    reads, or writes follow reads. It is this and no violation only if all of these hold:

    * the primary answered the read, by the server's own word;
    * the missing value belongs to a write of the history that did not fail;
    * when the read began (or, for writes follow reads, the write that it shows, if that was
      later), the missing write had not been acknowledged, and no read of any client that had
      ended by then had shown it on a server other than a replica.

    Raises `ValueError` for a history that cannot be: a value written twice to one key, or an
    operation that ended before it began.
    """
    judged = History(history, lost)
    findings = [
        *_same_client(judged, "read_your_writes", "write"),
        *_same_client(judged, "monotonic_reads", "read"),
        *_any_client(judged, "writes_follow_reads", "read"),
        *_any_client(judged, "monotonic_writes", "write"),
        *_not_too_old(judged),
    ]
    return Report(
        operations=len(judged.operations),
        reads=len(judged.reads),
        violations=tuple(found.violation for found in findings if not found.is_exception),
        exceptions=tuple(found.violation for found in findings if found.is_exception),
        replica_to_primary=_replica_to_primary(judged),
    )


class _Found(NamedTuple):
    """Hold a violation, or what would be one if it were not the exception."""

    violation: Violation
    is_exception: bool = False


def _violations(findings: Iterable[_Found]) -> list[Violation]:
    return [found.violation for found in findings if not found.is_exception]


def _same_client(history: History, rule: Guarantee, learned: Kind) -> Iterator[_Found]:
    """
    Find reads without what their own client knew.
    """
    for read, knowledge in follow(history, rule, learned, "read"):
        missing = history.missing(read, knowledge.masks)
        if missing:
            excused = _excused(history, read, missing, read.began)
            parts = ((_without(missing, excused), False), (excused, True))
            for masks, is_exception in parts:
                if masks:
                    because = knowledge.sources(masks)
                    violation = _violation(history, rule, read, masks, because)
                    yield _Found(violation, is_exception)


def _any_client(history: History, rule: Guarantee, learned: Kind) -> Iterator[_Found]:
    """
    Find reads that show a write without what its client knew.
    """
    before: dict[int, Masks] = {}
    known_by: dict[str, Knowledge] = {}
    for write, knowledge in follow(history, rule, learned, "write"):
        before[id(write)] = dict(knowledge.masks)
        known_by[write.client] = knowledge
    required = Required(history, before)
    for read in history.reads:
        if rule in read.promised:
            shown = {key: history.mask(key, values) for key, values in read.values.items()}
            if any(history.missing(read, required.by(key, mask)) for key, mask in shown.items()):
                yield from _explain(history, rule, read, shown, before, known_by)


def _explain(
    history: History,
    rule: Guarantee,
    read: Operation,
    shown: Masks,
    before: dict[int, Masks],
    known_by: dict[str, Knowledge],
) -> Iterator[_Found]:
    """
    Name the writes that oblige a read to show what it does not.

    The latest comes first: it leaves the least room for the exception.
    """
    explained: Masks = {}
    because: dict[bool, list[Operation]] = {False: [], True: []}
    found: dict[bool, Masks] = {False: {}, True: {}}
    writes = chain.from_iterable(history.writers(key, mask) for key, mask in shown.items())
    for write in sorted(writes, key=lambda write: write.began, reverse=True):
        missing = _without(history.missing(read, before.get(id(write), {})), explained)
        excused = _excused(history, read, missing, max(read.began, write.began))
        for is_exception, masks in ((False, _without(missing, excused)), (True, excused)):
            if masks:
                because[is_exception] += [*known_by[write.client].sources(masks), write]
                add(found[is_exception], masks)
                add(explained, masks)
    for is_exception, masks in found.items():
        if masks:
            violation = _violation(history, rule, read, masks, because[is_exception])
            yield _Found(violation, is_exception)


def _not_too_old(history: History) -> Iterator[_Found]:
    """
    Find reads that are staler than promised.
    """
    for read in history.reads:
        if read.staleness_seconds is None:
            continue
        limit = read.began - read.staleness_seconds
        expected = {key: history.acknowledged(key, limit) for key in read.values}
        missing = history.missing(read, expected)
        if missing:
            writes = [
                write for key, mask in missing.items() for write in history.writers(key, mask)
            ]
            yield _Found(_violation(history, "bounded_staleness", read, missing, writes))


def _excused(history: History, read: Operation, missing: Masks, time: float) -> Masks:
    """
    Return what of it is missing by the exception from a replica to the primary.
    """
    if read.role != "primary":
        return {}
    excused = {key: history.incomplete(key, mask, time) for key, mask in missing.items()}
    return {key: mask for key, mask in excused.items() if mask}


def _without(masks: Masks, others: Masks) -> Masks:
    """
    Return what of some values is not among others.
    """
    rest = {key: mask & ~others.get(key, 0) for key, mask in masks.items()}
    return {key: mask for key, mask in rest.items() if mask}


def _violation(
    history: History, rule: Guarantee, read: Operation, missing: Masks, because: list[Operation]
) -> Violation:
    values = {key: history.values(key, mask) for key, mask in missing.items()}
    return Violation(rule, read, values, tuple(each_once(because)))


def _replica_to_primary(history: History) -> int:
    """
    Count the reads of the primary after one of the same client and key on a replica.
    """
    count = 0
    for session in history.sessions("monotonic_reads"):
        keys: set[Hashable] = set()
        for read in sorted(session, key=lambda operation: operation.began):
            if read.kind == "read" and read.role == "replica":
                keys.update(read.values)
            elif read.kind == "read" and read.role == "primary":
                count += not keys.isdisjoint(read.values)
    return count
