"""After a promotion the router goes on, and no position is taken for one of another timeline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import psycopg
import pytest

from lsn_consistency import Consistency, Lsn, Position, Reason, Token, current_session
from lsn_consistency.events import LostWrite
from lsn_consistency.exceptions import LostWriteError, NoNodeAvailableError
from lsn_consistency.testing import EmbeddedCluster, Node
from tests.cluster.harness import (
    App,
    Kind,
    insert_lsn,
    make_table,
    open_router,
    restartpoints,
    wait_until,
)

pytestmark = pytest.mark.timeout(180)

POLL_SECONDS = 0.2
GRANTS = {
    "plain": "",
    "statistics": "GRANT pg_read_all_stats TO statistics",
    "replication": "ALTER ROLE replication REPLICATION",
}
Opened = Callable[..., AbstractContextManager[App]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedCluster]:
    """Run a cluster whose timelines nobody else depends on, with a role of each privilege."""
    with EmbeddedCluster(replicas=2) as pg:
        for role, grant in GRANTS.items():
            pg.primary.execute(f"CREATE ROLE {role} LOGIN; GRANT CREATE ON SCHEMA public TO {role}")
            if grant:
                pg.primary.execute(grant)
        yield pg


@pytest.fixture
def pg(cluster: EmbeddedCluster) -> EmbeddedCluster:
    """Offer the cluster healed, with a restartpoint: plain roles know all timelines again."""
    cluster.heal()
    restartpoints(cluster)
    return cluster


@pytest.fixture
def items(pg: EmbeddedCluster) -> str:
    """Make an empty table that every role may use."""
    table = make_table(pg, "items")
    pg.primary.execute(f"GRANT ALL ON {table} TO public")
    return table


@pytest.fixture(params=GRANTS)
def role(request: pytest.FixtureRequest) -> str:
    """Run the test with a plain role, with pg_read_all_stats, and with REPLICATION."""
    return str(request.param)


@pytest.fixture
def opened(kind: Kind, pg: EmbeddedCluster, items: str) -> Opened:
    """Offer `open_router` on this cluster as a role that is given by name."""
    return partial(_open, kind, pg)


def _open(kind: Kind, pg: EmbeddedCluster, role: str, **options: Any) -> Any:
    nodes = {name: node.conninfo_for(user=role) for name, node in pg.nodes.items()}
    options = {"poll_interval": POLL_SECONDS, "wait_seconds": 5.0, **options}
    return open_router(kind, pg, primary=nodes.pop("primary"), replicas=nodes, **options)


def _numbers(leader: Node, beyond: Lsn) -> None:
    """Write on the leader until its LSN is greater than one of the abandoned timeline."""
    while insert_lsn(leader) <= beyond + 4096:
        leader.execute("SELECT pg_logical_emit_message(true, 'more', repeat('x', 1000))")


def _lose(app: App, pg: EmbeddedCluster, table: str) -> tuple[Token, Token, Node, Node]:
    """
    Write one row that the failover keeps and one that it loses.

    Return the tokens of both, the new leader and the replica that follows it.
    """
    first, second = pg.replicas.values()
    with app.session():
        app.write(f"INSERT INTO {table} VALUES (1)")
        kept = current_session().token
        pg.wait_caught_up()
        for replica in (first, second):
            replica.stop_replication()
        app.write(f"INSERT INTO {table} VALUES (2)")
        lost = current_session().token
    pg.primary.crash()
    first.promote()
    second.follow(first)
    (position,) = lost.positions.values()
    _numbers(first, position.lsn)
    wait_until(lambda: second.replay_lsn() > position.lsn)
    return kept, lost, first, second


def _wait_followed(app: App, leader: Node) -> None:
    """Wait until the router has seen the new leader."""

    def followed(nodes: dict[str, dict[str, Any]]) -> bool:
        return nodes[leader.name]["role"] == "primary" and bool(nodes[leader.name]["healthy"])

    app.wait_for(followed)


def _wait_watched(app: App, leader: Node) -> None:
    """Wait until the leader's monitor has seen the promotion, and with it the switch point."""
    _wait_followed(app, leader)
    app.wait_for(lambda nodes: bool(nodes[leader.name]["switch_points"]))


def _counts(app: App, table: str, token: Token | None, **options: Any) -> Any:
    with app.session(token):
        answer = app.ask(f"SELECT count(*) FROM {table}", **options)
        return answer, current_session().token


# Following


