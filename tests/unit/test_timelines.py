"""Timelines: what a history proves, how it is learned, and what a server was seen to follow."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsn_consistency import Position
from lsn_consistency._cluster import Cluster
from lsn_consistency._nodes import MAX_SERVERS_PER_NODE, Node
from lsn_consistency._observation import Observation, Server
from lsn_consistency._settings import Settings
from lsn_consistency._snapshot import snapshot
from lsn_consistency._timelines import MAX_HISTORIES, Timelines
from lsn_consistency.exceptions import InvalidLsnError
from lsn_consistency.lsn import Lsn, TimelineHistory

SYSTEM = 7
REASON = "no recovery target specified"


def server(place: str = "a", *, system: int = SYSTEM, started: str = "1") -> Server:
    return Server(system, place, 5432, started)


def at(timeline: int, lsn: int, *, system: int = SYSTEM) -> Position:
    return Position(system, timeline, Lsn(lsn))


def observed(
    place: str = "a",
    *,
    timeline: int | None = 1,
    lsn: int = 1000,
    at: float = 10.0,
    recovery: bool = True,
    started: str = "1",
    system: int = SYSTEM,
    **kept: Any,
) -> Observation:
    """Observe a standby, or a primary with ``recovery=False``."""
    who = server(place, system=system, started=started)
    return Observation(who, recovery, timeline, Lsn(lsn), at, at + 0.001, **kept)


def promoted(timeline: int = 2, switch: int | None = 1000, **kept: Any) -> Observation:
    """Observe a server that was promoted: its replay stands still where recovery ended."""
    kept = {"lsn": 1040, "at": 11.0, **kept}
    point = None if switch is None else Lsn(switch)
    return observed(timeline=timeline, recovery=False, switch_point=point, **kept)


# Reading a history


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"1\t0/3000000\t{REASON}\n", {1: 0x3000000}),
        (f"1\t0/3000000\t{REASON}", {1: 0x3000000}),
        (f"1\t0/3000000\t{REASON}\n\n2\t0/4000000\t{REASON}\n\n", {1: 0x3000000, 2: 0x4000000}),
        (f"# a comment\n  # another\n\n1\t0/3000000\t{REASON}\n", {1: 0x3000000}),
        (f"1\t0/3000000\t{REASON}\r\n2\t0/4000000\t{REASON}\r\n", {1: 0x3000000, 2: 0x4000000}),
        (f"1\t0/03000000\t{REASON}\n", {1: 0x3000000}),
        (f"1\t00000016/B374D848\t{REASON}\n", {1: 0x16_B374D848}),
        ("1 0/3000000\n", {1: 0x3000000}),
        (f" 1  0/3000000  {REASON} # not a comment\n", {1: 0x3000000}),
        ('1\t0/3000000\tat restore point "7\t0/9 # 8"\n', {1: 0x3000000}),
        ('1\t0/3000000\tat restore point "a\x0b2\t0/1\x0c\x85\u2028b"\n', {1: 0x3000000}),
        (f"2\t0/3000000\t{REASON}\n5\t0/4000000\t{REASON}\n", {2: 0x3000000, 5: 0x4000000}),
    ],
    ids=[
        "one line",
        "no end of line",
        "empty lines, as PostgreSQL writes them",
        "comments",
        "CRLF",
        "padded",
        "padded twice",
        "no reason",
        "spaces",
        "a reason that looks like a line",
        "a reason with other ends of lines",
        "gaps",
    ],
)
def test_a_history_is_read(text: str, expected: dict[int, int]) -> None:
    """Each line is an ancestor and where it was left; the history is complete."""
    history = TimelineHistory.parse(9, text)
    assert (9, expected, True) == (
        history.timeline,
        dict(history.switch_points),
        history.complete,
    )
    assert all(type(each) is Lsn for each in history.switch_points.values())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "# nothing\n",
        "1\n",
        "one\t0/3000000\n",
        "-1\t0/3000000\n",
        "+1\t0/3000000\n",
        "1.0\t0/3000000\n",
        "\u0661\t0/3000000\n",
        "0\t0/3000000\n",
        "3\t0/3000000\n",
        "4\t0/3000000\n",
        "12345678901\t0/3000000\n",
        "1\t0-3000000\n",
        "1\t3000000\n",
        "1\t0/3000000000\n",
        "1\t\n",
        "1\t0/1\n1\t0/2\n",
        "2\t0/2\n1\t0/1\n",
        "1\t0/1\n<html>not found</html>\n",
    ],
    ids=repr,
)
def test_what_is_no_history_is_refused(text: str) -> None:
    """A line that is none, an ancestor that cannot be one, an order that is none: `ValueError`."""
    with pytest.raises(ValueError, match=r"history of timeline 3|LSN"):
        TimelineHistory.parse(3, text)


def test_a_bad_position_is_named() -> None:
    """`InvalidLsnError` carries the text that is none."""
    with pytest.raises(InvalidLsnError) as refused:
        TimelineHistory.parse(3, "1\t16-B374D848\n")
    assert "16-B374D848" == refused.value.text


# What a history proves

HISTORY = TimelineHistory.parse(4, "1\t0/1000\n3\t0/2000\n")


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (at(4, 0), True),
        (at(4, 0x9999), True),
        (at(1, 0x0FFF), True),
        (at(1, 0x1000), True),
        (at(1, 0x1001), False),
        (at(3, 0x1FFF), True),
        (at(3, 0x2000), True),
        (at(3, 0x2001), False),
        (at(2, 1), False),
        (at(5, 1), False),
    ],
    ids=repr,
)
def test_contains(position: Position, expected: bool) -> None:
    """Its own timeline whole, an ancestor up to the byte where it was left, a sibling never."""
    assert HISTORY.contains(position) is expected


def test_what_an_incomplete_history_does_not_name_is_unknown() -> None:
    """An older timeline may be an ancestor that is not known; a newer one cannot be."""
    partial = TimelineHistory(4, MappingProxyType({3: Lsn(0x2000)}), complete=False)
    answers = [partial.contains(at(timeline, 0x1800)) for timeline in (1, 2, 3, 4, 5)]
    assert [None, None, True, True, False] == answers
    assert partial.contains(at(3, 0x2001)) is False


def test_a_history_goes_on_with_a_promotion() -> None:
    """The new timeline has what the old one had, up to the switch point."""
    continued = HISTORY.continued(6, Lsn(0x3000))
    expected = {1: 0x1000, 3: 0x2000, 4: 0x3000}
    assert (6, expected, True) == (
        continued.timeline,
        dict(continued.switch_points),
        continued.complete,
    )
    assert [True, False] == [continued.contains(at(4, lsn)) for lsn in (0x3000, 0x3001)]
    partial = replace(HISTORY, complete=False).continued(6, Lsn(0x3000))
    assert partial.contains(at(2, 1)) is None


def test_a_standby_promoted_before_an_earlier_switch_point_has_less_of_all() -> None:
    """It knew of timelines that it had not reached: their part of its log ends where it stood."""
    continued = HISTORY.continued(6, Lsn(0x0800))
    assert {1: 0x0800, 3: 0x0800, 4: 0x0800} == dict(continued.switch_points)
    assert [True, False] == [continued.contains(at(1, lsn)) for lsn in (0x0800, 0x0801)]
    between = HISTORY.continued(6, Lsn(0x1800))
    assert {1: 0x1000, 3: 0x1800, 4: 0x1800} == dict(between.switch_points)


def test_a_file_that_names_an_earlier_end_later_is_read_like_that() -> None:
    """PostgreSQL copies the parent's lines as they are: 18.6 wrote this one for such a standby."""
    history = TimelineHistory.parse(3, f"1\t0/5330F80\t{REASON}\n\n2\t0/5020E88\t{REASON}\n")
    assert {1: 0x5020E88, 2: 0x5020E88} == dict(history.switch_points)
    assert [True, False] == [history.contains(at(1, lsn)) for lsn in (0x5020E88, 0x5020E89)]


