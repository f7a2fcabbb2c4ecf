"""One test for each row of the table of reasons, and for each way of not knowing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from lsn_consistency import Consistency, Position, Reason, Token
from lsn_consistency._cluster import Cluster
from lsn_consistency._decision import admits, decide, decide_stale, decide_wholly, no_primary
from lsn_consistency._observation import Observation, Server
from lsn_consistency._settings import Settings
from lsn_consistency._verdicts import Fail, Read, Refresh, Serve, Wait
from lsn_consistency.exceptions import NoNodeAvailableError, ReplayTimeoutError
from lsn_consistency.lsn import Lsn

SYSTEM = 7
NOW = 100.0
UNIX_NOW = 1_700_000_000.0
ERROR = ConnectionError("down")


def observed(
    place: str,
    lsn: int | None = 1000,
    *,
    at: float = NOW,
    timeline: int | None = 1,
    recovery: bool = True,
    system: int = SYSTEM,
    started: str = "1",
) -> Observation:
    """Observe a standby, or a primary with ``recovery=False``."""
    known = None if lsn is None else Lsn(lsn)
    server = Server(system, place, 5432, started)
    return Observation(server, recovery, timeline, known, at, at, flush_lsn=known)


def cluster(*replicas: str, primary: Observation | None = None, **options: Any) -> Cluster:
    """Build a cluster whose primary was sampled at 900 and 1000, and whose replicas have 1000."""
    made = Cluster(["primary", *replicas], Settings.of(options))
    made.record("primary", observed("p", 900, at=NOW - 1.0, recovery=False), sample=True)
    made.record("primary", primary or observed("p", recovery=False), sample=True)
    for name in replicas:
        made.record(name, observed(name))
    return made


def at(lsn: int, *, timeline: int = 1, system: int = SYSTEM) -> Token:
    """Make a token of one position."""
    return Token([Position(system, timeline, Lsn(lsn))])


def read(token: Token | None = None, level: Consistency = Consistency.CAUSAL, **kept: Any) -> Read:
    """Ask for a read with a lag limit of two seconds."""
    return Read(level, token or Token(), level.lag_limit(2.0), 0.1, **kept)


def ask(
    known: Cluster, asked: Read, *, now: float = NOW, random: Callable[[], float] | None = None
) -> Any:
    """Decide now; what is decided at once is what the rules say."""
    verdict = decide(known, asked, now, UNIX_NOW, random or Random(1).random)
    if isinstance(verdict, Serve) and not verdict.primary:
        same = replace(asked, preferred=verdict.node.name)
        assert verdict == decide_wholly(known, same, now, UNIX_NOW, Random(1).random)
    return verdict


def outcome(verdict: Any) -> tuple[str, Reason]:
    """Say where a verdict goes and why."""
    assert isinstance(verdict, Serve), verdict
    return verdict.node.name, verdict.reason


# The table of reasons


def test_caught_up() -> None:
    """A replica at the very position of the token serves, and says what it must have reached."""
    verdict = ask(cluster("a"), read(at(1000)))
    assert ("a", Reason.CAUGHT_UP) == outcome(verdict)
    assert verdict.required == Position(SYSTEM, 1, Lsn(1000))
    assert verdict.lag_seconds == 0.0
    assert not verdict.primary


def test_one_byte_behind_waits_and_then_goes_to_the_primary() -> None:
    """Less than the token is not enough: wait, and after the wait the primary."""
    known = cluster("a", primary=observed("p", 1001, recovery=False))
    assert Wait(Position(SYSTEM, 1, Lsn(1001))) == ask(known, read(at(1001)))
    late = ask(known, read(at(1001), waited=True, waiting_since=0.0))
    assert ("primary", Reason.NOT_CAUGHT_UP) == outcome(late)
    assert late.primary


@pytest.mark.parametrize(
    "level", [Consistency.CAUSAL, Consistency.bounded(2), Consistency.EVENTUAL]
)
def test_within_lag(level: Consistency) -> None:
    """Without a token the lag decides."""
    assert ("a", Reason.WITHIN_LAG) == outcome(ask(cluster("a"), read(None, level)))


def test_bounded_and_eventual_reads_ignore_the_token() -> None:
    """Only the levels that promise own writes look at the token."""
    ahead = at(5000)
    for level in (Consistency.bounded(2), Consistency.EVENTUAL, Consistency.sticky(2)):
        assert ("a", Reason.WITHIN_LAG) == outcome(ask(cluster("a"), read(ahead, level)))
    assert isinstance(ask(cluster("a"), read(ahead, Consistency.READ_YOUR_WRITES)), Wait)


def test_strong_is_the_primary_only() -> None:
    """No replica ever serves a strong read."""
    assert ("primary", Reason.PRIMARY_REQUIRED) == outcome(
        ask(cluster("a"), read(None, Consistency.STRONG))
    )
    failed = ask(cluster("a"), read(None, Consistency.STRONG, primary_error=ERROR))
    assert isinstance(failed, Fail)
    assert isinstance(failed.error, NoNodeAvailableError)


@pytest.mark.parametrize(
    ("level", "until", "pinned"),
    [
        (Consistency.CAUSAL, 1.0, True),
        (Consistency.READ_YOUR_WRITES, 1.0, True),
        (Consistency.sticky(5), 1.0, True),
        (Consistency.EVENTUAL, 1.0, False),
        (Consistency.bounded(1), 1.0, False),
        (Consistency.CAUSAL, 0.0, False),
        (Consistency.CAUSAL, -1.0, False),
    ],
)
def test_a_pin_holds_until_its_time(level: Consistency, until: float, pinned: bool) -> None:
    """A pinned session reads from the primary, at the levels that know sessions."""
    verdict = ask(cluster("a"), read(Token(pin_until=UNIX_NOW + until), level))
    expected = ("primary", Reason.PRIMARY_REQUIRED) if pinned else ("a", Reason.WITHIN_LAG)
    assert expected == outcome(verdict)


def test_lag_exceeded_looks_once_more_before_it_decides() -> None:
    """What is known is refreshed, the primary first; then the primary serves."""
    known = cluster("a", "b")
    later = NOW + 2.5
    assert Refresh(("primary", "a", "b")) == ask(known, read(), now=later)
    assert ("primary", Reason.LAG_EXCEEDED) == outcome(ask(known, read(refreshed=True), now=later))


def test_the_lag_limit_is_met_at_the_limit_and_not_after() -> None:
    """``max_lag_seconds`` is the greatest lag that serves, the observation's age included."""
    known = cluster("a")
    assert ("a", Reason.WITHIN_LAG) == outcome(ask(known, read(), now=NOW + 2.0))
    assert isinstance(ask(known, read(), now=NOW + 2.001), Refresh)
    assert ("a", Reason.WITHIN_LAG) == outcome(
        ask(known, read(None, Consistency.EVENTUAL), now=NOW + 900.0)
    )


