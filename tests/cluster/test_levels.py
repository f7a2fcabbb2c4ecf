"""The consistency levels on a real cluster; tokens and nodes given by hand; balance."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import psycopg
import pytest

from lsn_consistency import Consistency, Reason, Token, consistency, current_session
from lsn_consistency.events import ReadRouted
from lsn_consistency.exceptions import ConfigurationError
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import wait_until

# Levels


def test_strong_reads_are_the_primarys(opened: OpenRouter, pg: EmbeddedCluster) -> None:
    """STRONG: primary only, by call, by block, by decorator and by router."""
    with opened() as app:

        @consistency(Consistency.STRONG)
        def decorated() -> Any:
            return app.ask("SELECT 1")

        answers = [app.ask("SELECT 1", consistency=Consistency.STRONG), decorated()]
        with consistency(Consistency.STRONG):
            answers.append(app.ask("SELECT 1"))
            weaker = app.ask("SELECT 1", consistency=Consistency.EVENTUAL)
        after = app.ask("SELECT 1", consistency=Consistency.EVENTUAL)
    with opened(consistency=Consistency.STRONG) as app:
        answers.append(app.ask("SELECT 1"))
    assert [(pg.primary.port, Reason.PRIMARY_REQUIRED)] * 4 == [
        (answer.port, answer.route.reason) for answer in answers
    ]
    assert pg.primary.port not in (weaker.port, after.port)


def test_eventual_reads_take_any_healthy_replica(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """EVENTUAL: any healthy replica, behind its session's writes or the lag bound or not."""
    with opened(max_lag_seconds=0.3, wait_seconds=1.0, poll_interval=0.1) as app:
        app.wait_healthy()
        for replica in pg.replicas.values():
            replica.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        wait_until(lambda: app.choose(consistency=Consistency.bounded(0.3)).is_primary)
        answers = []
        for _ in range(40):
            with app.session(current_session().token):
                level = Consistency.EVENTUAL
                answers.append(app.ask(f"SELECT count(*) FROM {table}", consistency=level))
    assert {replica.port for replica in pg.replicas.values()} == {each.port for each in answers}
    assert {0} == {answer.value for answer in answers}
    assert max(answer.seconds for answer in answers) < 0.3


