"""
What the nemesis run is made of, without servers: schedule, ledger, windows and criteria.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest

from lsn_consistency import Lsn, Position
from lsn_consistency.testing import ClusterError
from lsn_consistency.testing._workspace import wait_until
from lsn_consistency.testing.checker import Operation
from tests.faults.clients import KEYS
from tests.faults.kinds import KINDS, Fault, Halves, Kind, Scope, target
from tests.faults.ledger import Ledger
from tests.faults.nemesis import Episode, Nemesis, schedule
from tests.faults.page import markdown
from tests.faults.record import Record, Vain, judge
from tests.faults.stage import Stage
from tests.faults.tally import Tally, Unanswered
from tests.faults.verdict import KindSummary, Summary, failures

# The schedule


def taken(count: int, *args: Any, **options: Any) -> list[tuple[Fault, ...]]:
    return list(islice(schedule(*args, **options), count))


def test_a_seed_replays_its_schedule() -> None:
    """The same seed gives the same faults, another seed gives others."""
    assert taken(50, 7) == taken(50, 7)
    assert taken(50, 7) != taken(50, 8)


@pytest.mark.parametrize("pairs", [False, True])
def test_every_kind_comes_before_any_comes_again(pairs: bool) -> None:
    """A round has every kind once, so a long run has about as many of each."""
    faults: list[Fault] = []
    for drawn in schedule(3, pairs=pairs):
        faults.extend(sorted(drawn, key=lambda fault: fault.number))
        if len(faults) == 2 * len(KINDS):
            break
    kinds = [fault.kind for fault in faults]

    assert sorted(KINDS) == sorted(kinds[: len(KINDS)])
    assert sorted(KINDS) == sorted(kinds[len(KINDS) :])
    assert list(range(1, len(faults) + 1)) == [fault.number for fault in faults]


def test_of_a_pair_no_two_hit_the_same_server() -> None:
    """Two faults at once hit two servers, at most one of them the primary, and move no primary."""
    for drawn in taken(200, 11, pairs=True):
        scopes = [fault.scope for fault in drawn]
        if len(drawn) == 2:
            assert "failover" not in scopes
            assert scopes.count("primary") <= 1
            assert sorted(scopes, reverse=True) == scopes
            hit = [fault.target for fault in drawn if fault.scope == "replica"]
            assert len(set(hit)) == len(hit)


def test_the_pace_stretches_all_times() -> None:
    """Half the pace is the same schedule in half the time."""
    for (slow,), (fast,) in zip(taken(40, 5), taken(40, 5, pace=0.5), strict=True):
        assert (slow.kind, slow.target, slow.strength) == (fast.kind, fast.target, fast.strength)
        assert slow.seconds == pytest.approx(2 * fast.seconds, abs=0.002)


# The thread


class FakeStage(Stage):
    """A cluster without servers: takes down what is done to it."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.done: list[str] = []

    @property
    def primary(self) -> Any:
        return SimpleNamespace(name="primary")

    @property
    def followers(self) -> Any:
        return [SimpleNamespace(name=f"replica_{number}") for number in (1, 2, 3)]

    def hold(self, seconds: float) -> None:
        if self.done:
            self.done.append("hold")

    def wait_settled(self) -> None:
        self.done.append("settled")

    def reached(self, *, promoted: bool) -> Lsn | None:
        return None


def carried_out(
    monkeypatch: pytest.MonkeyPatch, broken: str | None = None
) -> tuple[FakeStage, Nemesis]:
    """Let a nemesis carry out one pair of kinds, of which one may not work."""

    def kind(name: str, scope: Scope) -> Kind:
        def halves(stage: Any, fault: Fault) -> Halves:
            if name == broken:
                raise ClusterError("no such luck")
            stage.done.append(f"break {target(stage, fault).name}")
            yield
            stage.done.append(f"heal {target(stage, fault).name}")

        return Kind(name, scope, (0.0, 0.0), "nothing", halves)

    monkeypatch.setitem(KINDS, "first", kind("first", "replica"))
    monkeypatch.setitem(KINDS, "second", kind("second", "primary"))
    stage = FakeStage()
    pair = tuple(Fault(1, name, 4, 0.0, 0.0, 0.0) for name in ("first", "second"))
    nemesis = Nemesis(stage, iter([pair]), lambda episode, phase: stage.done.append(phase))
    nemesis.start()
    assert wait_until(lambda: not nemesis.running, 30)
    nemesis.stop()
    return stage, nemesis