def test_a_token_that_is_reached_does_not_excuse_a_lag() -> None:
    """Caught up with the token and over the bound: both are asked for."""
    known = cluster("a", "b")
    known.record("a", observed("a", 950, at=NOW))
    asked = read(at(940), refreshed=True, excluded={"b"})
    assert ("a", Reason.CAUGHT_UP) == outcome(ask(known, asked, now=NOW + 0.5))
    assert ("primary", Reason.LAG_EXCEEDED) == outcome(ask(known, asked, now=NOW + 1.5))


def test_timeline_changed() -> None:
    """A position of an older timeline than the primary's is not proven: the primary serves."""
    known = cluster("a", primary=observed("p", timeline=2, recovery=False))
    for timeline in (1, 2):
        known.record("a", observed("a", 9999, at=NOW + timeline, timeline=timeline))
        verdict = ask(known, read(at(1000)))
        assert ("primary", Reason.TIMELINE_CHANGED) == outcome(verdict)


def test_a_token_of_a_newer_timeline_looks_for_its_primary() -> None:
    """Somebody saw a promotion: every node is looked at, a former primary serves nothing."""
    known = cluster("a")
    assert Refresh(("primary", "a")) == ask(known, read(at(10, timeline=2)))
    failed = ask(known, read(at(10, timeline=2), refreshed=True))
    assert isinstance(failed, Fail)
    assert isinstance(failed.error, NoNodeAvailableError)
    promoted = observed("a", 1010, at=NOW + 1, timeline=2, recovery=False)
    known.record("a", promoted, sample=True)
    known.record("primary", observed("p", 1010, at=NOW + 1, timeline=2))
    followed = read(at(1010, timeline=2), refreshed=True)
    assert ("primary", Reason.CAUGHT_UP) == outcome(ask(known, followed, now=NOW + 1))
    assert "a" == ask(known, read(None, Consistency.STRONG)).node.name


def test_no_replica() -> None:
    """None configured, none known, all excluded: the primary serves."""
    expected = ("primary", Reason.NO_REPLICA)
    assert expected == outcome(ask(cluster(), read()))
    known = cluster("a")
    known.fail("a", "down", NOW)
    assert expected == outcome(ask(known, read(at(1))))
    assert expected == outcome(ask(cluster("a"), read(excluded={"a"})))


