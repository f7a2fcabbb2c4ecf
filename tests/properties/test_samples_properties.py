"""The measured lag is never less than the true one, and thinning it out keeps that."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsn_consistency._observation import MAX_SAMPLES, Observation, PrimarySamples, Server
from lsn_consistency.lsn import Lsn

SERVER = Server(7, "p", 5432, "1")
FLUSH_DELAY = 0.6


class Step(NamedTuple):
    """Let time pass, then do one thing on the primary."""

    seconds: float
    what: str


steps = st.lists(
    st.builds(
        Step,
        st.sampled_from((0.0, 0.01, 0.1, 0.3, 0.59, 0.7, 2.0)),
        st.sampled_from(
            (
                "commit",
                "asynchronous",
                "asynchronous",
                "tail",
                "flush",
                "probe",
                "probe",
                "probe",
                "crash",
            )
        ),
    ),
    max_size=40,
)
latencies = st.sampled_from((0.0, 0.005, 0.4))


def observed(
    time: float,
    insert: int,
    flush: int | None = None,
    *,
    received: float | None = None,
    **kept: object,
) -> Observation:
    """Observe the primary, or with ``in_recovery=True`` a replica at ``insert``."""
    values: dict[str, object] = {
        "server": SERVER,
        "in_recovery": False,
        "timeline": 1,
        "lsn": Lsn(insert),
        "sent_at": time,
        "received_at": time if received is None else received,
        "flush_lsn": None if flush is None else Lsn(flush),
        "flush_delay_seconds": FLUSH_DELAY,
        **kept,
    }
    return Observation(**values)  # type: ignore[arg-type]


class Primary:
    """Be a primary that flushes asynchronous commits within `FLUSH_DELAY`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.insert = self.flush = 1000
        self.commits: list[tuple[int, float]] = []

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        due = [end for end, at in self.commits if at + FLUSH_DELAY <= self.now]
        self.flush = max([self.flush, *due])

    def do(self, what: str) -> None:
        if what == "crash":
            self.insert = self.flush
            self.commits = [commit for commit in self.commits if commit[0] <= self.flush]
            return
        if what in ("commit", "asynchronous", "tail"):
            self.insert += 10
        if what in ("commit", "asynchronous"):
            self.commits.append((self.insert, self.now))
        if what in ("commit", "flush"):
            self.flush = self.insert

    def staleness(self, replay: int) -> float:
        """Return the age of the oldest commit that a replica at ``replay`` does not show."""
        missing = [at for end, at in self.commits if end > replay]
        return self.now - min(missing) if missing else 0.0


@given(steps=steps, before=latencies, after=latencies, spacing=st.sampled_from((0.0, 0.125, 1.0)))
def test_lag_is_never_understated(
    steps: list[Step], before: float, after: float, spacing: float
) -> None:
    """For every replica, whatever it has replayed, the lag is at least the true staleness."""
    primary = Primary()
    samples = PrimarySamples(spacing)
    for step in steps:
        primary.pass_time(step.seconds)
        if step.what != "probe":
            primary.do(step.what)
            if step.what == "crash":
                samples.interrupt()
        else:
            sent = primary.now
            primary.pass_time(before)
            insert, flush = primary.insert, primary.flush
            primary.pass_time(after)
            samples.add(observed(sent, insert, flush, received=primary.now))
        for replay in range(990, primary.flush + 1, 10):
            lag = samples.lag_seconds(observed(primary.now, replay, in_recovery=True), primary.now)
            assert lag >= primary.staleness(replay) - 1e-9


@given(rest=st.lists(st.sampled_from((0.1, 0.5, 1.0)), min_size=1, max_size=30))
def test_lag_of_an_idle_cluster_is_the_age_of_the_last_sample(rest: list[float]) -> None:
    """On an idle primary a replica that has everything lags for no longer than the last poll."""
    samples = PrimarySamples(0.125)
    now = 0.0
    for seconds in rest:
        now += seconds
        samples.add(observed(now, 1000, 1000))
    replica = observed(now, 1000, in_recovery=True)
    assert samples.lag_seconds(replica, now + 0.2) == pytest.approx(0.2)


def test_a_flushed_tail_counts_once_the_primary_stands_still() -> None:
    """Records that nobody flushes do not make an idle replica lag, after the flush delay."""
    samples = PrimarySamples(0.125)
    for tenth in range(11):
        samples.add(observed(tenth / 10, 1040, 1000))
    replica = observed(1.0, 1000, in_recovery=True)
    assert samples.lag_seconds(replica, 1.0) == pytest.approx(0.0)


def test_a_flush_position_does_not_count_before_the_flush_delay() -> None:
    """A commit that is not flushed yet may be among what stands still since a moment."""
    samples = PrimarySamples(0.125)
    for time in (0.0, 0.2, 0.5):
        samples.add(observed(time, 1040, 1000))
    assert samples.lag_seconds(observed(0.5, 1000, in_recovery=True), 0.5) == math.inf


def test_standing_still_counts_from_the_answer_of_the_first_probe() -> None:
    """A slow probe saw its position at its end, not when it was sent."""
    samples = PrimarySamples(0.125)
    samples.add(observed(0.0, 1040, 1000, received=0.9))
    samples.add(observed(0.95, 1040, 1000))
    assert samples.lag_seconds(observed(0.95, 1000, in_recovery=True), 0.95) == math.inf


