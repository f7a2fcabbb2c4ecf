"""What is known of the nodes: roles, failures, hidden servers, counts, and what people see."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lsn_consistency import Position
from lsn_consistency._cluster import Cluster
from lsn_consistency._nodes import (
    FIRST_RETRY_SECONDS,
    MAX_RETRY_SECONDS,
    MAX_SERVERS_PER_NODE,
    SERVER_MEMORY_SECONDS,
    Node,
)
from lsn_consistency._observation import Observation, Server
from lsn_consistency._settings import Settings
from lsn_consistency._snapshot import reported_lag, snapshot
from lsn_consistency.events import NodeFailed, NodeRecovered, RoleChanged
from lsn_consistency.lsn import Lsn

SYSTEM = 7


def observed(
    place: str | None = "a",
    lsn: int | None = 1000,
    *,
    at: float = 10.0,
    timeline: int | None = 1,
    recovery: bool = True,
    system: int = SYSTEM,
    started: str = "1",
    **kept: Any,
) -> Observation:
    known = None if lsn is None else Lsn(lsn)
    server = Server(system, place, 5432, started)
    return Observation(server, recovery, timeline, known, at, at + 0.001, **kept)


def primary(place: str | None = "p", lsn: int | None = 1000, **kept: Any) -> Observation:
    return observed(place, lsn, recovery=False, **kept)


def cluster(**options: Any) -> Cluster:
    return Cluster(["primary", "a", "b"], Settings.of(options))


# One node


def test_a_newer_observation_replaces_also_downwards() -> None:
    """A server that came back in the past is known as it is now."""
    node = Node("a", 1.0, 3)
    node.take(observed(lsn=1000, at=1.0))
    node.take(observed(lsn=10, at=2.0))
    assert node.newest is not None
    assert node.newest.lsn == 10


def test_a_late_observation_changes_nothing() -> None:
    """What was sent before what is known, or before the last failure, is no news."""
    known = cluster()
    known.record("a", observed(lsn=500, at=5.0))
    assert [] == known.record("a", observed(lsn=900, at=4.0, recovery=False))
    newest = known.nodes["a"].newest
    assert newest is not None
    assert (500, "replica") == (newest.lsn, known.nodes["a"].role)
    known.fail("a", "lost", 6.0)
    for late in (5.5, 6.0):
        assert [] == known.record("a", observed(lsn=900, at=late))
    assert (None, 1, "lost") == (
        known.nodes["a"].newest,
        known.nodes["a"].failures,
        known.nodes["a"].last_error,
    )
    assert [NodeRecovered("a")] == known.record("a", observed(lsn=900, at=6.1))


def test_a_restarted_server_is_another() -> None:
    """An observation of before the restart says nothing about the server that runs now."""
    node = Node("a", 1.0, 3)
    before, after = observed(started="1", at=1.0), observed(started="2", at=2.0)
    node.take(before)
    assert node.observed(before.server) is before
    node.take(after)
    assert node.observed(before.server) is None
    assert node.observed(after.server) is after
    assert not node.hides_servers


def test_hidden_servers_are_told_apart_and_forgotten_in_time() -> None:
    """Several places behind one endpoint are known apart, for a minute and sixteen at most."""
    node = Node("a", 1.0, 3)
    node.take(observed("a", 1, at=1.0))
    assert not node.hides_servers
    node.take(observed("b", 2, at=2.0))
    assert node.hides_servers
    assert node.observed(Server(SYSTEM, "a", 5432, "1")) is not None
    for number in range(40):
        node.take(observed(f"s{number}", 3, at=3.0 + number / 100))
    assert len(node.servers) <= MAX_SERVERS_PER_NODE
    node.take(observed("s39", 3, at=4.0 + SERVER_MEMORY_SECONDS))
    node.take(observed("s39", 3, at=4.1 + SERVER_MEMORY_SECONDS))
    assert [("s39")] == [server.server.address for server in node.servers.values()]


def test_the_breaker_opens_at_the_threshold_and_closes_at_once() -> None:
    """Three failures in a row open it, one observation closes it."""
    known = cluster(failure_threshold=3)
    node = known.nodes["a"]
    for number in (1, 2):
        assert [NodeFailed("a", "down", number)] == known.fail("a", "down", float(number))
        assert not node.breaker_open
    known.fail("a", "down", 3.0)
    assert node.breaker_open
    known.record("a", observed(at=4.0))
    assert (False, 0, None) == (node.breaker_open, node.failures, node.last_error)


def test_the_back_off_grows_to_its_limit_and_jitter_halves_it_at_most() -> None:
    """From 50 ms doubling to 5 s; random numbers take up to half off."""
    node = Node("a", 1.0, 3)
    assert node.retry_seconds(0.5, 0.9) == 0.5
    expected = FIRST_RETRY_SECONDS
    for failures in range(1, 40):
        node.failures = failures
        assert node.retry_seconds(0.5, 0.0) == pytest.approx(min(expected, MAX_RETRY_SECONDS))
        assert node.retry_seconds(0.5, 1.0) == pytest.approx(min(expected, MAX_RETRY_SECONDS) / 2)
        expected *= 2
    node.failures = 10**9
    assert node.retry_seconds(0.5, 0.0) == MAX_RETRY_SECONDS


def test_a_failure_makes_a_node_unknown() -> None:
    """Every server behind the endpoint is forgotten."""
    known = cluster()
    known.record("a", observed("a"))
    known.record("a", observed("b", at=11.0))
    known.fail("a", "lost", 12.0)
    node = known.nodes["a"]
    assert (None, {}, 12.0) == (node.newest, node.servers, node.checked_at)


# Which node is the primary


def test_roles_are_observed() -> None:
    """The node that says so is the primary, wherever it is configured; the hook hears of it."""
    known = cluster()
    assert [RoleChanged("primary", None, "replica")] == known.record("primary", observed("p"))
    assert known.primary is None
    known.record("a", primary("a"))
    assert known.primary is known.nodes["a"]
    assert [RoleChanged("a", "primary", "replica")] == known.record("a", observed("a", at=11.0))
    assert known.primary is None


def test_the_higher_timeline_wins() -> None:
    """After a promotion the former primary may still run: it is none."""
    known = cluster()
    known.record("primary", primary("p"))
    known.record("a", primary("a", timeline=2))
    assert known.primary is known.nodes["a"]
    known.record("primary", primary("p", 5000, at=11.0))
    assert known.primary is known.nodes["a"]
    assert known.conflict is None


def test_a_former_primary_does_not_come_back() -> None:
    """While the promoted one is unreachable it stays the primary; no lower timeline is elected."""
    known = cluster()
    known.record("primary", primary("p"))
    known.record("a", primary("a", timeline=2))
    known.fail("a", "lost", 11.0)
    assert known.primary is known.nodes["a"]
    known.record("primary", primary("p", at=12.0))
    assert known.primary is known.nodes["a"]
    assert not known.is_primary(primary("p"))
    assert known.is_primary(primary("x", timeline=2))
    assert known.is_primary(primary("x", timeline=3))


def test_another_system_starts_anew() -> None:
    """The configured primary says which system is ours; its timelines begin at the beginning."""
    known = cluster()
    known.record("primary", primary("p", timeline=9))
    known.record("primary", primary("p", timeline=1, system=8, at=11.0))
    assert (8, 1) == (known.system_id, known.timeline)
    assert known.primary is known.nodes["primary"]
    known.record("a", primary("a", timeline=20))
    assert known.primary is known.nodes["primary"]


def test_two_primaries_of_one_timeline_are_a_conflict() -> None:
    """Two servers that claim one timeline leave no primary, until one of them is gone."""
    known = cluster()
    known.record("primary", primary("p", started="1"))
    known.record("a", primary("a", started="2"))
    assert known.primary is None
    assert known.conflict is not None
    assert "timeline 1" in known.conflict
    known.record("a", observed("a", at=11.0, started="3"))
    assert known.conflict is None
    assert known.primary is known.nodes["primary"]


def test_one_server_listed_twice_is_no_conflict() -> None:
    """The same server by socket, by TCP and by another name is one server."""
    known = cluster()
    known.record("primary", primary(None, started="1"))
    known.record("a", primary("10.0.0.1", started="1"))
    assert known.conflict is None
    assert known.primary is known.nodes["primary"]


def test_a_primary_without_a_known_timeline_is_one() -> None:
    """A server that hides its WAL functions still takes writes."""
    known = cluster()
    known.record("primary", primary("p", None, timeline=None, system=0))
    assert known.primary is known.nodes["primary"]


def test_an_unreachable_primary_stays_the_one_to_try() -> None:
    """A failure does not take the role away, another role does."""
    known = cluster()
    known.record("primary", primary("p"))
    known.fail("primary", "lost", 11.0)
    assert known.primary is known.nodes["primary"]
    known.record("primary", observed("p", at=12.0))
    assert known.primary is None


# Lag


def test_only_the_monitor_of_the_primary_gives_samples() -> None:
    """Observations of connections come out of order, those of replicas are no samples."""
    known = cluster()
    known.record("primary", primary("p"))
    known.record("a", observed("a"), sample=True)
    assert known.lag_seconds(observed("a"), 10.0) == math.inf
    known.record("primary", primary("p", at=11.0), sample=True)
    assert known.lag_seconds(observed("a"), 11.5) == 0.5


def test_the_lag_for_people_says_where_it_comes_from() -> None:
    """Measured by samples; the standby's own timestamp only while the primary is out of reach."""
    known = cluster()
    node = known.nodes["a"]
    assert (None, "unknown") == reported_lag(known, node, 10.0)
    known.record("primary", primary("p"), sample=True)
    known.record("a", observed("a", replay_age_seconds=4.0))
    assert (0.5, "samples") == reported_lag(known, node, 10.5)
    assert (0.0, "primary") == reported_lag(known, known.nodes["primary"], 10.5)
    known.fail("primary", "lost", 10.5)
    lag, source = reported_lag(known, node, 11.001)
    assert lag == pytest.approx(5.0)
    assert source == "replay_timestamp"
    known.record("a", observed("a", at=12.0))
    assert (None, "unknown") == reported_lag(known, node, 12.0)


