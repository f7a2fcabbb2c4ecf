"""What a token's position means after a failover, and which replicas may serve it."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

import pytest

from lsn_consistency import Consistency, Position, Reason, Token
from lsn_consistency._cluster import Cluster
from lsn_consistency._decision import admits, decide_stale
from lsn_consistency._lineage import (
    FOLLOW_SECONDS,
    Unprovable,
    is_abandoned,
    is_proven,
    lost_position,
    required_position,
)
from lsn_consistency._observation import Observation
from lsn_consistency._settings import Settings
from lsn_consistency._verdicts import Fail, Lost, Read, Refresh, Serve, Wait
from lsn_consistency.lsn import Lsn, TimelineHistory
from tests.unit.test_decision import ERROR, NOW, SYSTEM, ask, at, cluster, observed, outcome, read

SWITCH = 800
CAUSAL = Consistency.CAUSAL
LATER = NOW + 60


def position(timeline: int, lsn: int) -> Position:
    return Position(SYSTEM, timeline, Lsn(lsn))


def failed_over(*replicas: str, history: bool = True, end: int = 1000) -> Cluster:
    """
    Build a cluster after a failover: timeline 2 left timeline 1 at `SWITCH`, and is at ``end``.

    The former primary was on timeline 1 at 1000; the replicas follow the promoted server.
    """
    known = Cluster(["primary", "promoted", *replicas], Settings.of({}))
    known.record("primary", observed("p", at=NOW - 9, recovery=False), sample=True)
    known.fail("primary", "down", NOW - 8)
    for name in replicas:
        known.record(name, observed(name, end, timeline=2))
    for lsn, when in ((end - 100, NOW - 1), (end, NOW)):
        seen = observed("n", lsn, timeline=2, recovery=False, at=when)
        known.record("promoted", seen, sample=True)
    if history:
        points = MappingProxyType({1: Lsn(SWITCH)})
        known.timelines.learn(seen.server, TimelineHistory(2, points))
    return known


def unprovable(known: Cluster, asked: Read) -> Unprovable:
    """Return why the position of a read cannot be told."""
    with pytest.raises(Unprovable) as raised:
        required_position(known, asked)
    return raised.value


# Where a token's position is today


@pytest.mark.parametrize("lsn", [1, SWITCH - 1, SWITCH])
def test_a_position_before_the_switch_point_is_asked_for_on_the_new_timeline(lsn: int) -> None:
    """What both timelines share has the same LSNs on both."""
    assert position(2, lsn) == required_position(failed_over(), read(at(lsn)))


@pytest.mark.parametrize("lsn", [SWITCH + 1, 10**6])
def test_a_position_beyond_the_switch_point_may_be_lost(lsn: int) -> None:
    """The primary's log left the timeline before it: the primary serves, and it is reported."""
    known = failed_over()
    found = unprovable(known, read(at(lsn)))
    expected = Lost(position(1, lsn), 2, Lsn(SWITCH))
    assert (Reason.TIMELINE_CHANGED, expected) == (found.reason, found.lost)
    verdict = ask(known, read(at(lsn)))
    assert ("promoted", Reason.TIMELINE_CHANGED) == outcome(verdict)
    assert (expected, True) == (verdict.lost, verdict.primary)


def test_a_position_of_a_sibling_was_never_in_the_primarys_log() -> None:
    """Two standbys were promoted; the one of timeline 2 is given up for that of timeline 3."""
    known = failed_over("a")
    third = observed("m", timeline=3, recovery=False, at=NOW + 1)
    known.record("a", third)
    known.timelines.learn(third.server, TimelineHistory(3, MappingProxyType({1: Lsn(SWITCH)})))
    found = unprovable(known, read(at(1, timeline=2)))
    assert Lost(position(2, 1), 3, None) == found.lost
    assert position(3, SWITCH) == required_position(known, read(at(SWITCH)))