@given(
    times=st.lists(st.floats(0.001, 0.3), min_size=1, max_size=60),
    writes=st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_thinning_only_overstates(times: list[float], writes: list[bool]) -> None:
    """With fewer samples the lag is never less, and more by one spacing at most."""
    thin, full = PrimarySamples(0.125), PrimarySamples(0.0)
    now, insert = 0.0, 1000
    for seconds, written in zip(times, writes, strict=False):
        now += seconds
        insert += 10 * written
        for samples in (thin, full):
            samples.add(observed(now, insert, insert))
    for replay in range(1000, insert + 1, 10):
        replica = observed(now, replay, in_recovery=True)
        least, kept = full.lag_seconds(replica, now), thin.lag_seconds(replica, now)
        assert least <= kept
        if least < math.inf and kept < math.inf:
            assert kept <= least + 2 * (0.125 + 0.3)


def test_the_ring_is_bounded_and_forgets_the_oldest() -> None:
    """However long it runs, memory stays; what is older than the ring lags without end."""
    samples = PrimarySamples(0.0)
    count = 3 * MAX_SAMPLES
    for number in range(count):
        samples.add(observed(float(number), number, number, flush_delay_seconds=0.0))
    held = samples._inserts._times, samples._inserts._lsns, samples._flushes._times
    assert [True] * 3 == [len(each) <= MAX_SAMPLES for each in held]
    newest = samples.lag_seconds(observed(count, count - 1, in_recovery=True), float(count))
    kept = samples.lag_seconds(observed(count, count - 2000, in_recovery=True), float(count))
    oldest = samples.lag_seconds(observed(count, 5, in_recovery=True), float(count))
    assert (1.0, 2000.0, math.inf) == (newest, kept, oldest)


@given(
    writes=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    ahead=st.integers(-40, 40),
    late=st.sampled_from((-0.5, 0.0, 0.5)),
)
def test_what_is_ahead_of_the_primary_follows_another(
    writes: list[int], ahead: int, late: float
) -> None:
    """Received before the newest sample was taken and beyond it: no lag, however near."""
    samples = PrimarySamples(0.125)
    insert = 1000
    for number, written in enumerate(writes):
        insert += written
        samples.add(observed(float(number), insert, insert))
    newest = float(len(writes) - 1)
    replica = observed(newest - 1.0, insert + ahead, in_recovery=True, received=newest + late)
    lag = samples.lag_seconds(replica, newest + 1.0)
    assert (ahead > 0 and late <= 0) or ahead < 0 or lag == 1.0
    assert not (ahead > 0 and late <= 0) or lag == math.inf


def test_another_origin_knows_nothing() -> None:
    """Positions of another system or timeline, or none, are never compared by their numbers."""
    samples = PrimarySamples(0.125)
    samples.add(observed(1.0, 1000, 1000))
    other = Server(8, "p", 5432, "1")
    strangers = [
        observed(1.0, 2000, timeline=2, in_recovery=True),
        observed(1.0, 2000, timeline=None, in_recovery=True),
        observed(1.0, 2000, lsn=None, in_recovery=True),
        observed(1.0, 2000, server=other, in_recovery=True),
    ]
    assert [math.inf] * 4 == [samples.lag_seconds(each, 1.0) for each in strangers]


def test_a_new_timeline_starts_the_samples_anew() -> None:
    """After a promotion the former primary's samples say nothing."""
    samples = PrimarySamples(0.125)
    samples.add(observed(1.0, 1000, 1000))
    samples.add(observed(2.0, 900, 900, timeline=2))
    former = samples.lag_seconds(observed(2.0, 5000, in_recovery=True), 2.0)
    follows = samples.lag_seconds(observed(2.0, 900, timeline=2, in_recovery=True), 2.5)
    assert (math.inf, 0.5) == (former, follows)


def test_an_observation_without_a_position_is_no_sample() -> None:
    """NULL, or an older observation, changes nothing."""
    samples = PrimarySamples(0.125)
    samples.add(observed(1.0, 1000, 1000))
    samples.add(observed(2.0, 0, lsn=None))
    samples.add(observed(2.0, 2000, timeline=None))
    samples.add(observed(0.5, 2000))
    assert samples.newest_at == 1.0
    assert samples.lag_seconds(observed(1.0, 1000, in_recovery=True), 3.0) == 2.0


@pytest.mark.parametrize("noticed", ["a new start", "a lost connection"])
def test_a_crash_ends_the_standstill(noticed: str) -> None:
    """After a crash, a commit may stand where lost WAL stood: the flush position waits anew."""
    samples = PrimarySamples(0.0)
    samples.add(observed(100.0, 1010, 1000))
    server = SERVER
    if noticed == "a new start":
        server = SERVER._replace(started="2")
    else:
        samples.interrupt()
    behind = observed(100.7, 1000, in_recovery=True)
    samples.add(observed(100.65, 1010, 1000, server=server))
    assert math.inf == samples.lag_seconds(behind, 100.7)
    samples.add(observed(101.3, 1010, 1000, server=server))
    assert 0.0 == samples.lag_seconds(behind, 101.3)