def test_primary_down() -> None:
    """With the primary unreachable a replica that satisfies the token serves, whatever its lag."""
    known = cluster("a", "b")
    known.record("b", observed("b", 999, at=NOW + 1))
    asked = read(at(1000), primary_error=ERROR)
    verdict = ask(known, asked, now=NOW + 60)
    assert ("a", Reason.PRIMARY_DOWN) == outcome(verdict)
    assert admits(known, asked, verdict, observed("a", 1000), NOW + 60)
    assert not admits(known, asked, verdict, observed("a", 999), NOW + 60)


def test_primary_down_takes_more_than_one_failed_probe() -> None:
    """One failure is no outage: the read tries the primary; the open breaker says it is down."""
    known = cluster("a")
    later = NOW + 60
    asked = read(at(1000), refreshed=True)
    for _ in range(2):
        known.fail("primary", "lost", later)
        assert ("primary", Reason.LAG_EXCEEDED) == outcome(ask(known, asked, now=later))
    known.fail("primary", "lost", later)
    assert ("a", Reason.PRIMARY_DOWN) == outcome(ask(known, asked, now=later))


def test_with_the_primary_down_only_session_levels_forgo_the_bound() -> None:
    """``bounded(seconds)`` promises nothing but its bound, so it is kept."""
    known = cluster("a")
    asked = read(None, Consistency.bounded(2.0), primary_error=ERROR, refreshed=True)
    assert isinstance(ask(known, asked, now=NOW + 60), Fail)


def test_with_the_primary_down_and_no_token_reached() -> None:
    """First the wait, then `ReplayTimeoutError` with the position and the time."""
    known = cluster("a")
    asked = read(at(2000), primary_error=ERROR)
    assert isinstance(ask(known, asked), Wait)
    asked.waited, asked.waiting_since, asked.waited_seconds = True, 0.0, 0.25
    failed = ask(known, asked)
    assert isinstance(failed, Fail)
    assert isinstance(failed.error, ReplayTimeoutError)
    assert (Position(SYSTEM, 1, Lsn(2000)), 0.25) == (
        failed.error.position,
        failed.error.waited_seconds,
    )


def test_a_replica_on_a_newer_timeline_is_the_word_of_a_primary_that_is_looked_for_once() -> None:
    """Of the nodes that are unknown, but for the primary that has just failed; then it is over."""
    known = cluster("a", "b", "c")
    for name in ("primary", "b"):
        known.fail(name, "lost", NOW)
    asked = read(at(1000), primary_error=ERROR, waited=True, waiting_since=0.0)
    asked.excluded = {"c"}
    known.record("a", observed("a", at=NOW + 1.0, timeline=2))
    assert Refresh(("b",)) == ask(known, asked, now=NOW + 1.0)
    asked.refreshed = True
    assert isinstance(ask(known, asked, now=NOW + 1.0), Fail)
    known.record("b", observed("b", at=NOW + 1.0, timeline=2))
    asked.refreshed = False
    assert isinstance(ask(known, asked, now=NOW + 1.0), Fail)


def test_a_pin_that_ended_while_the_primary_is_down_is_not_forgotten() -> None:
    """Without a lag bound a replica must show a moment after the end of the pin."""
    known = cluster("a")
    until = UNIX_NOW - 10
    asked = read(Token(pin_until=until), primary_error=ERROR, refreshed=True)
    assert isinstance(ask(known, asked, now=NOW + 11.0), Fail)
    assert ("a", Reason.PRIMARY_DOWN) == outcome(ask(known, asked, now=NOW + 9.0))


def test_of_several_replicas_with_the_primary_down_the_furthest_serves() -> None:
    """Without a lag to go by, the replica that has replayed most."""
    known = cluster("a", "b", "c")
    known.record("b", observed("b", 1200, at=NOW + 1))
    asked = read(primary_error=ERROR, preferred="a")
    names = {ask(known, asked, now=NOW + 60).node.name for _ in range(10)}
    assert names == {"b"}


# Not knowing is not YES