def test_a_promotion_is_followed_within_two_polls(opened: Opened, pg: EmbeddedCluster) -> None:
    """Writes and reads of the primary go to the promoted server, without a restart."""
    first, second = pg.replicas.values()
    with opened("plain", poll_interval=0.5) as app:
        app.wait_healthy()
        pg.primary.crash()
        first.promote()
        visible = time.monotonic()
        _wait_followed(app, first)
        followed = time.monotonic() - visible
        second.follow(first)
        with app.session():
            app.write("INSERT INTO items VALUES (1)")
            strong = app.ask("SELECT count(*) FROM items", consistency=Consistency.STRONG)
    assert (1, first.port, "replica_1") == (strong.value, strong.port, strong.route.name)
    assert followed < 2 * 0.5


def test_writes_go_on_through_a_failover(opened: Opened, pg: EmbeddedCluster, role: str) -> None:
    """Whoever writes and reads through it sees every write that was acknowledged after it."""
    with opened(role) as app:
        app.wait_healthy()
        answers = []
        for number in range(1, 21):
            if number == 10:
                pg.failover(to="replica_1")
                _wait_followed(app, pg.leader)
            with app.session():
                app.write("INSERT INTO items VALUES (%s)", [number])
                answers.append(app.ask("SELECT count(*) FROM items"))
    assert list(range(1, 21)) == [answer.value for answer in answers]


# Positions of the old timeline


def test_a_lost_write_is_never_looked_for_on_the_new_timeline(
    opened: Opened, pg: EmbeddedCluster, role: str
) -> None:
    """
    The replica is numerically ahead of the lost position, and does not serve it.

    The primary does, at once, and the session gets a position of the new timeline.
    """
    with opened(role) as app:
        app.wait_healthy()
        _, lost, first, second = _lose(app, pg, "items")
        _wait_watched(app, first)
        answer, token = _counts(app, "items", lost)
        events = app.events_of(LostWrite)
        again = app.choose(token)
    (position,) = lost.positions.values()
    assert second.replay_lsn() > position.lsn
    assert (1, first.port, Reason.TIMELINE_CHANGED) == (
        answer.value,
        answer.port,
        answer.route.reason,
    )
    assert 0.0 == answer.route.waited_seconds
    (issued,) = token.positions.values()
    assert position.timeline + 1 == issued.timeline
    # The promotion was watched, so every role knows where the old timeline ended.
    assert [position] == [event.position for event in events]
    assert [True] == [event.switch_point < position.lsn for event in events]
    assert again.reason != Reason.TIMELINE_CHANGED


def test_a_lost_write_is_reported_to_a_process_that_started_after_the_failover(
    opened: Opened, pg: EmbeddedCluster
) -> None:
    """A role with REPLICATION reads the history of the timeline; others are safe without it."""
    with opened("plain") as app:
        app.wait_healthy()
        _, lost, first, _ = _lose(app, pg, "items")
    (position,) = lost.positions.values()
    found = {}
    for role in GRANTS:
        with opened(role) as app:
            wait_until(lambda: app.snapshot()["replica_1"]["healthy"])
            if role == "replication":
                app.wait_for(lambda nodes: nodes["replica_1"]["switch_points"] is not None)
            answer, _ = _counts(app, "items", lost)
            found[role] = [event.position for event in app.events_of(LostWrite)]
        assert (1, first.port, Reason.TIMELINE_CHANGED) == (
            answer.value,
            answer.port,
            answer.route.reason,
        )
    assert {"plain": [], "statistics": [], "replication": [position]} == found


def test_a_position_that_the_new_timeline_has_is_served_by_its_replicas(
    opened: Opened, pg: EmbeddedCluster
) -> None:
    """Proven by the history: the token of the old timeline does not burden the new primary."""
    with opened("replication") as app:
        app.wait_healthy()
        kept, _, first, second = _lose(app, pg, "items")
        _wait_followed(app, first)
        app.wait_for(lambda nodes: (nodes["replica_2"]["lag_seconds"] or 9.0) < 1.0)
        answer, _ = _counts(app, "items", kept)
        lost = app.events_of(LostWrite)
    assert (1, second.port, Reason.CAUGHT_UP) == (answer.value, answer.port, answer.route.reason)
    assert [] == lost


def test_the_end_of_the_old_timeline_is_on_the_new_one_and_the_next_byte_is_not(
    opened: Opened, pg: EmbeddedCluster
) -> None:
    """The fencepost: the switch point itself is proven, one byte more is lost."""
    with opened("replication") as app:
        app.wait_healthy()
        kept, *_ = _lose(app, pg, "items")
        (position,) = kept.positions.values()
        app.wait_for(lambda nodes: position.timeline in (nodes["replica_1"]["switch_points"] or {}))
        end = app.snapshot()["replica_1"]["switch_points"][position.timeline]
        app.wait_for(lambda nodes: (nodes["replica_2"]["lag_seconds"] or 9.0) < 1.0)
        at_end = app.choose(Token([position._replace(lsn=end)]))
        beyond = app.choose(Token([position._replace(lsn=Lsn(end + 1))]))
    assert ("replica_2", Reason.CAUGHT_UP) == (at_end.name, at_end.reason)
    assert ("replica_1", Reason.TIMELINE_CHANGED) == (beyond.name, beyond.reason)