# Waiting and counting


def test_a_replica_releases_those_whose_position_it_reached() -> None:
    """They are woken once; a primary that reached it releases nobody."""
    known = cluster()
    woken: list[str] = []
    required = Position(SYSTEM, 1, Lsn(1000))
    known.record("primary", primary("p", 5000, at=9.0))
    waiter = known.wait_for_position(required, lambda: woken.append("x"))
    known.record("primary", primary("p", 5000))
    known.record("a", observed("a", 999))
    assert known.awaits_position(known.nodes["a"])
    assert not known.awaits_position(known.nodes["primary"])
    assert [] == woken
    known.record("b", observed("b", 1000))
    assert ["x"] == woken
    assert not waiter.active
    assert not known.awaits_position(known.nodes["a"])
    known.give_up(waiter)
    assert 0 == len(known.positions)


def test_the_primary_is_asked_about_a_position_that_it_may_have_lost() -> None:
    """It is probed as often as replicas until it was asked after the read began; then all know."""
    known = cluster()
    node = known.nodes["primary"]
    known.record("primary", primary("p", 900))
    woken: list[str] = []
    required = Position(SYSTEM, 1, Lsn(1000))
    waiter = known.wait_for_position(required, lambda: woken.append("x"), 11.0)
    assert known.awaits_position(node)
    known.record("primary", primary("p", 950, at=10.5))
    assert (True, []) == (known.awaits_position(node), woken)
    seen = primary("p", 999, at=11.0)
    known.record("primary", seen)
    assert ["x"] == woken
    assert (False, True, False) == (
        known.awaits_position(node),
        waiter.seen is seen,
        waiter.active,
    )