class Branch:
    """Be a timeline: every byte of its log, named by the timeline that wrote it."""

    def __init__(self, timeline: int, log: list[int]) -> None:
        self.timeline = timeline
        self.log = log

    def has(self, timeline: int, lsn: int) -> bool:
        """Tell whether the byte before ``lsn`` is here and was written by ``timeline``."""
        return lsn <= len(self.log) and self.log[lsn - 1] == timeline


@given(ends=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=5))
def test_a_history_never_proves_what_is_not_there(ends: list[tuple[int, int]]) -> None:
    """Whatever promotions, far or near: contained is exactly what the log has of a timeline."""
    branch = Branch(1, [1] * 12)
    written = {1: branch}
    history = TimelineHistory(1, MappingProxyType({}))
    for number, (end, more) in enumerate(ends, start=2):
        end = min(end, len(branch.log))
        history = history.continued(number, Lsn(end))
        branch = Branch(number, branch.log[:end] + [number] * more)
        written[number] = branch
    for timeline, former in written.items():
        for lsn in range(1, len(former.log) + 1):
            if former.log[lsn - 1] == timeline:
                # A position is of the timeline that wrote it.
                assert branch.has(timeline, lsn) is history.contains(at(timeline, lsn))


# What is learned


def complete(timeline: int, **switch_points: int) -> TimelineHistory:
    """Make a complete history: ``t1=1000`` says that timeline 1 was left at 1000."""
    points = {int(name[1:]): Lsn(lsn) for name, lsn in switch_points.items()}
    return TimelineHistory(timeline, MappingProxyType(points))