def test_a_replica_that_follows_the_new_primary_is_used(
    opened: Opened, pg: EmbeddedCluster, role: str
) -> None:
    """With a grant at once; a plain role knows it after a restartpoint, and is safe until then."""
    with opened(role) as app:
        app.wait_healthy()
        leader = pg.failover(to="replica_1")
        _wait_followed(app, leader)
        with app.session():
            app.write("INSERT INTO items VALUES (1)")
            token = current_session().token
        if role == "plain":
            early, _ = _counts(app, "items", token, consistency=Consistency.READ_YOUR_WRITES)
            assert (1, leader.port) == (early.value, early.port)
            restartpoints(pg)
        others = {"primary", "replica_2"}
        app.wait_for(lambda nodes: all((nodes[n]["lag_seconds"] or 9) < 1.0 for n in others))
        answers = [_counts(app, "items", token)[0] for _ in range(40)]
    ports = {pg.nodes[name].port for name in others}
    assert {(1, Reason.CAUGHT_UP)} == {(each.value, each.route.reason) for each in answers}
    assert {each.port for each in answers} <= ports


def test_a_replica_left_on_the_old_timeline_serves_no_token(
    opened: Opened, pg: EmbeddedCluster, role: str
) -> None:
    """It has the lost write itself, and is on a branch that nobody writes to any more."""
    first, second = pg.replicas.values()
    with opened(role) as app:
        app.wait_healthy()
        with app.session():
            first.stop_replication()
            app.write("INSERT INTO items VALUES (1)")
            token = current_session().token
        (position,) = token.positions.values()
        wait_until(lambda: second.replay_lsn() >= position.lsn)
        second.stop_replication()
        pg.primary.crash()
        first.promote()
        _wait_followed(app, first)
        _numbers(first, position.lsn)
        assert second.replay_lsn() >= position.lsn
        held, _ = _counts(app, "items", token)
        fresh, _ = _counts(app, "items", None)
        # The new primary goes as well: what is left is on the abandoned timeline.
        first.crash()
        app.wait_for(lambda nodes: nodes["replica_1"]["breaker"] == "open")
        with pytest.raises((NoNodeAvailableError, psycopg.OperationalError)):
            _counts(app, "items", token)
        with pytest.raises((NoNodeAvailableError, psycopg.OperationalError)):
            _counts(app, "items", None)
        abandoned, _ = _counts(app, "items", None, consistency=Consistency.EVENTUAL)
    assert (0, first.port, Reason.TIMELINE_CHANGED) == (held.value, held.port, held.route.reason)
    assert (0, first.port) == (fresh.value, fresh.port)
    assert (1, second.port) == (abandoned.value, abandoned.port)


def test_a_lost_write_can_be_an_error(opened: Opened, pg: EmbeddedCluster) -> None:
    """on_lost_write="error": the read raises once, and the session goes on from the primary."""
    with opened("plain", on_lost_write="error") as app:
        app.wait_healthy()
        _, lost, first, _ = _lose(app, pg, "items")
        _wait_watched(app, first)
        with app.session(lost):
            with pytest.raises(LostWriteError) as raised:
                app.ask("SELECT count(*) FROM items")
            answer = app.ask("SELECT count(*) FROM items")
        with app.session(lost):
            with pytest.raises(LostWriteError):
                app.choose()
            app.choose()
    (position,) = lost.positions.values()
    assert position == raised.value.position
    assert raised.value.switch_point is not None
    assert 1 == answer.value


# The old primary


def test_an_old_primary_that_comes_back_is_refused(
    opened: Opened, pg: EmbeddedCluster, role: str
) -> None:
    """It still says that it is the primary: no write and no read at any causal level goes there."""
    with opened(role) as app:
        app.wait_healthy()
        _, _, first, second = _lose(app, pg, "items")
        _wait_followed(app, first)
        pg.primary.start()
        app.wait_for(lambda nodes: nodes["primary"]["healthy"])
        ports = set()
        for number in range(10, 30):
            with app.session():
                app.write("INSERT INTO items VALUES (%s)", [number])
                ports.add(app.where(consistency=Consistency.STRONG))
                ports.add(app.where())
            with app.session():
                ports.add(app.where())
        written = pg.primary.value("SELECT count(*) FROM items WHERE id >= 10")
    assert ports <= {first.port, second.port}
    assert 0 == written