def test_what_is_broken_is_healed_in_the_reverse_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves of both faults are carried out, and the cluster has its time to settle."""
    stage, nemesis = carried_out(monkeypatch)

    expected = ["breaks", "break replica_2", "break primary", "broken", "hold", "heals"]
    expected += ["heal primary", "heal replica_2", "settled", "healed", "hold"]
    assert expected == stage.done
    assert [("replica_2", "primary")] == [episode.nodes for episode in nemesis.episodes]


def test_a_fault_that_cannot_be_made_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was broken before it is healed, what was not is left alone, and the error is kept."""
    stage, nemesis = carried_out(monkeypatch, broken="second")

    assert ["breaks", "break replica_2", "heals", "heal replica_2"] == stage.done
    assert "no such luck" in (nemesis.episodes[0].error or "")
    assert not nemesis.running


# The ledger


def write(value: int, **options: Any) -> Operation:
    given = {"client": "a", "began": 1.0, "ended": 2.0, "node": "primary", **options}
    return Operation(kind="write", values={0: frozenset({value})}, **given)


def read(*values: int, **options: Any) -> Operation:
    given = {"client": "b", "began": 1.0, "ended": 2.0, **options}
    return Operation(kind="read", values={0: frozenset(values)}, **given)


def episode(kind: str, *, began: float = 3.0, node: str = "primary") -> Episode:
    fault = Fault(1, kind, 0, 1.0, 1.0, 0.5)
    return Episode((fault,), (node,), began, broken=began + 1.0)


def ledger_of(*operations: Operation, asynchronous: bool = False) -> Ledger:
    ledger = Ledger()
    for operation in operations:
        ledger.write(operation, asynchronous=asynchronous)
    return ledger


def test_an_acknowledged_write_that_is_missing_is_a_problem() -> None:
    """Without a fault that may lose it, a missing write is reported, and only once."""
    ledger = ledger_of(write(1), write(2))
    ledger.close({2})
    ledger.close({2})

    assert 1 == len(ledger.problems)
    assert ledger.problems[0].startswith("lost: 1 is missing")


def test_a_write_without_an_answer_may_be_missing_or_there() -> None:
    """Nobody knows of an unknown write, so neither is wrong."""
    ledger = ledger_of(write(1, outcome="unknown"), write(2, outcome="unknown"))
    ledger.close({2})

    assert [] == ledger.problems


def test_a_write_that_failed_must_not_be_there() -> None:
    """A write whose client was told that it failed is a phantom when it shows up."""
    ledger = ledger_of(write(1, outcome="failed"), write(2, outcome="failed"))
    ledger.close({2})

    assert ["phantom: 2"] == [problem[:10] for problem in ledger.problems]


@pytest.mark.parametrize(
    ("kind", "asynchronous", "excused"),
    [
        ("failover", False, True),
        ("failover", True, True),
        ("crash_primary", True, True),
        ("crash_primary", False, False),
        ("switchover", False, False),
        ("switchover", True, False),
        ("freeze_primary", True, False),
    ],
)
def test_a_fault_excuses_only_what_it_may_lose(
    kind: str, asynchronous: bool, excused: bool
) -> None:
    """A failover may lose what was acknowledged, a crash only asynchronous commits."""
    ledger = ledger_of(write(1), asynchronous=asynchronous)
    ledger.census(set(), after=0, before=9.0, episode=episode(kind))

    assert (0 if excused else 1) == len(ledger.problems)
    assert (1 if excused else 0) == ledger.counts.total()


def test_a_failover_excuses_only_the_old_primary() -> None:
    """What the new primary has acknowledged is not lost with the old one."""
    ledger = ledger_of(write(1, node="replica_1"))
    ledger.census(set(), after=0, before=9.0, episode=episode("failover"))

    assert ["lost: 1 is"] == [problem[:10] for problem in ledger.problems]


def test_a_deposed_primary_must_not_accept_writes() -> None:
    """A write that the old primary acknowledged after the promotion is reported as such."""
    ledger = ledger_of(write(1, began=4.5, ended=5.0))
    ledger.census(set(), after=0, before=9.0, episode=episode("second_primary"))

    assert ["accepted by a deposed"] == [problem[:21] for problem in ledger.problems]


def test_a_write_under_way_is_not_judged_yet() -> None:
    """A census judges the writes that had ended before it was taken."""
    ledger = ledger_of(write(1, ended=8.0))
    ledger.census(set(), after=0, before=7.0, episode=episode("failover"))

    assert {} == ledger.lost


def test_what_was_lost_must_not_be_shown_again() -> None:
    """A read that shows a lost value later was served from an abandoned timeline."""
    ledger = ledger_of(write(1))
    ledger.census(set(), after=0, before=5.0, episode=episode("failover"))
    ledger.read(read(1, began=4.0, ended=4.5))
    ledger.close(set())
    assert [] == ledger.problems

    ledger.read(read(1, began=6.0, ended=6.5))
    ledger.close(set())
    assert ["abandoned: 1 was lost"] == [problem[:21] for problem in ledger.problems]


