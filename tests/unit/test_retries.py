"""Which failure runs again where, who may be asked twice, and which of two answers counts."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lsn_consistency import _hedges
from lsn_consistency._hedges import HedgeBudget, Race
from lsn_consistency._retries import Ended, Next, Work, after, note_write
from lsn_consistency._settings import Settings
from lsn_consistency._steps import Spawn
from lsn_consistency._workers import Threads
from lsn_consistency.exceptions import ConfigurationError

ELSEWHERE, PRIMARY, RAISE = Next.ELSEWHERE, Next.PRIMARY, Next.RAISE


@pytest.mark.parametrize(
    ("state", "on_replica", "on_primary", "after_a_change_of_role"),
    [
        ("40001", ELSEWHERE, RAISE, RAISE),  # conflict with recovery; of transactions there
        ("40P01", ELSEWHERE, RAISE, RAISE),  # deadlock with the startup process
        ("57P01", ELSEWHERE, RAISE, RAISE),  # shutdown, pg_terminate_backend
        ("57P02", ELSEWHERE, RAISE, RAISE),  # crash of another backend
        ("57P03", ELSEWHERE, RAISE, RAISE),  # starting up
        ("25006", PRIMARY, RAISE, PRIMARY),  # writes on a standby; a demoted primary
        ("0A000", PRIMARY, RAISE, RAISE),  # SERIALIZABLE on a standby
        ("55000", RAISE, RAISE, ELSEWHERE),  # functions of the other role
        ("57014", RAISE, RAISE, RAISE),  # statement_timeout, a cancellation
        ("57P04", RAISE, RAISE, RAISE),  # the database was dropped
        ("42703", RAISE, RAISE, RAISE),  # the user's own error
        (None, RAISE, RAISE, RAISE),
    ],
)
def test_where_a_failed_read_runs_again(
    state: str | None, on_replica: Next, on_primary: Next, after_a_change_of_role: Next
) -> None:
    """A standby's refusals and failures run elsewhere, a primary's do not."""
    ended = Ended(error=RuntimeError(), state=state)
    assert on_replica == after(ended, on_primary=False, role_changed=False)
    assert on_primary == after(ended, on_primary=True, role_changed=False)
    assert after_a_change_of_role == after(ended, on_primary=True, role_changed=True)


@pytest.mark.parametrize(("on_primary", "expected"), [(False, ELSEWHERE), (True, RAISE)])
def test_a_lost_connection_has_no_state(on_primary: bool, expected: Next) -> None:
    """What ran on a replica runs elsewhere; what ran on the primary may have done something."""
    ended = Ended(error=RuntimeError(), lost=True)
    assert expected == after(ended, on_primary=on_primary, role_changed=False)


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        (Ended(42), False),
        (Ended(error=ValueError()), False),
        (Ended(error=ValueError(), state="57014"), False),
        (Ended(error=ValueError(), state="57P04"), False),
        (Ended(error=ValueError(), lost=True), True),
        (Ended(error=ValueError(), state="40001"), True),
        (Ended(error=ValueError(), state="25006"), True),
        (Ended(error=ValueError(), state="0A000"), True),
        (Ended(error=ValueError(), state="55000"), True),
    ],
)
def test_whose_fault_it_is(ended: Ended, expected: bool) -> None:
    """A value and an error of the user's are answers; what may run elsewhere is not one yet."""
    assert expected == ended.is_nodes_fault


# Writes


def _nothing() -> None:
    return


def test_a_write_is_noted_by_every_work_around_it() -> None:
    """Neither the inner function nor the one that called it may run again."""
    note_write()
    outer = Work(_nothing, (), hedged=False)
    with outer.running():
        beside = Work(_nothing, (), hedged=False)
        with beside.running():
            pass
        inner = Work(_nothing, (), hedged=False)
        with inner.running():
            note_write()
    after_all = Work(_nothing, (), hedged=False)
    note_write()
    assert (True, False, True, False) == (outer.wrote, beside.wrote, inner.wrote, after_all.wrote)


def test_what_may_run_twice_at_once_does_not_write() -> None:
    """Not even inside a function that is not hedged itself."""
    with Work(_nothing, (), hedged=True).running():
        with pytest.raises(ConfigurationError, match="hedge_after"):
            note_write()
        inner = Work(_nothing, (), hedged=False)
        with inner.running(), pytest.raises(ConfigurationError, match="hedge_after"):
            note_write()


# The budget