def test_a_primary_that_has_the_position_is_not_asked_again() -> None:
    """The read waits for a replica; so does one whose primary is unknown."""
    known = cluster()
    node = known.nodes["primary"]
    required = Position(SYSTEM, 1, Lsn(1000))
    known.record("primary", primary("p", 1000))
    known.wait_for_position(required, lambda: None, 11.0)
    assert not known.awaits_position(node)
    assert known.awaits_position(known.nodes["a"])
    known.fail("primary", "lost", 11.0)
    assert not known.awaits_position(node)


def test_who_waits_for_an_observation_gets_a_later_one_or_the_failure() -> None:
    """An observation sent before ``after`` releases nobody; a failure releases all."""
    known = cluster()
    woken: list[str] = []
    first = known.wait_for_observation("a", 10.5, lambda: woken.append("first"))
    second = known.wait_for_observation("a", 20.0, lambda: woken.append("second"))
    known.record("a", observed("a", at=10.4))
    assert [] == woken
    seen = observed("a", at=10.5)
    known.record("a", seen)
    assert (["first"], True) == (woken, first.seen is seen)
    known.fail("a", "lost", 11.0)
    assert (["first", "second"], None) == (woken, second.seen)


def test_fallback_reads_are_counted_up_to_the_limit() -> None:
    """The limit holds exactly; leaving wakes the one that waited longest."""
    known = cluster(max_fallback_reads=2)
    node = known.nodes["primary"]
    assert [True, True, False] == [known.enter(node, fallback=True) for _ in range(3)]
    assert known.enter(node, fallback=False)
    assert (3, 2) == (node.in_flight, known.fallback_reads)
    woken: list[str] = []
    for name in ("first", "second"):
        known.wait_for_fallback(lambda name=name: woken.append(name))  # type: ignore[misc]
    known.leave(node, fallback=False)
    assert [] == woken
    known.leave(node, fallback=True)
    assert ["first"] == woken
    assert (1, 1) == (node.in_flight, known.fallback_reads)


