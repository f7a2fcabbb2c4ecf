"""A primary that is stopped or hangs: what may go on, what must raise, and within which time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import psycopg
import psycopg_pool
import pytest

from lsn_consistency import Consistency, Lsn, Position, Reason, Token, current_session
from lsn_consistency.events import NodeFailed, PositionUnknown
from lsn_consistency.exceptions import NoNodeAvailableError, ReplayTimeoutError, RoutingError
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App, Connection

Fault = Literal["stopped", "frozen"]
FAULTS = ("stopped", "frozen")

OPTIONS: dict[str, Any] = {
    "max_lag_seconds": 0.8,
    "wait_seconds": 0.2,
    "poll_interval": 0.2,
    "probe_timeout": 0.4,
    "connect_timeout": 0.5,
    "open_timeout": 1.0,
}

READ_LIMIT = 0.2 + 0.4 + 0.5
"""wait_seconds, probe_timeout and connect_timeout: what a read may use up."""

SLACK = 0.5
WRITE_ERRORS = (psycopg.OperationalError, psycopg_pool.PoolTimeout, NoNodeAvailableError)


def _take_down(pg: EmbeddedCluster, fault: str) -> None:
    if fault == "frozen":
        pg.primary.freeze()
    else:
        pg.primary.stop("immediate")


def _ahead(token: Token) -> Token:
    """Return a token that no replica can have reached."""
    return Token(
        Position(each.system_id, each.timeline, Lsn(each.lsn + 1024**3))
        for each in token.positions.values()
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_without_the_primary_reads_that_a_replica_satisfies_go_on_and_writes_raise(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, fault: str
) -> None:
    """
    Primary stopped: reads whose token a replica satisfies go on, also long after the lag bound,
    PRIMARY_DOWN; writes raise; back again it is used again.
    """
    replicas = {replica.port for replica in pg.replicas.values()}
    with opened(**OPTIONS) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        token = current_session().token
        pg.wait_caught_up()
        # The replicas have told that they have it before the primary goes.
        app.choose(token, timeout=5.0)
        _take_down(pg, fault)
        # Long enough for the lag bound to pass, and for the breaker to open.
        ends = time.monotonic() + (1.6 if fault == "stopped" else 2.8)
        answers = []
        while time.monotonic() < ends:
            with app.session(token):
                answers.append(app.ask(f"SELECT count(*) FROM {table}"))
            time.sleep(0.01)
        with app.session(token), pytest.raises(WRITE_ERRORS):
            app.write(f"INSERT INTO {table} VALUES (2)")
        pg.heal()
        app.wait_for(lambda nodes: nodes["primary"]["healthy"])
        app.write(f"INSERT INTO {table} VALUES (3)")
        again = app.ask(f"SELECT count(*) FROM {table}", consistency=Consistency.STRONG)
    assert [1] * len(answers) == [answer.value for answer in answers]
    assert {answer.port for answer in answers} <= replicas
    assert Reason.PRIMARY_DOWN == answers[-1].route.reason
    assert max(answer.seconds for answer in answers) < READ_LIMIT + SLACK
    assert max(answer.seconds for answer in answers[-20:]) < SLACK
    assert (2, pg.primary.port) == (again.value, again.port)


@pytest.mark.parametrize("fault", FAULTS)
def test_without_the_primary_a_read_that_nothing_satisfies_raises_within_its_limits(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, fault: str
) -> None:
    """A token that no replica reaches, a level that needs proof: an error in time, no old data."""
    with opened(**OPTIONS) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        token = current_session().token
        pg.wait_caught_up()
        app.choose(token, timeout=5.0)
        _take_down(pg, fault)
        time.sleep(1.2)
        asked: list[tuple[Token, dict[str, Any]]] = [
            (_ahead(token), {}),
            (token, {"consistency": Consistency.STRONG}),
            (token, {"consistency": Consistency.bounded(1.0)}),
            (token.merge(Token(pin_until=time.time() + 60)), {}),
        ]
        outcomes = app.each(4, lambda number: _outcome(app, asked[number][0], **asked[number][1]))
        eventual = _outcome(app, _ahead(token), consistency=Consistency.EVENTUAL)
        pg.primary.thaw()
    kinds = [type(error) for error, _ in outcomes]
    assert [ReplayTimeoutError, *([NoNodeAvailableError] * 3)] == kinds
    assert max(seconds for _, seconds in outcomes) < READ_LIMIT + SLACK
    assert eventual[0] is None
    waited = outcomes[0][0]
    assert isinstance(waited, ReplayTimeoutError)
    assert 0.2 <= waited.waited_seconds < 0.2 + SLACK
    assert "primary" in str(outcomes[1][0])


def test_in_the_moment_in_which_the_primary_goes_no_read_is_stale(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """Paused replicas, primary gone: every read raises, none gets the past, none hangs."""
    with opened(**OPTIONS) as app:
        app.wait_healthy()
        for replica in pg.replicas.values():
            replica.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        token = current_session().token
        # A fast stop would wait for the paused replicas to take the rest of the log.
        pg.primary.stop("immediate")
        outcomes = app.each(20, lambda _: _outcome(app, token))
    assert 20 == len([error for error, _ in outcomes if isinstance(error, RoutingError)])
    assert max(seconds for _, seconds in outcomes) < READ_LIMIT + SLACK


def test_a_write_on_a_frozen_primary_raises_within_the_limits(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """A primary that hangs fails a write before it begins, in time, once that is known."""
    with opened(**OPTIONS) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        pg.primary.freeze()
        app.wait_for(lambda nodes: not nodes["primary"]["healthy"])
        began = time.monotonic()
        with pytest.raises(WRITE_ERRORS):
            app.write(f"INSERT INTO {table} VALUES (2)")
        took = time.monotonic() - began
        pg.primary.thaw()
    assert took < READ_LIMIT + SLACK


def test_a_router_that_starts_without_its_primary_serves_what_a_token_proves(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """Cold start, primary down: nothing is assumed; a token still tells whose system it is."""
    with opened(**OPTIONS) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        token = current_session().token
    pg.wait_caught_up()
    pg.primary.stop("immediate")
    with opened(**OPTIONS) as app:
        with app.session(token):
            answer = app.ask(f"SELECT count(*) FROM {table}")
        ahead = _outcome(app, _ahead(token))
        without = _outcome(app, Token(), consistency=Consistency.bounded(5.0))
        pg.heal()
        app.wait_for(lambda nodes: nodes["primary"]["healthy"])
        app.write(f"INSERT INTO {table} VALUES (2)")
    assert (1, Reason.PRIMARY_DOWN) == (answer.value, answer.route.reason)
    assert answer.port in {replica.port for replica in pg.replicas.values()}
    assert isinstance(ahead[0], RoutingError)
    assert isinstance(without[0], RoutingError)


def _commit_and_raise(app: App, table: str, after: Callable[[Connection], Any]) -> None:
    with app.writing() as conn:
        conn.execute(f"INSERT INTO {table} VALUES (1)")
        conn.commit()
        after(conn)
        raise ZeroDivisionError


def test_a_connection_that_dies_after_commit_still_gives_the_position(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """The connection dies between COMMIT and the capture: a fresh position is taken."""
    with opened(wait_seconds=0.1) as app:
        for replica in pg.replicas.values():
            replica.pause_replay()
        with app.session() as session:
            with pytest.raises(ZeroDivisionError):
                _commit_and_raise(
                    app,
                    table,
                    lambda conn: pg.primary.execute(
                        "SELECT pg_terminate_backend(%s, 5000)", [conn.raw.info.backend_pid]
                    ),
                )
            answer = app.ask(f"SELECT count(*) FROM {table}")
            token = session.token
    assert (1, pg.primary.port) == (answer.value, answer.port)
    assert token.positions


def test_a_write_whose_position_cannot_be_had_pins_the_session(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """The primary dies after COMMIT: PositionUnknown, and reads wait for the primary itself."""
    with opened(**OPTIONS, pin_seconds=6.0) as app:
        app.wait_healthy()
        for replica in pg.replicas.values():
            replica.pause_replay()
        with app.session() as session:
            with pytest.raises(ZeroDivisionError):
                _commit_and_raise(app, table, lambda _: pg.primary.crash())
            pinned_until = session.token.pin_until
            events = app.events_of(PositionUnknown)
            outcome = _outcome(app, session.token)
            pg.primary.start()
            app.wait_for(lambda nodes: nodes["primary"]["healthy"])
            answer = app.ask(f"SELECT count(*) FROM {table}")
    assert [pinned_until] == [event.pin_until for event in events]
    assert pinned_until is not None
    assert isinstance(outcome[0], NoNodeAvailableError)
    assert (1, pg.primary.port, Reason.PRIMARY_REQUIRED) == (
        answer.value,
        answer.port,
        answer.route.reason,
    )


def test_capture_never_raises_for_a_primary_that_is_down(
    opened: OpenRouter, pg: EmbeddedCluster
) -> None:
    """capture() with the primary down pins the session; token() raises and says why."""
    with opened(**OPTIONS) as app:
        app.wait_healthy()
        pg.primary.stop("immediate")
        with app.session() as session:
            app.capture()
            pinned = session.token.pin_until
        with pytest.raises(NoNodeAvailableError, match="primary"):
            app.token()
    assert pinned is not None
    assert pinned > time.time()


def _outcome(app: App, token: Token, **options: Any) -> tuple[BaseException | None, float]:
    began = time.monotonic()
    try:
        with app.session(token):
            app.ask("SELECT 1", **options)
    except Exception as error:
        return error, time.monotonic() - began
    return None, time.monotonic() - began


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_after_a_restart_the_first_use_of_each_pooled_connection_works(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, mode: Literal["fast", "immediate"]
) -> None:
    """Connections that the server has closed are replaced before they are handed out."""
    sizes = {"min_size": 3, "max_size": 3}
    with opened(**OPTIONS, pool_options=sizes) as app:
        for pool in app.pools.values():
            app.call(pool.wait())
        for node in pg.nodes.values():
            node.restart(mode)
        app.wait_healthy()
        app.events.clear()
        for number in range(6):
            app.write(f"INSERT INTO {table} VALUES (%s)", [number])
        counts = [app.read("SELECT count(*) FROM pg_class", node=name) for name in pg.nodes]
        failures = app.events_of(NodeFailed)
    assert 3 == len(counts)
    assert [] == failures