def test_the_first_timeline_has_no_ancestors_and_others_are_unknown() -> None:
    """What was never learned is unknown, not empty."""
    known = Timelines()
    assert known.history(SYSTEM, 1).complete
    assert known.contains(1, at(1, 10**9)) is True
    assert known.contains(2, at(1, 1)) is None
    assert known.contains(2, at(2, 10**9)) is True
    assert known.contains(2, at(3, 1)) is False


def test_histories_of_systems_are_apart() -> None:
    """A timeline's number means nothing without the system."""
    known = Timelines()
    known.learn(server(), complete(2, t1=1000))
    assert known.contains(2, at(1, 1000)) is True
    assert known.contains(2, at(1, 1000, system=8)) is None


def test_a_complete_history_is_kept() -> None:
    """What is partly known does not replace what is known; a complete one replaces both."""
    known = Timelines()
    partial = TimelineHistory(3, MappingProxyType({2: Lsn(2000)}), complete=False)
    known.learn(server(), partial)
    assert known.contains(3, at(1, 5)) is None
    known.learn(server(), complete(3, t1=1000, t2=2000))
    known.learn(server(), partial)
    assert known.contains(3, at(1, 5)) is True
    known.learn(server(), complete(3, t1=3, t2=2000))
    assert known.contains(3, at(1, 5)) is False


def test_memory_of_histories_is_bounded() -> None:
    """However many promotions there are, only the newest are remembered."""
    known = Timelines()
    for timeline in range(2, 500):
        known.learn(server(), complete(timeline, t1=1000))
    kept = [each for each in range(2, 500) if known.history(SYSTEM, each).complete]
    assert list(range(500 - MAX_HISTORIES, 500)) == kept


def test_a_promotion_that_is_watched_tells_the_switch_point() -> None:
    """The replay position of the promoted server stands where the old timeline was left."""
    known = Timelines()
    known.watch(observed(), promoted(switch=1000))
    assert {1: 1000} == dict(known.history(SYSTEM, 2).switch_points)
    assert known.history(SYSTEM, 2).complete
    assert [True, False] == [known.contains(2, at(1, lsn)) for lsn in (1000, 1001)]