@pytest.mark.parametrize(
    "unknown",
    [
        observed("a", None),
        observed("a", 9999, timeline=None, started="2"),
        observed("a", 9999, timeline=2),
        observed("a", 9999, system=8),
        observed("a", 9999, recovery=False, system=8),
    ],
    ids=["NULL lsn", "NULL timeline", "other timeline", "other system", "other primary"],
)
def test_a_replica_that_is_not_proven_never_serves(unknown: Observation) -> None:
    """NULL, another timeline or another system is not reached, whatever the numbers say."""
    known = cluster("a")
    known.fail("a", "down", NOW - 1)
    known.record("a", unknown)
    asked = read(at(500), waited=True, refreshed=True, waiting_since=0.0)
    assert outcome(ask(known, asked))[0] == "primary"
    asked.primary_error = ERROR
    assert isinstance(ask(known, asked), Fail)
    for reason in (Reason.CAUGHT_UP, Reason.PRIMARY_DOWN):
        serve = Serve(known.nodes["a"], reason, 0.0, Position(SYSTEM, 1, Lsn(500)))
        assert not admits(known, asked, serve, unknown, NOW)


def test_a_replica_without_a_lag_is_not_within_it() -> None:
    """Before the first sample of the primary the lag is unknown, and unknown is over the limit."""
    known = Cluster(["primary", "a"], Settings.of({}))
    known.record("primary", observed("p", recovery=False))
    known.record("a", observed("a"))
    assert ("primary", Reason.LAG_EXCEEDED) == outcome(ask(known, read(refreshed=True)))
    assert ("a", Reason.WITHIN_LAG) == outcome(ask(known, read(None, Consistency.EVENTUAL)))


def test_before_the_primary_was_ever_seen() -> None:
    """At a cold start only the token can tell which system is meant, and the lag is unknown."""
    known = Cluster(["primary", "a"], Settings.of({}))
    known.record("a", observed("a"))
    assert ("primary", Reason.NO_REPLICA) == outcome(ask(known, read()))
    down: dict[str, Any] = {"primary_error": ERROR, "waited": True, "refreshed": True}
    assert isinstance(ask(known, read(**down)), Fail)
    assert ("a", Reason.PRIMARY_DOWN) == outcome(ask(known, read(at(1000), **down)))
    assert isinstance(ask(known, read(at(10, system=8), **down)), Fail)
    two = at(10).merge(at(10, system=8))
    assert isinstance(ask(known, read(two, **down)), Fail)


def test_a_full_token_without_our_position_needs_the_primary() -> None:
    """A full token may have lost the position of this system."""
    eight = Token([Position(2**63 + number, 1, Lsn(1)) for number in range(8)])
    assert ("primary", Reason.PRIMARY_REQUIRED) == outcome(ask(cluster("a"), read(eight)))
    seven = Token(list(eight.positions.values())[1:])
    assert ("a", Reason.WITHIN_LAG) == outcome(ask(cluster("a"), read(seven)))


def test_two_primaries_of_one_timeline_serve_nothing_but_eventual_reads() -> None:
    """No number tells the branches apart, so nobody is the primary and no replica is proven."""
    known = cluster("a", "b")
    known.record("b", observed("b", recovery=False, started="9", at=NOW + 0.1))
    failed = ask(known, read(at(10), waited=True))
    assert isinstance(failed, Fail)
    assert "primary and b" in str(failed.error)
    assert "primary and b" in no_primary(known)
    assert isinstance(ask(known, read()), Fail)
    assert isinstance(ask(known, read(None, Consistency.bounded(5))), Fail)
    assert ("a", Reason.WITHIN_LAG) == outcome(ask(known, read(None, Consistency.EVENTUAL)))


# Admission of a connection


def test_the_primarys_connection_must_be_of_the_primary() -> None:
    """A connection that turns out to be a standby's, a stranger's or a former primary's is none."""
    known = cluster("a", primary=observed("p", timeline=2, recovery=False))
    asked = read(None, Consistency.STRONG)
    serve = ask(known, asked)
    cases = {
        "itself": observed("p", timeline=2, recovery=False),
        "standby": observed("p", timeline=2),
        "stranger": observed("p", timeline=2, recovery=False, system=8),
        "former": observed("p", timeline=1, recovery=False),
    }
    admitted = {what: admits(known, asked, serve, seen, NOW) for what, seen in cases.items()}
    assert {"itself": True, "standby": False, "stranger": False, "former": False} == admitted


def test_a_replicas_connection_must_keep_the_bound() -> None:
    """The server behind the connection is judged like the node: position, lag, role."""
    known = cluster("a")
    asked = read(at(950))
    serve = ask(known, asked)
    assert admits(known, asked, serve, observed("a", 950), NOW)
    assert not admits(known, asked, serve, observed("a", 949), NOW)
    assert admits(known, asked, serve, observed("a", 960), NOW + 1.0)
    assert not admits(known, asked, serve, observed("a", 960), NOW + 1.5)
    assert not admits(known, asked, serve, observed("a", 1000, recovery=False), NOW)