def test_without_the_history_nothing_is_proven_and_nothing_called_lost() -> None:
    """Unknown is neither: the primary serves, and the token is replaced without a word."""
    known = failed_over("a", history=False)
    for lsn in (1, SWITCH + 1):
        found = unprovable(known, read(at(lsn)))
        assert (Reason.TIMELINE_CHANGED, None) == (found.reason, found.lost)
        verdict = ask(known, read(at(lsn)))
        assert ("promoted", Reason.TIMELINE_CHANGED) == outcome(verdict)
        assert verdict.lost is None


def test_a_position_of_the_primarys_timeline_is_asked_for_as_it_is() -> None:
    """With and without a history."""
    for history in (True, False):
        known = failed_over(history=history)
        assert position(2, 900) == required_position(known, read(at(900, timeline=2)))


def test_a_position_of_a_newer_timeline_is_not_lost() -> None:
    """Somebody has seen a promotion that this process has not: the token is believed."""
    known = failed_over()
    assert position(3, 9999) == required_position(known, read(at(9999, timeline=3)))
    asked = read(at(9999, timeline=3))
    assert isinstance(ask(known, asked), Refresh)
    asked.refreshed = True
    assert isinstance(ask(known, asked), Fail)


@pytest.mark.parametrize(
    "level", [Consistency.EVENTUAL, Consistency.bounded(1), Consistency.sticky(1)]
)
def test_levels_without_tokens_lose_nothing(level: Consistency) -> None:
    """They ask for no position."""
    assert required_position(failed_over(), read(at(10**6), level)) is None


def test_a_replica_of_the_new_timeline_serves_tokens_of_the_old_one() -> None:
    """Proven by the history; one byte less than the position is not enough."""
    known = failed_over("a")
    verdict = ask(known, read(at(SWITCH)))
    assert ("a", Reason.CAUGHT_UP) == outcome(verdict)
    assert position(2, SWITCH) == verdict.required
    known.record("a", observed("a", SWITCH - 1, timeline=2, at=NOW + 0.1))
    waits = ask(known, read(at(SWITCH), waiting_since=NOW), now=NOW + 0.1)
    assert Wait(position(2, SWITCH)) == waits


# Ahead of the primary's end


def test_what_a_primary_asked_since_does_not_have_is_lost() -> None:
    """One byte beyond the end of the log is lost, its end is not."""
    known = cluster("a")
    asked = read(at(1001), began=NOW)
    assert Lost(position(1, 1001), 1, Lsn(1000)) == unprovable(known, asked).lost
    verdict = ask(known, asked)
    assert ("primary", Reason.TIMELINE_CHANGED) == outcome(verdict)
    assert verdict.lost == Lost(position(1, 1001), 1, Lsn(1000))
    assert position(1, 1000) == required_position(known, read(at(1000), began=NOW))


def test_a_primary_that_was_asked_before_the_read_says_nothing() -> None:
    """The position may have been written since: an observation sent before proves no loss."""
    known = cluster("a")
    for began in (math.nextafter(NOW, math.inf), NOW + 1, math.inf):
        assert position(1, 1001) == required_position(known, read(at(1001), began=began))
        assert Wait(position(1, 1001)) == ask(known, read(at(1001), began=began))


@pytest.mark.parametrize(
    "seen",
    [
        observed("p", None, recovery=False, at=NOW + 1),
        observed("p", 900, timeline=None, recovery=False, at=NOW + 1),
        observed("p", 900, at=NOW + 1),
        None,
    ],
    ids=["NULL lsn", "NULL timeline", "a standby now", "unreachable"],
)
def test_a_primary_that_says_nothing_loses_nothing(seen: Observation | None) -> None:
    """A missing, failed or demoted primary proves no loss."""
    known = cluster("a")
    if seen is None:
        known.fail("primary", "down", NOW + 1)
    else:
        known.record("primary", seen)
    assert position(1, 5000) == required_position(known, read(at(5000), began=NOW))