def test_a_chain_of_watched_promotions_is_complete() -> None:
    """Each history continues the one before; one missing link leaves the rest unknown."""
    known = Timelines()
    known.watch(observed(), promoted(2, 1000))
    known.watch(observed("b", timeline=2), promoted(3, 2000, place="b"))
    assert {1: 1000, 2: 2000} == dict(known.history(SYSTEM, 3).switch_points)
    assert known.history(SYSTEM, 3).complete
    late = Timelines()
    late.watch(observed("b", timeline=2), promoted(3, 2000, place="b"))
    assert [None, True, False] == [
        late.contains(3, each) for each in (at(1, 1), at(2, 2000), at(2, 2001))
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (observed(), promoted(started="2")),
        (observed("b"), promoted()),
        (observed(system=8), promoted()),
        (observed(recovery=False), promoted()),
        (observed(), observed(timeline=2, switch_point=Lsn(1000))),
        (observed(timeline=None), promoted()),
        (observed(), promoted()._replace(timeline=None)),
        (observed(), promoted(switch=None)),
        (observed(), promoted(3)),
        (observed(timeline=2), promoted(2)),
        (observed(timeline=3), promoted(2)),
        (observed(pooled=True), promoted(pooled=True)),
        (observed(), promoted(pooled=True)),
    ],
    ids=[
        "restarted",
        "another server",
        "another system",
        "a primary before",
        "a standby still",
        "unknown before",
        "unknown after",
        "no switch point",
        "a number in between",
        "the same timeline",
        "an older timeline",
        "a pooler, which outlives a crash",
        "a pooler afterwards",
    ],
)
def test_what_was_not_watched_from_end_to_end_is_not_learned(
    before: Observation, after: Observation
) -> None:
    """Only the same running server, and no timeline's number in between, prove the ancestor."""
    known = Timelines()
    known.watch(before, after)
    assert [None, None] == [known.contains(each, at(1, 1)) for each in (2, 3)]


# Positions in a timeline's own part


def leading(
    lsn: int | None, *, timeline: int | None = 2, place: str = "n", started: str = "1"
) -> Observation:
    """Observe a primary at a position."""
    seen = observed(
        place, timeline=timeline, recovery=False, begun_timeline=timeline, started=started
    )
    return seen._replace(lsn=None if lsn is None else Lsn(lsn))


def test_on_the_first_timeline_every_position_is_its_own() -> None:
    """There is nothing before it."""
    known = Timelines()
    assert at(1, 5) == known.own_position(observed(), Lsn(5))
    assert known.own_position(observed(), None) is None
    assert known.own_position(observed(timeline=None), Lsn(5)) is None


def test_after_a_restartpoint_on_a_timeline_positions_are_its_own() -> None:
    """It was replayed, so the shared part is past."""
    known = Timelines()
    begun = observed(timeline=3, begun_timeline=3)
    assert at(3, 5) == known.own_position(begun, Lsn(5))
    assert at(2, 5) == known.own_position(leading(5), Lsn(5))


@pytest.mark.parametrize("begun", [None, 1])
def test_in_the_shared_part_a_position_is_raised_or_unknown(begun: int | None) -> None:
    """(2, 5) from before the switch point would outrank (1, 900), and stand for less."""
    known = Timelines()
    follows = observed(timeline=2, begun_timeline=begun)
    assert known.own_position(follows, Lsn(5)) is None
    known.lead(leading(1040))
    assert [at(2, 1040), at(2, 1040), at(2, 1041)] == [
        known.own_position(follows, Lsn(lsn)) for lsn in (5, 1040, 1041)
    ]
    other = follows._replace(server=server(system=8))
    assert known.own_position(other, Lsn(5)) is None
    assert known.own_position(follows._replace(timeline=3), Lsn(5)) is None


def test_a_known_history_says_where_a_timeline_begins() -> None:
    """The last switch point, exactly: what is beyond it is the timeline's own."""
    known = Timelines()
    known.lead(leading(1040, timeline=3))
    known.learn(server("n"), complete(3, t1=1000, t2=1010))
    follows = observed(timeline=3, begun_timeline=1)
    assert [at(3, 1010), at(3, 1010), at(3, 1011)] == [
        known.own_position(follows, Lsn(lsn)) for lsn in (5, 1010, 1011)
    ]


def test_the_least_that_a_primary_had_is_enough() -> None:
    """It comes back from a crash a little behind: nobody is sent beyond its end."""
    known = Timelines()
    for lsn in (1040, 1020, 1060):
        known.lead(leading(lsn))
    assert at(2, 1020) == known.own_position(observed(timeline=2), Lsn(5))