# Windows


def history() -> tuple[list[Operation], list[Operation]]:
    """Two generations: a write at the end of the first, and a read in the second without it."""
    old, new = KEYS * 4, KEYS * 5
    earlier = [
        Operation("a", "write", 1.0, 2.0, {old: frozenset({1})}),
        Operation("a", "read", 2.1, 2.2, {old - KEYS: frozenset(), old: frozenset({1})}),
    ]
    later = [Operation("a", "read", 3.0, 4.0, {old: frozenset(), new: frozenset()})]
    return earlier, later


def test_a_read_is_judged_by_the_generation_before() -> None:
    """A violation that spans two generations is found."""
    finding = judge(5, *history(), frozenset())

    rules = {violation.rule for violation in finding.violations}
    assert {"read_your_writes", "monotonic_reads"} == rules
    assert 1 == finding.reads


def test_a_read_is_judged_once() -> None:
    """What was found in a window is not found again in the next, where its reads are the past."""
    earlier, later = history()

    assert () == judge(6, later, [], frozenset()).violations
    assert () == judge(5, [*earlier, *later], [], frozenset()).violations


def test_a_lost_write_need_not_be_seen() -> None:
    """What a failover has lost is excused."""
    assert () == judge(5, *history(), frozenset({1})).violations


@pytest.fixture
def record() -> Iterator[Record]:
    """A record without anything in it."""
    record = Record()
    yield record
    record.close()


def test_a_session_may_ask_once_for_a_lost_position(record: Record) -> None:
    """
    Reads that overlap ask once; a read that begins after the answer asks again.

    What the old primary answers before it is deposed does not count.
    """
    switch = {1: Lsn.parse("0/5000")}
    lost, kept = Lsn.parse("0/6000"), Lsn.parse("0/4000")
    record.episodes = [episode("failover")]
    record.vain = [
        Vain("a", "primary", 0.1, 0.2, 1, lost),
        Vain("a", "replica_1", 1.0, 2.0, 1, lost),
        Vain("a", "replica_1", 1.5, 2.5, 1, lost),
        Vain("b", "replica_1", 1.0, 2.0, 1, kept),
        Vain("b", "replica_1", 3.0, 4.0, 1, kept),
        Vain("c", "replica_1", 1.0, 2.0, 2, lost),
        Vain("c", "replica_1", 3.0, 4.0, 2, lost),
    ]
    assert [] == record.stuck(switch)
    assert 2 == len(record.lost_positions(switch))

    record.vain.append(Vain("a", "replica_1", 3.0, 4.0, 1, lost))
    assert ["session a asked 2 times for 0/6000 of the lost timeline 1"] == record.stuck(switch)


def test_the_percentile_is_of_the_answered_reads() -> None:
    """Of a hundred reads, the 99th percentile is the longest."""
    tally = Tally()
    tally.latencies.extend(n / 100 for n in range(100))

    assert 0.5 == pytest.approx(tally.latency(0.5))
    assert 0.99 == pytest.approx(tally.latency(0.99))
    assert 0.0 == Tally().latency(0.99)


UNANSWERED = Unanswered(
    episode=None,
    level="causal",
    began=3.5,
    ended=4.5,
    pinned_until=-math.inf,
    position=Position.of(1, 1, Lsn.parse("0/6000")),
    error="",
)


@pytest.mark.parametrize(
    ("change", "excuse"),
    [
        ({}, None),
        ({"pinned_until": 3.6}, "pinned to the primary"),
        ({"pinned_until": 2.1}, "pinned to the primary"),
        ({"pinned_until": 1.9}, None),
        ({"level": "strong"}, "strong"),
        ({"level": "bounded(1)"}, "no primary to bound the lag by"),
        ({"position": Position.of(1, 1, Lsn.parse("0/6001"))}, "ahead of every replica"),
        ({"position": None}, None),
    ],
)
def test_only_a_fault_of_the_primary_excuses_a_read(
    change: dict[str, Any], excuse: str | None
) -> None:
    """Nobody is left for a read that needs the primary; without such a fault somebody is."""
    read = UNANSWERED._replace(**change)
    for kind in ("crash_primary", "failover"):
        fault = replace(episode(kind), reached=Lsn.parse("0/6000"), healed=6.0)
        assert excuse == read._replace(episode=fault).excuse
        assert read._replace(episode=fault, began=7.0).excuse is None
    assert read._replace(episode=replace(episode("freeze_replica"), healed=6.0)).excuse is None
    assert read.excuse is None