def test_a_former_primarys_end_says_nothing() -> None:
    """Only the log of the primary of today counts, on the timeline of the token."""
    known = failed_over()
    known.record("primary", observed("p", 100, at=NOW + 1, recovery=False))
    assert position(2, 1000) == required_position(known, read(at(1000, timeline=2), began=NOW))
    beyond = unprovable(known, read(at(1001, timeline=2), began=NOW))
    assert Lost(position(2, 1001), 2, Lsn(1000)) == beyond.lost


def test_a_held_position_of_a_newer_timeline_is_never_lost() -> None:
    """A process that still knows the former primary only must not take a valid position away."""
    known = cluster("a")
    assert lost_position(known, position(2, 10), position(1, 1000)) is None


@pytest.mark.parametrize(
    ("held", "lost"),
    [
        (position(2, 1000), None),
        (position(2, 1001), Lost(position(2, 1001), 2, Lsn(1000))),
        (position(1, SWITCH), None),
        (position(1, SWITCH + 1), Lost(position(1, SWITCH + 1), 2, Lsn(SWITCH))),
    ],
)
def test_what_a_primary_does_not_have(held: Position, lost: Lost | None) -> None:
    """The same fences, for a position that is held while the primary is observed."""
    assert lost == lost_position(failed_over(), held, position(2, 1000))
    unknown = failed_over(history=False)
    expected = lost if held.timeline == 2 else None
    assert expected == lost_position(unknown, held, position(2, 1000))


# Replicas of the old timeline


@pytest.mark.parametrize(
    ("timeline", "system", "level", "expected"),
    [
        (1, SYSTEM, CAUSAL, True),
        (2, SYSTEM, CAUSAL, False),
        (3, SYSTEM, CAUSAL, False),
        (None, SYSTEM, CAUSAL, False),
        (1, 8, CAUSAL, False),
        (1, SYSTEM, Consistency.READ_YOUR_WRITES, True),
        (1, SYSTEM, Consistency.bounded(5), True),
        (1, SYSTEM, Consistency.sticky(5), True),
        (1, SYSTEM, Consistency.EVENTUAL, False),
    ],
)
def test_a_replica_of_an_older_timeline_is_abandoned(
    timeline: int | None, system: int, level: Consistency, expected: bool
) -> None:
    """Whatever its LSN; only reads that promise nothing may use it."""
    seen = observed("a", 10**9, timeline=timeline, system=system)
    assert is_abandoned(failed_over(), read(None, level), seen) is expected


def test_an_abandoned_replica_never_serves_however_far_it_is() -> None:
    """Numerically ahead of everything, and no candidate, healthy or not, with or without token."""
    known = failed_over("a")
    known.record("a", observed("a", 10**9, at=NOW + 1, started="2"))
    for asked in (
        read(),
        read(at(1)),
        read(at(900, timeline=2)),
        read(None, Consistency.bounded(9)),
    ):
        assert ("promoted", Reason.NO_REPLICA) == outcome(ask(known, asked))
        asked.primary_error = ERROR
        asked.waited = asked.refreshed = True
        assert isinstance(ask(known, asked), Fail)
    eventual = read(None, Consistency.EVENTUAL)
    assert ("a", Reason.WITHIN_LAG) == outcome(ask(known, eventual))


@pytest.mark.parametrize("reason", [Reason.WITHIN_LAG, Reason.PRIMARY_DOWN, Reason.CAUGHT_UP])
def test_a_connection_to_an_abandoned_replica_is_not_admitted(reason: Reason) -> None:
    """The node was decided for before the promotion was seen; its connection is judged after."""
    known = failed_over("a")
    serve = Serve(known.nodes["a"], reason, 0.0, None)
    abandoned = observed("a", 10**9)
    assert not admits(known, read(), serve, abandoned, NOW)
    assert admits(known, read(), serve, observed("a", 1000, timeline=2), NOW)
    eventual = read(None, Consistency.EVENTUAL)
    assert admits(known, eventual, serve._replace(reason=Reason.PRIMARY_DOWN), abandoned, NOW)