def test_a_primary_without_a_position_raises_nothing() -> None:
    """NULL tells of no beginning."""
    known = Timelines()
    known.lead(leading(None))
    known.lead(leading(1040, timeline=None))
    assert known.own_position(observed(timeline=2), Lsn(5)) is None


def test_memory_of_beginnings_is_bounded() -> None:
    """However many promotions there are."""
    known = Timelines()
    for timeline in range(2, 500):
        known.lead(leading(1000 + timeline, timeline=timeline))
    told = [
        timeline
        for timeline in range(2, 500)
        if known.own_position(observed(timeline=timeline), Lsn(5)) is not None
    ]
    assert list(range(500 - MAX_HISTORIES, 500)) == told


def test_another_leader_of_the_same_number_ends_what_was_known() -> None:
    """The history and the beginning of one promotion say nothing of the other."""
    known = Timelines()
    known.learn(server("n"), complete(2, t1=1000))
    known.lead(leading(1040))
    known.lead(leading(1100))
    assert known.contains(2, at(1, 1000)) is True
    known.lead(leading(940, place="m", started="9"))
    assert known.contains(2, at(1, 1000)) is None
    assert at(2, 940) == known.own_position(observed(timeline=2), Lsn(5))


@pytest.mark.parametrize(
    "same", [server("n", started="2"), server("10.0.0.1"), server("n")], ids=repr
)
def test_a_leader_that_is_restarted_or_reached_elsewhere_is_the_same(same: Server) -> None:
    """One server may be listed twice, under a socket and an address."""
    known = Timelines()
    known.learn(server("n"), complete(2, t1=1000))
    known.lead(leading(1040)._replace(server=same))
    assert known.contains(2, at(1, 1000)) is True


# What a server was seen to follow


def test_a_standby_goes_on_to_newer_timelines_and_never_back() -> None:
    """What it said of its timeline holds when it can say less, and is not certain then."""
    node = Node("a", 1.0, 3)
    node.take(observed(timeline=2, timeline_is_certain=True))
    less = observed(timeline=1, lsn=1500, timeline_is_certain=False)
    nothing = observed(timeline=None, timeline_is_certain=False)
    for each in (less, nothing):
        completed = node.completed(each)
        assert (2, False, each.lsn) == (
            completed.timeline,
            completed.timeline_is_certain,
            completed.lsn,
        )
    more = observed(timeline=3, timeline_is_certain=False)
    assert node.completed(more) is more


def test_what_is_no_more_than_a_lower_bound_is_not_remembered() -> None:
    """Nothing is made of an uncertain timeline, which needs no memory: it only grows."""
    node = Node("a", 1.0, 3)
    node.take(observed(timeline=2, timeline_is_certain=False))
    assert 1 == node.completed(observed(timeline=1, timeline_is_certain=False)).timeline


def test_what_a_server_followed_says_nothing_of_others() -> None:
    """Not of another server behind the endpoint, nor of the same one after a restart."""
    node = Node("a", 1.0, 3)
    node.follows(server(), 2)
    assert 2 == node.completed(observed(timeline=1)).timeline
    for other in (observed("b"), observed(started="2"), observed(system=8)):
        assert node.completed(other) is other


def test_a_primary_says_itself_on_which_timeline_it_is() -> None:
    """Its own word is exact, whatever was known of it as a standby."""
    node = Node("a", 1.0, 3)
    node.follows(server(), 3)
    primary = observed(timeline=2, recovery=False)
    assert node.completed(primary) is primary
    node.take(primary._replace(timeline=9, sent_at=11.0))
    assert 3 == node.completed(observed(timeline=1)).timeline


def test_a_timeline_that_is_followed_is_not_lowered() -> None:
    """A late answer with an older timeline changes nothing."""
    node = Node("a", 1.0, 3)
    for timeline in (3, 2, 1):
        node.follows(server(), timeline)
    assert 3 == node.completed(observed(timeline=1)).timeline


