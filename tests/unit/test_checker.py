"""
The checker finds what is planted, and nothing else.

Every rule has a history that breaks it, and near misses that do not: overlapping operations,
writes whose outcome is unknown, lost values, operations that promised less. Histories are short
and all in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Set
from typing import Any

import pytest

from lsn_consistency.testing import (
    Operation,
    Violation,
    bounded_staleness,
    check,
    monotonic_reads,
    monotonic_writes,
    read_your_writes,
    writes_follow_reads,
)
from lsn_consistency.testing.checker import CAUSAL, Guarantee

Rule = Callable[..., list[Violation]]
RULES: dict[Guarantee, Rule] = {
    "read_your_writes": read_your_writes,
    "monotonic_reads": monotonic_reads,
    "writes_follow_reads": writes_follow_reads,
    "monotonic_writes": monotonic_writes,
    "bounded_staleness": bounded_staleness,
}


def write(client: str, began: float, ended: float, values: str, **more: Any) -> Operation:
    """Make a write; ``values`` is like ``"x1 y2"``: 1 is added to x, and 2 to y."""
    return Operation(client, "write", began, ended, _values(values), **more)


def read(client: str, began: float, ended: float, values: str, **more: Any) -> Operation:
    """Make a read; ``values`` is like ``"x12 y"``: 1 and 2 were seen in x, and nothing in y."""
    return Operation(client, "read", began, ended, _values(values), **more)


def _values(text: str) -> dict[Hashable, frozenset[Hashable]]:
    return {part[0]: frozenset(part[1:]) for part in text.split()}


def broken(history: Iterable[Operation], lost: Set[Hashable] = frozenset()) -> list[Guarantee]:
    """Return the rules that are broken, once for each violation; all functions must agree."""
    kept = list(history)
    report = check(kept, lost=lost)
    alone = [violation for rule in RULES.values() for violation in rule(kept, lost=lost)]
    assert list(report.violations) == alone
    assert report.ok is (alone == [])
    return [violation.rule for violation in alone]


# Read your writes


def test_a_read_without_an_own_write_breaks_read_your_writes() -> None:
    """What a client wrote before a read must be in it; the violation names the write."""
    own = write("a", 1, 2, "x1")
    stale = read("a", 3, 4, "x y")
    (violation,) = read_your_writes([own, stale])
    assert (own,) == violation.because
    assert stale is violation.read
    assert "a" == violation.client
    assert {"x": frozenset("1")} == violation.missing
    assert ["read_your_writes"] == broken([own, stale])


def test_each_key_and_each_write_of_a_transaction_counts() -> None:
    """A write to several keys is missed in the one that lacks it, and in that one only."""
    history = [write("a", 1, 2, "x1 y2"), write("a", 3, 4, "y3"), read("a", 5, 6, "x1 y")]
    (violation,) = read_your_writes(history)
    assert {"y": frozenset("23")} == violation.missing
    assert 2 == len(violation.because)


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([write("a", 1, 3, "x1"), read("a", 2, 4, "x")], id="overlapping"),
        pytest.param([write("a", 1, 3, "x1"), read("a", 3, 4, "x")], id="touching"),
        pytest.param([read("a", 1, 2, "x"), write("a", 3, 4, "x1")], id="before"),
        pytest.param([write("b", 1, 2, "x1"), read("a", 3, 4, "x")], id="another client"),
        pytest.param([write("a", 1, 2, "x1"), read("a", 3, 4, "y")], id="another key"),
        pytest.param([write("a", 1, 2, "x1", outcome="unknown"), read("a", 3, 4, "x")], id="?"),
        pytest.param([write("a", 1, 2, "x1", outcome="failed"), read("a", 3, 4, "x")], id="failed"),
        pytest.param(
            [write("a", 1, 2, "x1"), read("a", 3, 4, "x", outcome="failed")], id="failed read"
        ),
        pytest.param(
            [write("a", 1, 2, "x1"), read("a", 3, 4, "x", outcome="unknown")], id="unanswered read"
        ),
        pytest.param(
            [write("a", 1, 2, "x1"), read("a", 3, 4, "x", promised=frozenset())], id="unpromised"
        ),
        pytest.param(
            [write("a", 1, 2, "x1", promised=frozenset()), read("a", 3, 4, "x")],
            id="unpromised write",
        ),
    ],
)
def test_what_does_not_break_read_your_writes(history: list[Operation]) -> None:
    """Only an acknowledged write of the same client that ended before the read began must show."""
    assert [] == broken(history)


def test_the_order_in_the_list_means_nothing() -> None:
    """Times tell what came first, not the place in the recording."""
    assert ["read_your_writes"] == broken([read("a", 3, 4, "x"), write("a", 1, 2, "x1")])


def test_a_primary_read_without_an_own_write_is_no_exception() -> None:
    """An acknowledged write is visible on the primary: that it is missing there is no exception."""
    history = [write("a", 1, 2, "x1"), read("a", 3, 4, "x", role="primary")]
    assert ["read_your_writes"] == broken(history)
    assert () == check(history).exceptions


# Monotonic reads


def test_a_read_without_what_was_read_before_breaks_monotonic_reads() -> None:
    """What a client has seen stays seen; the violation names the read that showed it first."""
    first = read("a", 3, 4, "x1")
    history = [write("b", 1, 2, "x1"), first, read("a", 5, 6, "x1"), read("a", 7, 8, "x")]
    (violation,) = monotonic_reads(history)
    assert (first,) == violation.because
    assert history[3] is violation.read
    assert ["monotonic_reads"] == broken(history)


def test_a_value_that_is_missing_twice_is_reported_twice() -> None:
    """Each read is judged by itself, and one that shows the value again does not help the other."""
    reads = [read("a", 3, 4, "x1"), read("a", 5, 6, "x"), read("a", 7, 8, "x1")]
    history = [write("b", 1, 2, "x1"), *reads, read("a", 9, 10, "x")]
    assert 2 == len(monotonic_reads(history))
    assert 2 == check(history).count("monotonic_reads")
    assert 0 == check(history).count("read_your_writes")


@pytest.mark.parametrize("outcome", ["ok", "unknown"])
def test_an_unknown_write_that_was_seen_stays_seen(outcome: Any) -> None:
    """Nobody must see a write whose outcome is unknown, but who did goes on seeing it."""
    history = [write("b", 1, 2, "x1", outcome=outcome)]
    history += [read("a", 3, 4, "x1"), read("a", 5, 6, "x")]
    assert ["monotonic_reads"] == broken(history)


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([read("a", 3, 5, "x1"), read("a", 4, 6, "x")], id="overlapping"),
        pytest.param([read("a", 3, 5, "x1"), read("a", 5, 6, "x")], id="touching"),
        pytest.param([read("b", 3, 4, "x1"), read("a", 5, 6, "x")], id="another client"),
        pytest.param([read("a", 3, 4, "x1"), read("a", 5, 6, "y")], id="another key"),
        pytest.param([read("a", 3, 4, "x"), read("a", 5, 6, "x1")], id="growing"),
        pytest.param(
            [read("a", 3, 4, "x1", outcome="failed"), read("a", 5, 6, "x")], id="failed before"
        ),
        pytest.param(
            [read("a", 3, 4, "x1"), read("a", 5, 6, "x", promised=frozenset())], id="unpromised"
        ),
        pytest.param(
            [read("a", 3, 4, "x1", promised=frozenset({"read_your_writes"})), read("a", 5, 6, "x")],
            id="unpromised before",
        ),
    ],
)
def test_what_does_not_break_monotonic_reads(history: list[Operation]) -> None:
    """Only promised reads of the same client and key that ended before count."""
    assert [] == broken([write("w", 1, 2, "x1"), *history])


# Writes follow reads


def test_a_write_that_is_seen_without_what_its_writer_had_read() -> None:
    """Who sees an answer sees the question: any client, in one snapshot."""
    question, seen = write("a", 1, 2, "x1"), read("b", 3, 4, "x1")
    answer, stale = write("b", 5, 6, "y2"), read("c", 7, 8, "x y2")
    (violation,) = writes_follow_reads([question, seen, answer, stale])
    assert (seen, answer) == violation.because
    assert {"x": frozenset("1")} == violation.missing
    assert ["writes_follow_reads"] == broken([question, seen, answer, stale])


def test_the_reader_may_be_the_writer() -> None:
    """The rule is about what is shown together, whoever looks."""
    history = [write("a", 1, 2, "x1"), read("b", 3, 4, "x1"), write("b", 5, 6, "y2")]
    assert ["monotonic_reads", "writes_follow_reads"] == broken([*history, read("b", 7, 8, "x y2")])


@pytest.mark.parametrize("outcome", ["ok", "unknown"])
def test_an_unknown_answer_that_is_seen_follows_what_was_read(outcome: Any) -> None:
    """A write whose outcome is unknown has happened once somebody sees it, and in order."""
    history = [write("a", 1, 2, "x1", outcome=outcome), read("b", 3, 4, "x1")]
    history += [write("b", 5, 6, "y2", outcome=outcome), read("c", 7, 8, "x y2")]
    assert ["writes_follow_reads"] == broken(history)


@pytest.mark.parametrize(
    "history",
    [
        pytest.param(
            [read("b", 3, 6, "x1"), write("b", 5, 7, "y2"), read("c", 8, 9, "x y2")],
            id="overlapping",
        ),
        pytest.param(
            [read("b", 3, 4, "x1"), write("b", 5, 6, "y2"), read("c", 7, 8, "x y")],
            id="answer not seen",
        ),
        pytest.param(
            [read("b", 3, 4, "x1"), write("b", 5, 6, "y2"), read("c", 7, 8, "y2")],
            id="question not asked for",
        ),
        pytest.param(
            [
                read("b", 3, 4, "x1"),
                write("b", 5, 6, "y2"),
                read("c", 7, 8, "x"),
                read("c", 9, 10, "y2"),
            ],
            id="two snapshots",
        ),
        pytest.param(
            [read("d", 3, 4, "x1"), write("b", 5, 6, "y2"), read("c", 7, 8, "x y2")],
            id="another client's read",
        ),
        pytest.param(
            [write("b", 3, 4, "y2"), read("b", 5, 6, "x1"), read("c", 7, 8, "x y2")],
            id="read after the write",
        ),
        pytest.param(
            [
                read("b", 3, 4, "x1"),
                write("b", 5, 6, "y2"),
                read("c", 7, 8, "x y2", promised=frozenset()),
            ],
            id="unpromised",
        ),
        pytest.param(
            [
                read("b", 3, 4, "x1"),
                write("b", 5, 6, "y2", promised=frozenset()),
                read("c", 7, 8, "x y2"),
            ],
            id="unpromised write",
        ),
        pytest.param(
            [
                read("b", 3, 4, "x1", promised=frozenset({"read_your_writes"})),
                write("b", 5, 6, "y2"),
                read("c", 7, 8, "x y2"),
            ],
            id="unpromised read before",
        ),
    ],
)
def test_what_does_not_break_writes_follow_reads(history: list[Operation]) -> None:
    """Both keys in one snapshot, the read before the write, and all three promised."""
    assert [] == broken([write("a", 1, 2, "x1"), *history])


# Monotonic writes


def test_a_write_that_is_seen_without_an_earlier_one_of_its_writer() -> None:
    """Writes of one client appear in their order, to any client."""
    first, second, stale = write("a", 1, 2, "x1"), write("a", 3, 4, "y2"), read("b", 5, 6, "x y2")
    (violation,) = monotonic_writes([first, second, stale])
    assert (first, second) == violation.because
    assert {"x": frozenset("1")} == violation.missing
    assert ["monotonic_writes"] == broken([first, second, stale])


def test_an_order_within_one_key_counts() -> None:
    """Nothing says that the two writes are to different keys."""
    history = [write("a", 1, 2, "x1"), write("a", 3, 4, "x2"), read("b", 5, 6, "x2")]
    assert ["monotonic_writes"] == broken(history)


def test_a_later_unknown_write_that_is_seen_comes_after_the_earlier_one() -> None:
    """It began after the first was acknowledged, so it cannot have taken effect before it."""
    history = [write("a", 1, 2, "x1"), write("a", 3, 4, "y2", outcome="unknown")]
    assert ["monotonic_writes"] == broken([*history, read("b", 5, 6, "x y2")])


@pytest.mark.parametrize(
    "history",
    [
        pytest.param(
            [write("a", 1, 3, "x1"), write("a", 2, 4, "y2"), read("b", 5, 6, "x y2")],
            id="overlapping",
        ),
        pytest.param(
            [write("a", 1, 2, "x1"), write("c", 3, 4, "y2"), read("b", 5, 6, "x y2")],
            id="another client",
        ),
        pytest.param(
            [write("a", 1, 2, "x1"), write("a", 3, 4, "y2"), read("b", 5, 6, "x1 y")],
            id="in order",
        ),
        pytest.param(
            [
                write("a", 1, 2, "x1", outcome="unknown"),
                write("a", 3, 4, "y2"),
                read("b", 5, 6, "x y2"),
                read("b", 7, 8, "x1 y2"),
            ],
            id="the first one unknown, and late",
        ),
        pytest.param(
            [
                write("a", 1, 2, "x1"),
                write("a", 3, 4, "y2"),
                read("b", 5, 6, "x y2", promised=frozenset()),
            ],
            id="unpromised",
        ),
        pytest.param(
            [
                write("a", 1, 2, "x1", promised=frozenset()),
                write("a", 3, 4, "y2"),
                read("b", 5, 6, "x y2"),
            ],
            id="unpromised first write",
        ),
    ],
)
def test_what_does_not_break_monotonic_writes(history: list[Operation]) -> None:
    """Only an acknowledged write of the same client that ended before the other began is owed."""
    assert [] == broken(history)


def test_a_key_that_lost_something_and_one_that_did_not_are_told_apart() -> None:
    """A smaller snapshot after a larger one is judged by what it shows itself."""
    writes = [write("a", 1, 2, "x1"), write("a", 3, 4, "y2"), write("b", 3, 4, "y3")]
    reads = [read("c", 5, 6, "x1 y23"), read("d", 7, 8, "x y3"), read("e", 9, 10, "x y2")]
    (violation,) = monotonic_writes([*writes, *reads])
    assert reads[2] is violation.read


# Bounded staleness


def test_a_read_that_is_older_than_its_bound() -> None:
    """What anybody wrote longer ago than the bound must be there."""
    old = write("a", 1, 2, "x1")
    stale = read("b", 5.0, 6, "x", staleness_seconds=2.5)
    (violation,) = bounded_staleness([old, stale])
    assert (old,) == violation.because
    assert ["bounded_staleness"] == broken([old, stale])


@pytest.mark.parametrize(
    "history",
    [
        pytest.param(
            [write("a", 1, 2, "x1"), read("b", 5, 6, "x", staleness_seconds=3.0)], id="exactly"
        ),
        pytest.param([write("a", 1, 2, "x1"), read("b", 500, 600, "x")], id="no bound"),
        pytest.param(
            [
                write("a", 1, 2, "x1", outcome="unknown"),
                read("b", 50, 60, "x", staleness_seconds=1.0),
            ],
            id="unknown",
        ),
        pytest.param(
            [
                write("a", 1, 2, "x1"),
                read("b", 50, 60, "x", staleness_seconds=1.0, outcome="failed"),
            ],
            id="failed read",
        ),
    ],
)
def test_what_does_not_break_bounded_staleness(history: list[Operation]) -> None:
    """Only what was acknowledged more than the bound before the read began is owed."""
    assert [] == broken(history)


def test_a_bound_of_nothing_is_a_bound() -> None:
    """Zero seconds promise all that was acknowledged before the read began."""
    history = [write("a", 1, 2, "x1"), read("b", 3, 4, "x", staleness_seconds=0.0)]
    assert ["bounded_staleness"] == broken(history)


def test_the_bound_is_judged_whatever_else_is_promised() -> None:
    """A read without a token promises its bound and nothing else."""
    stale = read("a", 9, 10, "x", staleness_seconds=1.0, promised=frozenset())
    assert ["bounded_staleness"] == broken([write("a", 1, 2, "x1"), stale])


# Lost values


@pytest.mark.parametrize(
    ("rule", "history"),
    [
        ("read_your_writes", [write("a", 1, 2, "x1"), read("a", 3, 4, "x")]),
        ("monotonic_reads", [write("b", 1, 2, "x1"), read("a", 3, 4, "x1"), read("a", 5, 6, "x")]),
        (
            "writes_follow_reads",
            [
                write("a", 1, 2, "x1"),
                read("b", 3, 4, "x1"),
                write("b", 5, 6, "y2"),
                read("c", 7, 8, "x y2"),
            ],
        ),
        (
            "monotonic_writes",
            [write("a", 1, 2, "x1"), write("a", 3, 4, "y2"), read("c", 7, 8, "x y2")],
        ),
        (
            "bounded_staleness",
            [write("a", 1, 2, "x1"), read("b", 8, 9, "x", staleness_seconds=1.0)],
        ),
    ],
)
def test_lost_values_are_excused_everywhere(rule: Guarantee, history: list[Operation]) -> None:
    """What a failover has lost need not be seen; other values must still be."""
    assert [rule] == broken(history)
    assert [] == broken(history, lost=frozenset("1"))
    assert [rule] == broken(history, lost=frozenset("9"))
    assert [] == RULES[rule](history, lost=frozenset("1"))


# The exception from a replica to the primary


def long_fork(**changes: Any) -> list[Operation]:
    """Make a history in which 1 was seen on a replica while the primary was completing it."""
    seen = {"node": "5433", "role": "replica", **changes.get("seen", {})}
    missed = {"node": "5432", "role": "primary", **changes.get("missed", {})}
    ended = changes.get("ended", 6)
    return [
        write("b", 1, ended, "x1", **changes.get("write", {})),
        read("a", 2, 3, "x1", **seen),
        read("a", 4, 5, "x", **missed),
    ]


def test_the_exception_is_counted_apart() -> None:
    """Seen on a replica, missing on the primary, not acknowledged by then: no violation."""
    history = long_fork()
    report = check(history)
    assert () == report.violations
    assert [] == monotonic_reads(history)
    (exception,) = report.exceptions
    assert "monotonic_reads" == exception.rule
    assert history[2] is exception.read
    assert {"x": frozenset("1")} == exception.missing
    assert 1 == report.replica_to_primary
    assert 1.0 == report.exception_rate


def test_the_exception_of_a_write_whose_outcome_is_unknown() -> None:
    """Its client gave up, perhaps because the commit took so long: it is not acknowledged."""
    history = long_fork(ended=1.5, write={"outcome": "unknown"})
    assert 1 == len(check(history).exceptions)
    assert [] == broken(history)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"ended": 3.5}, id="acknowledged before the read"),
        pytest.param({"seen": {"role": "primary"}}, id="seen on the primary"),
        pytest.param({"seen": {"role": None}}, id="seen nobody knows where"),
        pytest.param({"missed": {"role": "replica"}}, id="missing on a replica"),
        pytest.param({"missed": {"role": None}}, id="missing nobody knows where"),
        pytest.param({"write": {"outcome": "failed"}}, id="never written"),
    ],
)
def test_what_is_like_the_exception_and_is_a_violation(changes: dict[str, Any]) -> None:
    """Each condition of the exception is needed."""
    history = long_fork(**changes)
    assert ["monotonic_reads"] == broken(history)
    assert () == check(history).exceptions


def test_what_no_write_of_the_history_added_is_no_exception() -> None:
    """A value from nowhere is not a commit that is being completed."""
    assert ["monotonic_reads"] == broken(long_fork()[1:])


@pytest.mark.parametrize("client", ["a", "c"])
def test_what_the_primary_had_shown_to_anybody_is_no_exception(client: str) -> None:
    """A commit that the primary has shown is completed there."""
    shown = read(client, 3.1, 3.2, "x1", role="primary")
    assert ["monotonic_reads"] == broken([*long_fork(), shown])


def test_what_the_primary_shows_meanwhile_changes_nothing() -> None:
    """The other read may have come later: only one that ended before can prove something."""
    shown = read("c", 3.1, 4.5, "x1", role="primary")
    assert [] == broken([*long_fork(), shown])


def test_a_read_with_both_is_a_violation_and_an_exception() -> None:
    """What is excused does not excuse what is missing beside it."""
    wrote, saw, missed = long_fork()
    also = write("d", 0.1, 0.2, "x2 y3")
    saw = read("a", 2, 3, "x12 y3", role="replica")
    missed = read("a", 4, 5, "x y", role="primary")
    report = check([wrote, also, saw, missed])
    assert [{"x": frozenset("2"), "y": frozenset("3")}] == [v.missing for v in report.violations]
    assert [{"x": frozenset("1")}] == [v.missing for v in report.exceptions]


def answered(**changes: Any) -> list[Operation]:
    """Make a history in which an answer is on the primary, and the question not yet."""
    wrote, seen, _ = long_fork(**changes)
    missed = read("c", 5, 5.5, "x y2", role=changes.get("role", "primary"))
    return [wrote, seen, write("a", 4, 4.5, "y2"), missed]


def test_the_exception_of_writes_follow_reads() -> None:
    """Who answers what only a replica shows yet has answered what the primary is completing."""
    history = answered()
    report = check(history)
    assert () == report.violations
    assert ["writes_follow_reads"] == [exception.rule for exception in report.exceptions]
    assert [] == writes_follow_reads(history)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"ended": 3.5}, id="acknowledged before"),
        pytest.param({"seen": {"role": "primary"}}, id="seen on the primary"),
        pytest.param({"role": "replica"}, id="missing on a replica"),
    ],
)
def test_what_is_like_the_exception_of_writes_follow_reads(changes: dict[str, Any]) -> None:
    """The same conditions hold there."""
    assert ["writes_follow_reads"] == broken(answered(**changes))


def test_a_read_that_began_before_the_answer_was_written_is_judged_by_the_answer() -> None:
    """It shows the answer, so its snapshot is younger; the question was acknowledged by then."""
    wrote, seen, _ = long_fork(ended=3.5)
    missed = read("c", 3.1, 5.5, "x y2", role="primary")
    assert ["writes_follow_reads"] == broken([wrote, seen, write("a", 4, 4.5, "y2"), missed])


def test_a_question_that_was_acknowledged_before_the_read_is_no_exception() -> None:
    """The answer is older than that; what counts is the later of answer and read."""
    history = answered(ended=4.8)
    assert ["writes_follow_reads"] == broken(history)
    assert () == check(history).exceptions


def test_of_several_answers_the_latest_decides() -> None:
    """What excuses a read for one answer does not excuse it for one that was written later."""
    wrote, seen, _ = long_fork(ended=5)
    early, late = write("a", 4, 4.5, "y2"), write("a", 6, 6.5, "y3")
    missed = read("c", 3.5, 8, "x y23", role="primary")
    history = [wrote, seen, early, late, missed]
    assert ["writes_follow_reads"] == broken(history)
    assert () == check(history).exceptions
    (violation,) = writes_follow_reads(history)
    assert (seen, late) == violation.because


def test_reads_in_which_an_exception_could_come_are_counted() -> None:
    """The rate is of reads on the primary after a read of the same key on a replica."""
    history = [
        read("a", 1, 2, "x", role="primary"),
        read("a", 3, 4, "x y", role="replica"),
        read("a", 5, 6, "x", role="primary"),
        read("a", 7, 8, "z", role=None),
        read("a", 9, 10, "z", role="primary"),
        read("b", 9, 10, "x", role="primary"),
        read("a", 11, 12, "w", role="replica"),
        read("a", 13, 14, "y", role="primary"),
        read("a", 15, 16, "y", role="primary", outcome="failed"),
    ]
    assert 2 == check(history).replica_to_primary
    assert 0.0 == check(history).exception_rate


def test_a_read_with_two_exceptions_is_one_read() -> None:
    """The rate is of reads, whatever number of rules one of them is an exception to."""
    wrote, seen, _ = long_fork()
    also = write("b", 1, 6, "z3")
    seen_both = read("c", 2, 3, "x1 z3", role="replica")
    missed_both = read("c", 5, 5.5, "x y2 z", role="primary")
    history = [wrote, also, seen, write("a", 4, 4.5, "y2"), seen_both, missed_both]
    report = check(history)
    rules = ["monotonic_reads", "writes_follow_reads"]
    assert rules == [exception.rule for exception in report.exceptions]
    assert 1 == report.replica_to_primary
    assert 1.0 == report.exception_rate


# The whole


def test_operations_of_one_client_may_overlap() -> None:
    """Two requests at once are in no order; what came before both is owed by both."""
    history = [
        write("a", 1, 2, "x1"),
        write("a", 3, 6, "x2"),
        read("a", 4, 5, "x1"),
        read("a", 4.5, 7, "x2"),
        read("a", 8, 9, "x12"),
    ]
    assert ["read_your_writes", "monotonic_writes"] == broken(history)


def test_a_value_written_twice_is_refused() -> None:
    """Whose write was seen would be a guess."""
    history = [write("a", 1, 2, "x1"), write("b", 3, 4, "x1")]
    with pytest.raises(ValueError, match="1 of x was written twice"):
        check(history)


def test_one_value_in_two_keys_is_two_values() -> None:
    """A value is told by its key."""
    assert [] == broken([write("a", 1, 2, "x1 y1"), read("a", 3, 4, "x1 y1")])
    assert ["read_your_writes"] == broken([write("a", 1, 2, "x1 y1"), read("a", 3, 4, "x1 y")])


def test_an_operation_that_ended_before_it_began_is_refused() -> None:
    """A clock that runs backwards judges nothing."""
    with pytest.raises(ValueError, match="ended before it began"):
        check([write("a", 2, 1, "x1")])


def test_nothing_is_no_violation() -> None:
    """An empty history is judged, and its report says how little that is."""
    report = check([])
    assert report.ok
    assert (0, 0) == (report.operations, report.reads)


def test_a_violation_reads_like_a_sentence() -> None:
    """Who looks at a failing run sees the rule, the client, the server, the values, the reason."""
    stale = read("a", 3, 4, "x", role="replica", node="5433", reason="caught_up")
    (violation,) = read_your_writes([write("a", 1, 2, "x1", outcome="ok"), stale])
    expected = (
        "read your writes: read of a [3.000000, 4.000000] replica 5433 caught_up "
        "does not show {1} of x\n    after write of a [1.000000, 2.000000]"
    )
    assert expected == str(violation)


def test_a_report_counts_by_rule_and_shows_the_first() -> None:
    """However many violations there are, its text stays short."""
    history = [write("a", 1, 2, "x123456789")]
    history += [read("a", 3 + n, 3.5 + n, "x") for n in range(100)]
    text = str(check(history))
    assert "101 operations, 100 reads judged, 100 violations (100 of read your writes)" in text
    assert "{1, 2, 3, 4, 5} and 4 more of x" in text
    assert len(text.splitlines()) < 20


def test_the_default_promise_is_causal() -> None:
    """An operation carries all four session guarantees unless it says otherwise."""
    assert set(RULES) - {"bounded_staleness"} == set(CAUSAL) == set(write("a", 1, 2, "x1").promised)


def test_a_long_history_is_judged_in_linear_time() -> None:
    """Ten times the history takes about ten times as long, not a hundred times."""
    small = min(_seconds(1_000) for _ in range(3))
    assert _seconds(10_000) < 40 * small


def _seconds(length: int) -> float:
    """Return the processor time for a correct history in which all keys grow to 100 values."""
    seen: dict[Hashable, frozenset[Hashable]] = {}
    history = []
    for number in range(length):
        key = f"{number // 400} {number % 4}"
        client = f"{number % 7} {number // 100}"
        before = seen.get(key, frozenset())
        if number % 3:
            history.append(Operation(client, "read", number, number + 0.5, {key: before}))
        else:
            seen[key] = before | {number}
            values = {key: frozenset({number})}
            history.append(Operation(client, "write", number, number + 0.5, values))
    began = time.process_time()
    assert check(history).ok
    return time.process_time() - began