# Hidden servers


def test_an_endpoint_that_hides_servers_is_asked() -> None:
    """One of its servers may serve though the newest observed does not; refused, it is left."""
    known = cluster("a", primary=observed("p", 1010, recovery=False))
    known.record("a", observed("other", 500, at=NOW + 1))
    verdict = ask(known, read(at(1005)))
    assert ("a", Reason.CAUGHT_UP) == outcome(verdict)
    assert verdict.ask
    known.nodes["a"].servers.pop((SYSTEM, "a", 5432))
    assert isinstance(ask(known, read(at(1005), waiting_since=0.0)), Wait)


def test_a_refused_node_is_left_and_still_counts_as_healthy() -> None:
    """Connections that could not serve leave the node out, and the read may wait for it."""
    known = cluster("a", "b")
    assert ("b", Reason.CAUGHT_UP) == outcome(ask(known, read(at(1000), refused={"a"})))
    assert isinstance(ask(known, read(at(1000), refused={"a", "b"})), Wait)


# Balance


def count(known: Cluster, asked: Read, times: int = 4000) -> Counter[str]:
    """Decide many times."""
    random = Random(3)
    return Counter(ask(known, asked, random=random.random).node.name for _ in range(times))


def test_idle_replicas_share_by_weight() -> None:
    """With nothing in flight the shares follow the weights."""
    counted = count(cluster("a", "b", weights={"a": 3.0}), read())
    assert counted["a"] / 4000 == pytest.approx(0.75, abs=0.03)
    even = count(cluster("a", "b", "c"), read())
    assert [each / 4000 for each in even.values()] == pytest.approx([1 / 3] * 3, abs=0.03)


def test_the_less_loaded_of_two_is_preferred() -> None:
    """Power of two choices: a loaded replica is taken only when both draws are it."""
    known = cluster("a", "b")
    known.nodes["a"].in_flight = 5
    assert count(known, read())["a"] / 4000 == pytest.approx(0.25, abs=0.03)


def test_load_is_seen_by_weight() -> None:
    """Four reads on a node of weight four are less than two on one of weight one."""
    known = cluster("a", "b", weights={"a": 4.0})
    known.nodes["a"].in_flight, known.nodes["b"].in_flight = 4, 2
    assert count(known, read())["b"] / 4000 == pytest.approx(0.04, abs=0.02)


def test_the_sessions_node_is_preferred_while_it_is_eligible() -> None:
    """One replica per unit of work, however loaded, until it does not satisfy the read."""
    known = cluster("a", "b", "c")
    known.nodes["b"].in_flight = 50
    assert {"b": 4000} == count(known, read(preferred="b"))
    assert "b" not in count(known, read(preferred="b", excluded={"b"}))
    known.record("b", observed("b", 900, at=NOW + 0.01))
    assert "b" not in count(known, read(at(1000), preferred="b"))


# A read that may be stale


def test_the_stale_read_takes_the_least_lag() -> None:
    """Flagged as stale, of our system only, and never a node that was tried."""
    known = cluster("a", "b", "c")
    known.record("a", observed("a", 900, at=NOW + 0.1))
    known.record("c", observed("c", 9999, at=NOW + 0.1, system=8))
    random = Random(1).random
    serve = decide_stale(known, read(at(5000)), Reason.NOT_CAUGHT_UP, NOW, random)
    assert serve is not None
    assert ("b", True, None) == (serve.node.name, serve.stale, serve.required)
    assert admits(known, read(at(5000)), serve, observed("b", 1), NOW)
    assert not admits(known, read(at(5000)), serve, observed("b", 1, system=8), NOW)
    second = decide_stale(known, read(excluded={"b"}), Reason.NOT_CAUGHT_UP, NOW, random)
    assert second is not None
    assert second.node.name == "a"
    third = read(excluded={"a", "b"})
    assert decide_stale(known, third, Reason.NOT_CAUGHT_UP, NOW, random) is None


def test_an_infinite_lag_is_shown_as_unknown() -> None:
    """A route never carries infinity."""
    known = Cluster(["primary", "a"], Settings.of({}))
    known.record("primary", observed("p", recovery=False))
    known.record("a", observed("a"))
    assert known.lag_seconds(observed("a"), NOW) == math.inf
    assert ask(known, read(None, Consistency.EVENTUAL)).lag_seconds is None