def test_memory_of_followed_timelines_is_bounded() -> None:
    """The servers that were heard of last are kept."""
    node = Node("a", 1.0, 3)
    for number in range(100):
        node.follows(server(f"s{number}"), 2)
    node.follows(server("s90"), 3)
    for number in range(100, 100 + MAX_SERVERS_PER_NODE - 1):
        node.follows(server(f"s{number}"), 2)
    assert len(node.timelines) == MAX_SERVERS_PER_NODE
    assert 3 == node.completed(observed("s90")).timeline
    assert 1 == node.completed(observed("s99")).timeline


def test_a_failure_does_not_forget_what_a_server_followed() -> None:
    """The server is the same when it answers again; a restarted one is another."""
    node = Node("a", 1.0, 3)
    node.take(observed(timeline=2))
    node.fail("lost", 11.0)
    assert 2 == node.completed(observed(timeline=1)).timeline


# What the cluster takes and asks for


def cluster() -> Cluster:
    """Build a cluster of a primary and two standbys, all on timeline 1."""
    made = Cluster(["primary", "a", "b"], Settings.of({}))
    made.record("primary", observed("p", recovery=False), sample=True)
    for name in ("a", "b"):
        made.record(name, observed(name))
    return made


def test_the_monitors_own_two_observations_tell_of_a_promotion() -> None:
    """Only with what the monitor saw before over the same connection."""
    known = cluster()
    known.record("a", promoted(), sample=True)
    assert known.timelines.contains(2, at(1, 1)) is None
    watched = cluster()
    watched.record("a", promoted(), sample=True, before=observed())
    assert watched.timelines.contains(2, at(1, 1000)) is True
    assert (watched.nodes["a"], 2) == (watched.primary, watched.timeline)


def test_what_was_known_of_the_standby_before_its_promotion_counts() -> None:
    """The observation before may have said less than was known: the ancestor is the known one."""
    known = cluster()
    known.learn("a", server(), 2, None)
    known.record("a", promoted(3), before=observed(timeline=1, timeline_is_certain=False))
    assert [None, True] == [known.timelines.contains(3, at(each, 1000)) for each in (1, 2)]
    other = cluster()
    other.learn("a", server(), 2, None)
    other.record("a", promoted(2), before=observed(timeline=1, timeline_is_certain=False))
    assert other.timelines.contains(2, at(1, 1000)) is None


def test_a_late_observation_is_not_watched() -> None:
    """What is no news says nothing of a promotion either."""
    known = cluster()
    known.fail("a", "lost", 12.0)
    known.record("a", promoted(at=11.5), before=observed())
    assert known.timelines.contains(2, at(1, 1)) is None


def test_who_waits_is_released_by_a_new_timeline() -> None:
    """What was waited for may be elsewhere now, or lost: every read decides anew, once."""
    known = cluster()
    woken: list[int] = []
    for number, timeline in enumerate((1, 2)):
        known.wait_for_position(at(timeline, 5000), lambda number=number: woken.append(number))  # type: ignore[misc]
    known.record("primary", observed("p", recovery=False, at=10.5))
    known.record("b", observed("b", lsn=4999, at=10.5))
    assert [] == woken
    known.record("a", promoted())
    assert [0, 1] == sorted(woken)
    assert 0 == len(known.positions)
    known.record("a", promoted(3, at=12.0))
    assert [0, 1] == sorted(woken)


def test_a_former_primary_releases_nobody() -> None:
    """An older timeline changes nothing for those who wait on the newer one."""
    known = cluster()
    known.record("a", promoted())
    woken: list[int] = []
    known.wait_for_position(at(2, 5000), lambda: woken.append(1))
    known.record("primary", observed("p", recovery=False, lsn=9000, at=12.0))
    known.record("b", observed("b", lsn=9000, at=12.0))
    assert [] == woken


def test_completed_observations_are_what_is_kept_and_what_releases() -> None:
    """A standby that was seen to follow the new timeline releases those who wait on it."""
    known = cluster()
    known.record("a", promoted())
    known.learn("b", server("b"), 2, None)
    woken: list[int] = []
    known.wait_for_position(at(2, 1500), lambda: woken.append(1))
    late = observed("b", lsn=1500, at=12.0, timeline_is_certain=False)
    known.record("b", late)
    assert [1] == woken
    newest = known.nodes["b"].newest
    assert newest is not None
    assert (2, False) == (newest.timeline, newest.timeline_is_certain)
    assert 2 == known.completed("b", late).timeline
    assert 1 == known.completed("a", late).timeline


