"""What the benchmarks' workload is made of, and how it is judged: nothing here needs a server."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from tests.benchmarks.shop.judge import Load, judge, percentile
from tests.benchmarks.shop.load import Sample
from tests.benchmarks.shop.trace import FOLLOW_SECONDS, make_trace, shape_for, sticky_offload

SHAPE = shape_for(500.0, seconds=10.0, think_seconds=0.4)
LOADS = {
    "primary": Load(calls=30, seconds=0.5, reads=10, writes=20),
    "replica_1": Load(calls=30, seconds=0.5, reads=30, writes=0),
}


def sample(
    began: float, body: str, *, number: int = 0, session: int = 0, key: int = 1, took: float = 0.1
) -> Sample:
    """Record a call of a session; with a number it is a write."""
    return Sample(session, number > 0, key, number, began, began, began + took, body)


def test_a_shape_is_always_the_same_trace() -> None:
    """Every strategy plays the same calls; another seed is another trace."""
    assert make_trace(SHAPE) == make_trace(SHAPE)
    assert make_trace(SHAPE) != make_trace(replace(SHAPE, seed=SHAPE.seed + 1))


@pytest.mark.parametrize("write_share", [0.01, 0.1, 0.5])
def test_a_trace_has_the_rate_and_the_writes_that_were_asked_for(write_share: float) -> None:
    """To within a tenth, over ten seconds."""
    shape = shape_for(500.0, seconds=10.0, think_seconds=0.4, write_share=write_share)
    calls = [call for each in make_trace(shape).sessions for call in each if call.at >= 0]
    assert len(calls) == pytest.approx(5000, rel=0.1)
    writes = sum(call.write for call in calls)
    assert writes / len(calls) == pytest.approx(write_share, rel=0.15)


def test_each_write_has_a_number_of_its_own_and_is_followed_by_a_read() -> None:
    """What is written is looked at, a moment later and at the same place."""
    trace = make_trace(SHAPE)
    numbers = [call.number for each in trace.sessions for call in each]
    assert len(numbers) == len(set(numbers))
    for calls in trace.sessions:
        for first, second in pairwise(calls):
            assert first.at <= second.at
            if first.write:
                assert (second.write, second.follows, first.key) == (False, True, second.key)
                assert second.at - first.at == pytest.approx(FOLLOW_SECONDS)


def test_a_longer_window_leaves_less_to_replicas() -> None:
    """And slower clients leave more, since their windows end between two calls."""
    five, fifteen = (sticky_offload(SHAPE, window) for window in (5.0, 15.0))
    assert 0 < fifteen < five < 1
    slow = shape_for(500.0, seconds=10.0, think_seconds=2.0)
    assert sticky_offload(slow, 5.0) > five


def test_a_read_that_misses_its_sessions_write_is_stale() -> None:
    """Only writes that were answered before the read began count, and only the session's own."""
    samples = [
        sample(0.0, "primary 7", number=7),
        sample(0.5, "replica "),
        sample(0.5, "replica ", session=1),
        sample(1.0, "replica 7"),
        sample(1.5, "primary 8", number=8, took=1.0),
        sample(2.0, "replica 7"),
    ]
    outcome = judge("a strategy", samples, 10.0, 0.1, LOADS)
    assert (4, 2, 1, 0) == (outcome.reads, outcome.writes, outcome.stale, outcome.failed)
    assert outcome.stale_share == 0.25


def test_a_read_that_goes_back_behind_an_earlier_one_is_counted_by_itself() -> None:
    """It misses what others wrote and the session had seen."""
    samples = [
        sample(0.0, "primary 7", number=7, session=1),
        sample(0.5, "replica 7"),
        sample(1.0, "replica "),
    ]
    outcome = judge("a strategy", samples, 10.0, 0.1, LOADS)
    assert (0, 1) == (outcome.stale, outcome.backward)


def test_what_came_before_the_start_is_known_and_not_counted() -> None:
    """A write of the warm-up has to be seen by the first read that counts."""
    samples = [sample(-1.0, "primary 7", number=7), sample(-0.5, "replica "), sample(0.5, "a ")]
    outcome = judge("a strategy", samples, 10.0, 0.1, LOADS)
    assert (1, 0, 1) == (outcome.reads, outcome.writes, outcome.stale)


def test_a_request_without_an_answer_is_a_failure() -> None:
    """It is neither a read nor fast."""
    outcome = judge("a strategy", [sample(0.0, ""), sample(0.5, "replica ")], 10.0, 0.1, LOADS)
    assert (1, 1, 1) == (outcome.reads, outcome.failed, len(outcome.latencies))


def test_the_load_is_the_word_of_the_servers() -> None:
    """Offload and the primary's share come from what it was asked, not from what was answered."""
    outcome = judge("a strategy", [], 10.0, 0.1, LOADS)
    assert outcome.offload == 0.75
    assert outcome.primary_ms == pytest.approx(500 / 60)
    assert outcome.primary_calls == 0.5


def test_percentiles() -> None:
    """Nearest rank, and nothing of nothing."""
    assert (3, 5, 0.0) == (
        percentile([5, 1, 3], 0.5),
        percentile([5, 1, 3], 0.99),
        percentile([], 1),
    )