def test_a_position_that_was_asked_for_on_the_old_timeline_is_not_admitted_on_the_new() -> None:
    """The decision was taken before the promotion was seen: it is taken again."""
    known = failed_over("a")
    serve = Serve(known.nodes["a"], Reason.CAUGHT_UP, 0.0, position(1, 900))
    assert not admits(known, read(at(900)), serve, observed("a", 1000, timeline=2), NOW)


def test_a_replica_ahead_of_the_primary_is_not_its_replica() -> None:
    """It was seen before the primary's last sample and is ahead of that: it follows another."""
    known = cluster("a")
    known.record("a", observed("a", 1001, at=NOW - 0.1, started="2"))
    ahead = observed("a", 1001)._replace(sent_at=NOW - 0.1, received_at=NOW)
    assert math.inf == known.lag_seconds(ahead, NOW)
    later = ahead._replace(received_at=math.nextafter(NOW, math.inf))
    assert 0.0 == known.lag_seconds(later, NOW)
    level = observed("a", 1000)._replace(sent_at=NOW - 0.1, received_at=NOW)
    assert 0.0 == known.lag_seconds(level, NOW)


def test_a_replica_ahead_of_the_primary_serves_nothing() -> None:
    """Without an end of its lag it is within no bound; its word "timeline 1" is no proof."""
    known = cluster("a")
    known.record("a", observed("a", 5000, at=NOW + 0.1))
    known.record("primary", observed("p", 1000, at=NOW + 0.2, recovery=False), sample=True)
    asked = read(at(900), refreshed=True, waited=True, waiting_since=NOW)
    assert outcome(ask(known, asked, now=NOW + 0.3))[0] == "primary"


# With the primary gone, a replica that is not sure of its timeline


def unsure(name: str = "a", lsn: int = 1000, *, when: float = NOW + 1, **kept: Any) -> Observation:
    """Observe a standby as a plain role does: it streams, from whom cannot be told."""
    seen = observed(name, lsn, at=when)
    return seen._replace(**{"timeline_is_certain": False, "streaming": True, **kept})


def without_primary(*replicas: str) -> Cluster:
    """Build a cluster whose primary is gone, and whose first replica is unsure."""
    known = cluster("a", *replicas)
    known.fail("primary", "down", NOW + 0.5)
    known.record("a", unsure())
    return known


def test_a_certain_timeline_is_one() -> None:
    """It says it itself: nothing else is looked at, at a cold start neither."""
    known = Cluster(["primary", "a", "b"], Settings.of({}))
    assert not is_proven(known, known.nodes["a"])
    known.record("a", observed("a"))
    assert is_proven(known, known.nodes["a"])


def test_at_a_cold_start_an_uncertain_timeline_is_none() -> None:
    """A process that has seen no primary: nobody knows whom the replica followed."""
    known = Cluster(["primary", "a"], Settings.of({}))
    for streaming in (True, False):
        known.record("a", unsure(streaming=streaming))
        assert not is_proven(known, known.nodes["a"])
    asked = read(at(1000), primary_error=ERROR, waited=True, refreshed=True)
    assert isinstance(ask(known, asked), Fail)


def test_a_replica_that_follows_nobody_is_where_it_was() -> None:
    """Its walreceiver ended with the primary."""
    known = without_primary("b")
    known.record("a", unsure(streaming=False, when=NOW + 2))
    known.fail("b", "down", NOW + 2)
    assert is_proven(known, known.nodes["a"])


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (observed("b", at=NOW + 1.002), True),
        (observed("b", at=NOW + 1.0 - FOLLOW_SECONDS), True),
        (observed("b", at=NOW + 0.99 - FOLLOW_SECONDS), False),
        (observed("b", at=NOW + 1.002, recovery=False, timeline=2), False),
        (observed("b", at=NOW + 1.002, recovery=False), False),
        (None, False),
    ],
    ids=["a standby", "just before", "too early", "promoted", "a second primary", "unknown"],
)
def test_a_replica_that_streams_follows_none_of_the_others(
    other: Observation | None, expected: bool
) -> None:
    """Every other node was seen afterwards, and is a standby still."""
    known = without_primary("b")
    known.fail("b", "down", NOW + 0.6)
    if other is not None:
        known.record("b", other)
    known.primary = known.nodes["primary"]
    assert is_proven(known, known.nodes["a"]) is expected