def _hedges_of(budget: HedgeBudget, reads: int) -> int:
    count = 0
    for _ in range(reads):
        budget.earn()
        count += budget.spend()
    return count


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 1.0])
def test_a_budget_is_a_share_of_the_reads_and_a_burst(share: float) -> None:
    """Over any number of reads no more than the share of them, and one burst."""
    budget = HedgeBudget(share)
    for reads in (1, 10, 1000, 5000):
        assert _hedges_of(budget, reads) <= share * reads + _hedges.BURST
    # What is not used up is not saved for later.
    for _ in range(100_000):
        budget.earn()
    assert _hedges.BURST == sum(budget.spend() for _ in range(100))


def test_a_share_of_one_hedges_every_read() -> None:
    """The cap can be taken off."""
    assert 5000 == _hedges_of(HedgeBudget(1.0), 5000)


def test_a_share_of_zero_hedges_nothing() -> None:
    """Not even a burst."""
    assert 0 == _hedges_of(HedgeBudget(0.0), 5000)


def test_a_refund_is_what_was_taken() -> None:
    """A hedge that did not come about is paid back, and never more than that."""
    budget = HedgeBudget(0.01)
    taken = sum(budget.spend() for _ in range(100))
    budget.refund()
    assert (_hedges.BURST, True, False) == (taken, budget.spend(), budget.spend())
    for _ in range(100):
        budget.refund()
    assert _hedges.BURST == sum(budget.spend() for _ in range(100))


# The race


def test_only_one_run_wins() -> None:
    """The first to claim; it is known as the winner when its read is closed."""
    race = Race()
    first, second = race.enter(), race.enter()
    assert race.claim(second)
    assert not race.claim(first)
    assert (True, False, None) == (race.is_decided, race.is_over, race.winner)
    race.leave(second)
    assert (True, second, [first]) == (race.is_over, race.winner, race.losers)
    race.leave(first)
    assert [] == race.losers


def test_a_race_that_nobody_won_is_over_when_all_have_left() -> None:
    """A failure leaves the answer to the other run."""
    race = Race()
    first, second = race.enter(), race.enter()
    race.leave(first)
    assert not race.is_over
    race.leave(second)
    assert (True, None) == (race.is_over, race.winner)


def test_after_the_caller_has_gone_nobody_wins() -> None:
    """A closed race takes no answer."""
    race = Race()
    run = race.enter()
    race.close()
    assert not race.claim(run)
    assert not run.begin(object())
    assert run.is_over


def test_whoever_waits_is_woken_also_if_it_is_late() -> None:
    """The end may come before the wait for it."""
    race = Race()
    run = race.enter()
    woken: list[str] = []
    race.notify(lambda: woken.append("before"))
    race.leave(run)
    race.notify(lambda: woken.append("after"))
    assert ["before", "after"] == woken


def test_a_connection_is_not_given_back_before_its_interruption_has_ended() -> None:
    """A request to cancel that is under way would hit the statement of the next user."""
    run = Race().enter()
    conn = object()
    assert run.begin(conn)
    usable: list[bool] = []
    with run.interrupting() as interrupted:
        ending = threading.Thread(target=lambda: usable.append(run.end(10.0)))
        ending.start()
        assert run.wait(10.0)
        assert [] == usable
    ending.join(10.0)
    assert interrupted is conn
    assert [True] == usable
    with run.interrupting() as nothing, run.cutting() as nothing_either:
        assert (None, None) == (nothing, nothing_either)


def test_a_connection_whose_interruption_does_not_end_is_not_used_again() -> None:
    """Nor one that was cut off."""
    hanging, cut = Race().enter(), Race().enter()
    assert hanging.begin(object())
    assert cut.begin(object())
    with hanging.interrupting():
        assert not hanging.end(0.01)
    with cut.cutting() as conn:
        assert conn is not None
    assert not cut.end(0.0)


class _ClosedThreads(Threads):
    """Be a blocking router that was closed, or is not open yet."""

    def __init__(self) -> None:
        self._settings = Settings.of({})
        self.carried_out: list[Any] = []
        self._run = self.carried_out.append
        self._reset_workers()


def test_what_is_to_be_ended_is_ended_after_the_router_was_closed() -> None:
    """No thread is left for it, so the caller does it; a run does not begin any more."""
    threads = _ClosedThreads()
    plan: Any = object()
    assert threads._spawn(Spawn(plan, None))
    assert not threads._spawn(Spawn(plan, Race().enter()))
    assert [plan] == threads.carried_out