# For people


def test_the_snapshot_describes_every_node() -> None:
    """All that the documentation names is there, for the primary, a replica and an unknown node."""
    known = cluster(failure_threshold=1)
    known.record("primary", primary("p"), sample=True)
    known.record("a", observed("a", 900, pooled=True))
    known.fail("b", "refused", 9.0)
    shown = snapshot(known, 10.5, 1_000_010.5)
    assert ["primary", "a", "b"] == list(shown)
    assert {
        "role": "primary",
        "healthy": True,
        "lag_seconds": 0.0,
        "lag_source": "primary",
        "replay_lsn": Lsn(1000),
        "timeline": 1,
        "timeline_is_certain": True,
        "switch_points": {},
        "system_id": SYSTEM,
        "checked_at": pytest.approx(1_000_010.001),
        "breaker": "closed",
        "consecutive_failures": 0,
        "last_error": None,
        "reads_in_flight": 0,
        "servers": 1,
        "pooled": False,
    } == shown["primary"]
    assert ("replica", None, "unknown", True) == tuple(
        shown["a"][key] for key in ("role", "lag_seconds", "lag_source", "pooled")
    )
    assert (None, False, "open", 1, "refused", None) == tuple(
        shown["b"][key]
        for key in (
            "role",
            "healthy",
            "breaker",
            "consecutive_failures",
            "last_error",
            "replay_lsn",
        )
    )


def test_at_a_cold_start_a_foreign_primary_is_trusted_by_nobody() -> None:
    """Until the configured primary was seen, nodes of two systems leave open which one is ours."""
    known = cluster()
    known.record("a", observed("a"))
    known.record("b", primary("b", system=8))
    assert known.primary is None
    assert known.conflict is not None
    assert "different systems" in known.conflict
    known.record("primary", primary("p", at=11.0))
    now: tuple[Any, ...] = (known.primary, known.conflict, known.system_id)
    assert (known.nodes["primary"], None, SYSTEM) == now