def test_the_comparison_is_asked_for_once() -> None:
    """The unsure replica first, then the others; then it serves, or the read fails."""
    known = without_primary("b")
    known.record("b", observed("b", 10, at=NOW + 0.6))
    asked = read(at(1000), primary_error=ERROR, waited=True, refreshed=True)
    assert Refresh(("a", "b"), compare=True) == ask(known, asked, now=LATER)
    asked.compared = True
    failed = ask(known, asked, now=LATER)
    assert isinstance(failed, Fail)
    known.record("b", observed("b", 10, at=NOW + 1.5))
    assert ("a", Reason.PRIMARY_DOWN) == outcome(ask(known, asked, now=LATER))
    asked.compared = False
    assert ("a", Reason.PRIMARY_DOWN) == outcome(ask(known, asked, now=LATER))


def test_a_proven_replica_spares_the_comparison() -> None:
    """Where one that reached the position is sure of its timeline, it serves."""
    known = without_primary("b")
    known.record("b", observed("b", 1000, at=NOW + 0.6))
    asked = read(at(1000), primary_error=ERROR)
    assert ("b", Reason.PRIMARY_DOWN) == outcome(ask(known, asked, now=LATER))


def test_the_unsure_replica_is_left_out_where_it_is_further() -> None:
    """Of the proven ones the furthest serves, not of all."""
    known = without_primary("b")
    known.record("a", unsure(lsn=9000, when=NOW + 2))
    known.record("b", observed("b", 1000, at=NOW + 0.6))
    asked = read(at(1000), primary_error=ERROR, compared=True)
    assert ("b", Reason.PRIMARY_DOWN) == outcome(ask(known, asked, now=LATER))


def test_a_single_replica_of_a_primary_that_is_gone_serves() -> None:
    """There is nobody else whom it could follow, as far as this router is told."""
    known = without_primary()
    asked = read(at(1000), primary_error=ERROR)
    assert ("a", Reason.PRIMARY_DOWN) == outcome(ask(known, asked, now=LATER))


def test_while_the_primary_does_not_answer_an_unsure_replica_is_compared_first() -> None:
    """Within the lag bound too: another node may have been promoted a moment ago."""
    known = without_primary("b")
    known.record("b", observed("b", 10, at=NOW + 0.6))
    asked = read(at(1000))
    assert Refresh(("a", "b"), compare=True) == ask(known, asked, now=NOW + 1.5)
    asked.compared = True
    assert isinstance(ask(known, asked, now=NOW + 1.5), Wait)
    known.record("b", observed("b", 10, at=NOW + 1.2))
    assert ("a", Reason.CAUGHT_UP) == outcome(ask(known, asked, now=NOW + 1.5))
    known.record("primary", observed("p", recovery=False, at=NOW + 1.3))
    known.record("a", unsure(when=NOW + 1.4))
    assert ("a", Reason.CAUGHT_UP) == outcome(ask(known, read(at(1000)), now=NOW + 1.5))


def test_a_promotion_that_was_seen_needs_no_comparison() -> None:
    """The unsure replica is abandoned until it says that it follows the promoted one."""
    known = without_primary("b")
    known.record("b", observed("b", timeline=2, recovery=False, at=NOW + 1.5))
    known.fail("b", "down", NOW + 2)
    asked = read(at(1000, timeline=2), primary_error=ERROR, waited=True, refreshed=True)
    failed = ask(known, asked, now=LATER)
    assert isinstance(failed, Fail)
    known.record("a", unsure(when=NOW + 2.5, timeline=2, streaming=False))
    assert ("a", Reason.PRIMARY_DOWN) == outcome(ask(known, asked, now=LATER))