# Criteria

GOOD = KindSummary(
    name="pause_replay",
    times=1,
    seconds=2.0,
    answered=2000,
    excused={"pinned to the primary": 7},
    owed=0,
    given_up=0,
    writes={"ok": 10},
    median_seconds=0.01,
    p99_seconds=0.1,
    max_seconds=0.2,
    replica_share=0.9,
    active_reads=1000,
    reasons={},
    examples=(),
)
SUMMARY = Summary(
    seed=1,
    command="replay this",
    version=18,
    minutes=1.0,
    clients=2,
    replicas=3,
    pairs=False,
    grants="statistics",
    sessions=4,
    operations=3000,
    judged_reads=2000,
    outcomes={"ok": 10},
    violations=(),
    exceptions=1,
    from_replica_to_primary=100,
    lost={},
    problems=(),
    lost_positions=0,
    stuck=(),
    limit_seconds=3.0,
    limit_text="wait_seconds 3",
    kinds=(GOOD,),
    events={},
    errors=(),
)


def test_a_good_run_meets_every_criterion() -> None:
    """There is nothing to complain of, and the page says so."""
    assert [] == failures(SUMMARY)
    page = markdown(SUMMARY)
    assert "Every criterion is met." in page
    assert "1.000%" in page
    assert "| pause_replay | 1 |" in page


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"violations": ("monotonic reads",)}, "violation: monotonic reads"),
        ({"problems": ("lost: 1",)}, "lost: 1"),
        ({"stuck": ("session a",)}, "session a"),
        ({"errors": ("Traceback",)}, "the nemesis failed: Traceback"),
        ({"judged_reads": 0}, "no read was judged"),
    ],
)
def test_a_wrong_run_fails(change: dict[str, Any], complaint: str) -> None:
    """Each thing that must not happen is named, also when two faults came at a time."""
    assert [complaint] == failures(replace(SUMMARY, **change))
    assert [complaint] == failures(replace(SUMMARY, **change, pairs=True))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"owed": 3}, "3 of 2003 reads were not answered"),
        ({"p99_seconds": 3.1}, "p99 is 3.10 s, over the 3.00 s of wait_seconds 3"),
        ({"replica_share": 0.1}, "only 10% of the answers came from replicas"),
        ({"replica_share": None}, "only 0% of the answers came from replicas"),
        (
            {"name": "failover", "times": 3, "replica_share": 0.2},
            "only 20% of the answers came from replicas",
        ),
    ],
)
def test_an_unavailable_kind_fails(change: dict[str, Any], complaint: str) -> None:
    """
    A kind of fault is named with what was not good enough.

    Two faults at a time may be too much, and so may be a role that may not read timelines.
    """
    summary = replace(SUMMARY, kinds=(replace(GOOD, **change),))

    assert f"{change.get('name', 'pause_replay')}: {complaint}" in failures(summary)
    assert [] == failures(replace(summary, pairs=True))
    assert [] == failures(replace(summary, grants="none"))


def test_rare_failovers_are_judged_together() -> None:
    """After a single one the new primary may be first; after all of them replicas have served."""
    once = replace(GOOD, name="failover", times=2, replica_share=0.0, active_reads=100)
    other = replace(once, name="switchover", replica_share=0.8)
    late = replace(other, replica_share=0.4)

    assert [] == failures(replace(SUMMARY, kinds=(once, other)))
    [complaint] = failures(replace(SUMMARY, kinds=(once, late)))
    assert "failover, switchover: only 20% of the answers came from replicas" == complaint
    [complaint] = failures(replace(SUMMARY, kinds=(once,)))
    assert "failover: only 0% of the answers came from replicas" == complaint


def test_a_loaded_machine_may_be_given_more_time() -> None:
    """The patience stretches the limit of a read, and nothing else."""
    slow = replace(SUMMARY, kinds=(replace(GOOD, p99_seconds=5.0), replace(GOOD, owed=3)))

    late, owed = failures(slow)
    assert late.startswith("pause_replay: p99 is 5.00 s")
    assert [owed] == failures(slow, patience=2.0)


def test_one_unanswered_read_of_a_kind_is_no_rate() -> None:
    """A kind with few reads is not judged by one of them; all reads together are."""
    few = replace(GOOD, answered=299, owed=1)

    assert [] == failures(replace(SUMMARY, kinds=(few, replace(GOOD, name="none"))))
    assert ["99.667% of the reads that somebody could answer were answered"] == failures(
        replace(SUMMARY, kinds=(few,))
    )