def test_a_history_is_asked_for_until_it_is_complete() -> None:
    """Of a primary beyond the first timeline, and of no standby."""
    known = cluster()
    assert not known.wants_history(observed(recovery=False))
    assert not known.wants_history(observed(timeline=2))
    assert not known.wants_history(observed(timeline=None, recovery=False))
    assert known.wants_history(promoted())
    partial = TimelineHistory(2, MappingProxyType({}), complete=False)
    known.learn("a", server(), 2, partial)
    assert known.wants_history(promoted())
    known.learn("a", server(), 2, complete(2, t1=1000))
    assert not known.wants_history(promoted())
    assert known.wants_history(promoted(system=8))
    assert known.timelines.contains(2, at(1, 1000)) is True


def test_a_timeline_is_asked_for_while_it_makes_a_difference() -> None:
    """Of a standby that does not say it for certain and may be on a newer one than it says."""
    known = cluster()
    uncertain = observed(timeline_is_certain=False)
    assert not known.wants_timeline(uncertain)
    known.record("b", promoted(place="b"))
    assert known.wants_timeline(uncertain)
    assert known.wants_timeline(uncertain._replace(timeline=None))
    assert not known.wants_timeline(observed())
    assert not known.wants_timeline(uncertain._replace(timeline=2))
    assert not known.wants_timeline(uncertain._replace(in_recovery=False))


def test_without_a_primary_every_uncertain_timeline_is_asked_for() -> None:
    """A promotion may just have happened; what a standby says for certain needs no question."""
    known = cluster()
    uncertain = observed(timeline_is_certain=False)
    known.fail("primary", "lost", 11.0)
    assert known.wants_timeline(uncertain)
    assert not known.wants_timeline(observed())
    known.record("primary", observed("p", recovery=False, at=12.0))
    assert not known.wants_timeline(uncertain)
    known.record("primary", observed("p", at=13.0))
    assert known.primary is None
    assert known.wants_timeline(uncertain)


def test_the_snapshot_tells_of_timelines() -> None:
    """The switch points as far as they are known, and whether a replica's timeline is certain."""
    known = cluster()
    known.record("b", observed("b", at=12.0, timeline_is_certain=False))
    known.record("a", promoted(), before=observed())

    def shown() -> dict[str, tuple[Any, Any, Any]]:
        return {
            name: (each["timeline"], each["timeline_is_certain"], each["switch_points"])
            for name, each in snapshot(known, 20.0, 0.0).items()
        }

    assert {
        "primary": (1, True, {}),
        "a": (2, True, {1: Lsn(1000)}),
        "b": (1, False, {}),
    } == shown()
    known.record("a", promoted(4, at=13.0))
    known.fail("b", "lost", 14.0)
    assert {"primary": (1, True, {}), "a": (4, True, None), "b": (None, False, None)} == shown()


# Two promotions of one number


def test_the_history_of_one_promotion_says_nothing_of_another_of_the_same_number() -> None:
    """Two standbys promoted without knowing of each other: both are on timeline 2."""
    known = cluster()
    known.record("a", promoted(switch=1000), before=observed())
    assert known.timelines.contains(2, at(1, 1000)) is True
    known.fail("a", "lost", 12.0)
    known.record("b", promoted(place="b", lsn=940, switch=900, at=13.0, started="9"))
    assert known.primary is known.nodes["b"]
    assert known.timelines.contains(2, at(1, 1000)) is None
    assert known.wants_history(promoted(place="b"))


def test_the_same_promotion_keeps_its_history() -> None:
    """A failure and a restart of the promoted server change nothing about where it began."""
    known = cluster()
    known.record("a", promoted(), before=observed())
    known.fail("a", "lost", 12.0)
    known.record("a", promoted(started="2", switch=1010, at=13.0))
    assert known.primary is known.nodes["a"]
    assert [True, False] == [known.timelines.contains(2, at(1, lsn)) for lsn in (1000, 1001)]