def test_an_old_primary_that_was_rewound_is_a_replica(opened: Opened, pg: EmbeddedCluster) -> None:
    """It streams from the new primary and serves what it has replayed of it."""
    with opened("statistics") as app:
        app.wait_healthy()
        _, _, first, second = _lose(app, pg, "items")
        _wait_followed(app, first)
        pg.primary.rewind(first)
        second.stop()
        with app.session():
            app.write("INSERT INTO items VALUES (3)")
            app.wait_for(lambda nodes: (nodes["primary"]["lag_seconds"] or 9.0) < 1.0)
            # Its pool replaces the connections that the crash ended at a pace of its own.
            question = "SELECT array_agg(id ORDER BY id) FROM items"
            wait_until(lambda: app.ask(question).port == pg.primary.port)
            answer = app.ask(question)
    assert ([1, 3], pg.primary.port, Reason.CAUGHT_UP, "primary", "replica") == (
        answer.value,
        answer.port,
        answer.route.reason,
        answer.route.name,
        answer.route.role,
    )


# Tokens that are ahead of everything


def test_a_token_ahead_of_everything_costs_one_request(
    opened: Opened, pg: EmbeddedCluster, role: str
) -> None:
    """Its write was lost with a backup that was restored; the primary itself is not that far."""
    with opened(role, wait_seconds=10.0) as app:
        app.wait_healthy()
        (now,) = app.token().positions.values()
        ahead = Token([now._replace(lsn=Lsn(now.lsn + 64 * 1024 * 1024))])
        with app.session(ahead):
            first = app.ask("SELECT 1")
            issued = current_session().token
            second = app.ask("SELECT 1")
        events = app.events_of(LostWrite)
    assert (pg.primary.port, Reason.TIMELINE_CHANGED) == (first.port, first.route.reason)
    assert first.seconds < 5.0
    (position,) = issued.positions.values()
    assert now.lsn <= position.lsn < now.lsn + 64 * 1024 * 1024
    assert Reason.CAUGHT_UP == second.route.reason
    assert [(ahead.positions[now.system_id], now.timeline)] == [
        (event.position, event.timeline) for event in events
    ]


def test_a_token_ahead_is_issued_anew_without_waiting_too(
    opened: Opened, pg: EmbeddedCluster
) -> None:
    """wait_seconds=0 and STRONG reads never ask for a position; they notice it afterwards."""
    with opened("plain", wait_seconds=0.0) as app:
        app.wait_healthy()
        (now,) = app.token().positions.values()
        ahead = Token([now._replace(lsn=Lsn(now.lsn + 64 * 1024 * 1024))])
        for level in (Consistency.CAUSAL, Consistency.STRONG):
            _, issued = _counts(app, "items", ahead, consistency=level)
            assert issued.positions[now.system_id].lsn < ahead.positions[now.system_id].lsn
        with app.session(ahead):
            app.write("INSERT INTO items VALUES (1)")
            issued = current_session().token
            pg.wait_caught_up()
            answer = app.ask("SELECT count(*) FROM items")
    assert issued.positions[now.system_id].lsn < ahead.positions[now.system_id].lsn
    assert (1, Reason.CAUGHT_UP) == (answer.value, answer.route.reason)


def test_an_asynchronous_commit_that_a_crash_lost_is_reported(
    opened: Opened, pg: EmbeddedCluster
) -> None:
    """The same timeline goes on without it; the client's position is beyond its end."""
    pg.primary.configure("wal_writer_delay", "10s")
    try:
        with opened("plain") as app:
            app.wait_healthy()
            pg.primary.execute("CHECKPOINT")
            with app.session():
                with app.writing() as conn:
                    conn.execute("SET LOCAL synchronous_commit = off")
                    conn.execute("INSERT INTO items VALUES (1)")
                lost = current_session().token
            pg.primary.crash()
            pg.primary.start()
            (position,) = lost.positions.values()
            assert pg.primary.value("SELECT count(*) FROM items") == 0
            app.wait_for(lambda nodes: nodes["primary"]["healthy"])
            behind = insert_lsn(pg.primary) < position.lsn
            answer, issued = _counts(app, "items", lost)
            events = app.events_of(LostWrite)
    finally:
        pg.primary.configure("wal_writer_delay", "200ms")
    if behind:
        assert [position] == [event.position for event in events]
        assert (0, Reason.TIMELINE_CHANGED) == (answer.value, answer.route.reason)
        assert issued.positions[position.system_id].lsn < position.lsn


def test_a_token_of_a_newer_timeline_than_any_server_is_refused(
    opened: Opened, pg: EmbeddedCluster
) -> None:
    """Somebody has seen a promotion that this process cannot see: it serves nothing old."""
    with opened("replication") as app:
        app.wait_healthy()
        (now,) = app.token().positions.values()
        newer = Token([Position(now.system_id, now.timeline + 1, now.lsn)])
        with pytest.raises(NoNodeAvailableError):
            _counts(app, "items", newer)