# A primary below the timeline that a token names


@pytest.mark.parametrize("level", [Consistency.STRONG, CAUSAL, Consistency.READ_YOUR_WRITES])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_former_primary_serves_no_session_that_has_seen_the_new_one(
    level: Consistency, pinned: bool
) -> None:
    """Not by way of a pin or of STRONG either: all nodes are looked at, then the read fails."""
    known = cluster("a")
    token = at(10, timeline=2)
    token = token.merge(Token(pin_until=2e9)) if pinned else token
    assert Refresh(("primary", "a")) == ask(known, read(token, level))
    failed = ask(known, read(token, level, refreshed=True))
    assert isinstance(failed, Fail)
    assert "timeline 2" in str(failed.error)


@pytest.mark.parametrize(
    ("level", "admitted"),
    [
        (Consistency.STRONG, False),
        (CAUSAL, False),
        (Consistency.EVENTUAL, True),
        (Consistency.bounded(1), True),
    ],
)
def test_the_connection_of_a_former_primary_is_not_admitted(
    level: Consistency, admitted: bool
) -> None:
    """The primary was unknown when it was decided for, and shows its timeline now."""
    known = cluster("a")
    asked = read(at(10, timeline=2), level)
    serve = Serve(known.nodes["primary"], Reason.PRIMARY_REQUIRED, primary=True)
    assert admits(known, asked, serve, observed("p", recovery=False), NOW) is admitted
    assert admits(known, asked, serve, observed("p", recovery=False, timeline=2), NOW)


# Servers that do not tell their system


def limited(*, at: float = NOW) -> Observation:
    """Observe a primary that refuses its WAL functions."""
    return observed("p", None, timeline=None, recovery=False, system=0, at=at)


@pytest.mark.parametrize("level", [CAUSAL, Consistency.READ_YOUR_WRITES])
def test_a_token_of_an_unknown_system_is_served_by_the_primary(level: Consistency) -> None:
    """The system of the token may be ours: nobody else can be shown to have its position."""
    known = Cluster(["primary", "a"], Settings.of({}))
    known.record("primary", limited())
    known.record("a", observed("a", None, timeline=None, system=0))
    assert ("primary", Reason.NO_REPLICA) == outcome(ask(known, read(at(10), level)))
    asked = read(at(10), level, primary_error=ERROR, refreshed=True, waited=True)
    assert isinstance(ask(known, asked), Fail)


def test_what_is_unknown_does_not_replace_what_is_known() -> None:
    """The functions are refused from now on: the system is still the one that it was."""
    known = cluster("a")
    known.record("primary", limited(at=NOW + 1))
    assert SYSTEM == known.system_id
    asked = read(at(5000), primary_error=ERROR, refreshed=True, waited=True)
    assert isinstance(ask(known, asked, now=LATER), Fail)
    known.record("primary", observed("p", at=NOW + 2, recovery=False))
    assert (SYSTEM, known.nodes["primary"]) == (known.system_id, known.primary)


# A read that may be stale


def test_a_stale_read_takes_no_replica_that_is_refused_or_abandoned() -> None:
    """Its connections would not be admitted; the read would ask for them again and again."""
    known = failed_over("a", "b")

    def stale(asked: Read) -> str | None:
        serve = decide_stale(known, asked, Reason.TIMELINE_CHANGED, NOW, lambda: 0.5)
        return None if serve is None else serve.node.name

    assert "a" == stale(read(refused={"b"}))
    known.record("b", observed("b", 10**9, at=NOW + 1, started="2"))
    assert "a" == stale(read())
    assert stale(read(refused={"a"})) is None
    assert "b" == stale(read(None, Consistency.EVENTUAL, refused={"a"}))
