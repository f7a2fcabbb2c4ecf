"""The list behind decisions that are taken at once: it holds nothing that is not known any more."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from lsn_consistency import Consistency, Reason, Token
from lsn_consistency._cluster import Cluster
from lsn_consistency._decision import decide_at_once
from lsn_consistency._shortlist import ROUTE_SECONDS, Candidate
from lsn_consistency.lsn import Lsn, TimelineHistory
from tests.unit.test_decision import NOW, SYSTEM, at, cluster, observed

LATER = NOW + 0.1


def at_once(
    known: Cluster, token: Token | None = None, *, preferred: str | None = None, now: float = NOW
) -> str | None:
    """Name the replica that serves without further questions."""
    level = Consistency.CAUSAL
    random = Random(1).random
    found = decide_at_once(known.listed(), level, token or Token(), preferred, now, random)
    return None if found is None else found[0].node.name


def test_progress_is_known_at_once() -> None:
    """A replica serves what it has reached as soon as that was observed."""
    known = cluster("a", primary=observed("p", 1001, recovery=False))
    assert at_once(known, at(1001)) is None
    known.record("a", observed("a", 1001, at=LATER))
    assert "a" == at_once(known, at(1001), now=LATER)


def test_a_position_that_went_down_is_forgotten() -> None:
    """A new observation replaces the old one, also downwards."""
    known = cluster("a")
    assert "a" == at_once(known, at(1000))
    known.record("a", observed("a", 999, at=LATER))
    assert at_once(known, at(1000), now=LATER) is None


def test_a_failed_node_is_not_listed() -> None:
    """Unknown serves nothing, until it is observed again."""
    known = cluster("a")
    assert "a" == at_once(known, at(1000))
    known.fail("a", "gone", LATER)
    assert at_once(known, at(1000), now=LATER) is None
    known.record("a", observed("a", at=LATER + 0.1))
    assert "a" == at_once(known, at(1000), now=LATER + 0.1)


def test_without_a_primary_the_rules_decide() -> None:
    """What a replica's timeline is worth then is a question of its own."""
    known = cluster("a")
    assert "a" == at_once(known, at(1000))
    known.fail("primary", "gone", LATER)
    assert at_once(known, at(1000), now=LATER) is None
    assert at_once(known, now=LATER) is None


def test_a_promotion_ends_the_list() -> None:
    """Nobody is on the new timeline until it was seen there."""
    known = cluster("a", "b")
    assert at_once(known, at(1000)) is not None
    known.record("a", observed("a", 1000, at=LATER, timeline=2, recovery=False), sample=True)
    assert at_once(known, at(1000), now=LATER) is None
    assert at_once(known, now=LATER) is None


def test_a_timeline_that_is_learned_ends_the_list() -> None:
    """A replication connection may say that a standby has gone on to another timeline."""
    known = cluster("a")
    seen = known.nodes["a"].newest
    assert seen is not None
    assert "a" == at_once(known, at(1000))
    history = TimelineHistory(2, {1: Lsn(500)})
    known.learn("a", seen.server, 2, history)
    known.record("a", observed("a", 1000, at=LATER))
    assert at_once(known, at(1000), now=LATER) is None


def test_the_lag_ends_it_by_itself() -> None:
    """The bound counts the age of the observation: no new one is needed for that."""
    known = cluster("a")
    assert "a" == at_once(known, at(1000), now=NOW + 1.99)
    assert at_once(known, at(1000), now=NOW + 2.01) is None


def test_a_sample_of_the_primary_is_news_of_every_lag() -> None:
    """A replica that has what the primary had just now has no lag any more, and the other way."""
    known = cluster("a")
    assert at_once(known, now=NOW + 3.0) is None
    known.record("primary", observed("p", at=NOW + 2.9, recovery=False), sample=True)
    assert "a" == at_once(known, now=NOW + 3.0)
    known.record("primary", observed("p", 2000, at=NOW + 3.0, recovery=False), sample=True)
    assert "a" == at_once(known, now=NOW + 4.0)
    assert at_once(known, now=NOW + 5.0) is None


@pytest.mark.parametrize("stranger", [{"timeline": None}, {"timeline": 2}], ids=repr)
def test_a_replica_out_of_the_ordinary_leaves_all_to_the_rules(
    stranger: dict[str, int | None],
) -> None:
    """The rules might choose it: then the list would not be all that there is."""
    known = cluster("a", "b")
    assert at_once(known) is not None
    known.record("b", observed("b", at=LATER, timeline=stranger["timeline"], started="2"))
    assert at_once(known, now=LATER) is None


def test_a_former_primary_leaves_the_list_as_it_is() -> None:
    """A server of another system, or a second primary below, is simply not on it."""
    known = cluster("a", "b")
    known.record("b", observed("b", at=LATER, system=SYSTEM + 1))
    assert {"a"} == {at_once(known, at(1000), now=LATER) for _ in range(20)}


def test_progress_of_one_keeps_the_others() -> None:
    """Replacing one candidate changes neither the rest nor the weights."""
    known = cluster("a", "b", "c", weights={"b": 3.0}, primary=observed("p", 2000, recovery=False))
    before = known.listed()
    known.record("b", observed("b", 1500, at=LATER))
    after = known.listed()
    assert after is not before
    assert before.by_name["b"].lsn == 1000
    assert [1000, 1500, 1000] == [after.by_name[name].lsn for name in ("a", "b", "c")]
    random = Random(7).random
    drawn = [after.drawn(1000, LATER, random) for _ in range(4000)]
    counted = Counter(each.node.name for each in drawn if each is not None)
    assert 0.5 < counted["b"] / 4000 < 0.7
    only = {each.node.name for _ in range(50) if (each := after.drawn(1500, LATER, random))}
    assert {"b"} == only


def test_a_route_is_shared_for_a_moment_and_its_lag_is_a_bound() -> None:
    """Its lag is that of the end of this time, and never beyond the limit."""
    known = cluster("a")
    candidate = known.listed().by_name["a"]
    ends, caught_up, within_lag = candidate.renewed(NOW + 1.0)
    assert (Reason.CAUGHT_UP, Reason.WITHIN_LAG) == (caught_up.reason, within_lag.reason)
    assert ends == NOW + 1.0 + ROUTE_SECONDS
    assert caught_up.lag_seconds == pytest.approx(1.0 + ROUTE_SECONDS)
    ends, caught_up, _ = candidate.renewed(NOW + 1.999)
    assert ends == NOW + 2.0
    assert caught_up.lag_seconds == pytest.approx(2.0)


def test_a_new_candidate_has_no_routes() -> None:
    """What is given before the first renewal would be nobody's."""
    node = cluster("a").nodes["a"]
    assert node.newest is not None
    ends, *_ = Candidate(node, node.newest, NOW, 2.0).routes
    assert ends < NOW