def test_sticky_reads_stay_on_the_primary_for_their_time(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """sticky(seconds): the primary for that long after a write, replicas before and after."""
    with opened(consistency=Consistency.sticky(0.6)) as app:
        before = app.ask("SELECT 1")
        app.write(f"INSERT INTO {table} VALUES (1)")
        wrote = time.monotonic()
        during = [app.ask(f"SELECT count(*) FROM {table}")]
        time.sleep(0.3)
        during.append(app.ask(f"SELECT count(*) FROM {table}"))
        token = current_session().token
        time.sleep(max(0.0, wrote + 0.65 - time.monotonic()))
        after = app.ask("SELECT 1")
    assert [(1, pg.primary.port, Reason.PRIMARY_REQUIRED)] * 2 == [
        (answer.value, answer.port, answer.route.reason) for answer in during
    ]
    assert pg.primary.port not in (before.port, after.port)
    # It needs no LSN, so it takes none.
    assert {} == dict(token.positions)


# Tokens and nodes given by hand


def test_an_explicit_token_takes_the_place_of_the_sessions(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """read(token) and choose(token): that position is reached, whatever the session holds."""
    paused = {"replica_1": pg.replicas["replica_1"]}
    nodes = {name: node.conninfo for name, node in paused.items()}
    with opened(replicas=nodes, wait_seconds=0.1, max_lag_seconds=30.0, pin_seconds=30.0) as app:
        old = app.token()
        app.choose(old, timeout=5.0)
        paused["replica_1"].pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        new = current_session().token
        with app.session():
            asked = app.ask(f"SELECT count(*) FROM {table}", token=new)
        with app.session(new):
            older = app.ask(f"SELECT count(*) FROM {table}", token=old)
            nothing = app.ask(f"SELECT count(*) FROM {table}", token=Token())
            chosen = app.choose(old)
            own = app.choose()
    port = paused["replica_1"].port
    assert (1, pg.primary.port, Reason.NOT_CAUGHT_UP) == (
        asked.value,
        asked.port,
        asked.route.reason,
    )
    assert [(0, port)] * 2 == [(each.value, each.port) for each in (older, nothing)]
    assert (("replica_1", Reason.CAUGHT_UP), ("primary", Reason.NOT_CAUGHT_UP)) == (
        (chosen.name, chosen.reason),
        (own.name, own.reason),
    )


def test_a_node_can_be_forced(opened: OpenRouter, pg: EmbeddedCluster, table: str) -> None:
    """node= names a node and skips the decision: FORCED, read-only, the primary too."""
    with opened(wait_seconds=5.0, connect_timeout=0.5) as app:
        pg.replicas["replica_2"].pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        answers = {name: app.ask(f"SELECT count(*) FROM {table}", node=name) for name in pg.nodes}
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            app.read(f"INSERT INTO {table} VALUES (2)", node="primary")
        with pytest.raises(ConfigurationError, match="nowhere"):
            app.read("SELECT 1", node="nowhere")
        pg.replicas["replica_1"].stop("immediate")
        with pytest.raises((psycopg.OperationalError, psycopg.errors.Error)):
            app.read("SELECT 1", node="replica_1")
    assert {name: node.port for name, node in pg.nodes.items()} == {
        name: answer.port for name, answer in answers.items()
    }
    assert {Reason.FORCED} == {answer.route.reason for answer in answers.values()}
    assert 0 == answers["replica_2"].value


def test_the_hook_is_told_of_each_choice_and_the_session_of_the_last(
    opened: OpenRouter, pg: EmbeddedCluster
) -> None:
    """Choices that are the same again, and those between which the session read elsewhere."""
    with opened() as app:
        app.wait_healthy()
        began = len(app.events_of(ReadRouted))
        routes = []
        for level in (Consistency.CAUSAL, Consistency.STRONG, Consistency.CAUSAL):
            for _ in range(3):
                routes.append(app.choose(consistency=level))
                assert routes[-1] is current_session().last_route
        assert routes == [event.route for event in app.events_of(ReadRouted)[began:]]
        assert 1 == len({route.name for route in routes if not route.is_primary})


def test_choose_waits_as_long_as_it_is_told(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """choose(timeout=) takes the place of wait_seconds, and comes back when a replica is there."""
    with opened(wait_seconds=20.0) as app:
        for replica in pg.replicas.values():
            replica.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        began = time.monotonic()
        at_once, later = app.choose(timeout=0.0), app.choose(timeout=0.3)
        took = time.monotonic() - began
        waiting = app.start_each(1, lambda _: app.choose(timeout=10.0))
        wait_until(lambda: 1 == len(app.cluster_state.positions))
        pg.replicas["replica_2"].resume_replay()
        resumed = time.monotonic()
        route = waiting[0].result(10)
        released = time.monotonic() - resumed
    assert [Reason.NOT_CAUGHT_UP] * 2 == [at_once.reason, later.reason]
    assert at_once.waited_seconds < 0.2
    assert 0.3 <= later.waited_seconds
    assert took < 0.8
    assert ("replica_2", Reason.CAUGHT_UP) == (route.name, route.reason)
    assert released < 0.3


# Balance


def test_a_unit_of_work_keeps_its_replica(opened: OpenRouter, pg: EmbeddedCluster) -> None:
    """
    One replica per unit of work, and other units use the others.

    At CAUSAL a read may have to leave a replica that has received more than it has replayed, which
    a server that writes nothing but its own records is enough for.
    """
    with opened(consistency=Consistency.READ_YOUR_WRITES) as app:
        app.wait_healthy()
        used = []
        for _ in range(30):
            with app.session():
                used.append({app.where() for _ in range(5)})
    assert {1} == {len(ports) for ports in used}
    counts = Counter(port for ports in used for port in ports)
    assert {replica.port for replica in pg.replicas.values()} == set(counts)
    assert min(counts.values()) >= 3


def test_weights_share_the_reads(opened: OpenRouter, pg: EmbeddedCluster) -> None:
    """Weights: a replica with a ninth of the weight gets about that share of the reads."""
    with opened(weights={"replica_1": 9.0, "replica_2": 1.0}) as app:
        app.wait_healthy()
        counts: Counter[int] = Counter()
        for _ in range(200):
            with app.session():
                counts[app.where()] += 1
    assert 200 == sum(counts.values())
    # Two draws of one in ten: between 0 and about 40 of 200 with a chance beyond one in a million.
    assert counts[pg.replicas["replica_2"].port] < 60
    assert counts[pg.replicas["replica_1"].port] > 140
