"""Roles, systems and privileges are observed, never assumed from the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psycopg
import pytest

from lsn_consistency import Consistency, Lsn, Position, Reason, Token, current_session
from lsn_consistency.events import PositionUnknown, RoleChanged
from lsn_consistency.exceptions import NoNodeAvailableError
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App, restartpoints


def test_swapped_conninfos_are_found_out(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """The configured primary is a standby and the other way round: writes and reads go right."""
    first, second = pg.replicas.values()
    nodes = {"a": pg.primary.conninfo, "b": second.conninfo}
    with opened(primary=first.conninfo, replicas=nodes, wait_seconds=5.0) as app:
        answers = []
        for number in range(20):
            with app.session():
                with app.writing() as conn:
                    conn.execute(f"INSERT INTO {table} VALUES (%s)", [number])
                    wrote_to = conn.port
                answers.append(app.ask(f"SELECT count(*) FROM {table}"))
        strong = app.ask("SELECT 1", consistency=Consistency.STRONG)
        snapshot = app.snapshot()
        changes = {(event.name, event.after) for event in app.events_of(RoleChanged)}
    assert pg.primary.port == wrote_to
    assert list(range(1, 21)) == [answer.value for answer in answers]
    assert {first.port, second.port} == {answer.port for answer in answers}
    assert (pg.primary.port, "a", "primary", True) == (
        strong.port,
        strong.route.name,
        strong.route.role,
        strong.route.is_primary,
    )
    roles = {name: node["role"] for name, node in snapshot.items()}
    assert {"primary": "replica", "a": "primary", "b": "replica"} == roles
    assert set(roles.items()) == changes


def test_without_any_primary_writes_say_so_and_replicas_still_serve(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """Only standbys configured: writes raise NoNodeAvailableError with what each node said."""
    first, second = pg.replicas.values()
    with opened(primary=first.conninfo, replicas={"b": second.conninfo}) as app:
        with pytest.raises(NoNodeAvailableError) as raised:
            app.write(f"INSERT INTO {table} VALUES (1)")
        answer = app.ask("SELECT 1", consistency=Consistency.EVENTUAL)
        with pytest.raises(NoNodeAvailableError):
            app.ask("SELECT 1", consistency=Consistency.STRONG)
    assert {"primary", "b"} == set(raised.value.failures)
    assert answer.port in (first.port, second.port)


def test_one_server_named_twice_is_one_primary(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """The primary among its own replicas is no second primary, and no replica either."""
    nodes = {"same": pg.primary.conninfo, "replica_1": pg.replicas["replica_1"].conninfo}
    with opened(replicas=nodes, wait_seconds=5.0) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        answers = []
        for _ in range(20):
            with app.session(current_session().token):
                answers.append(app.ask(f"SELECT count(*) FROM {table}"))
    assert {(1, pg.replicas["replica_1"].port)} == {(each.value, each.port) for each in answers}


# Servers of another system


@pytest.fixture(scope="module")
def stranger() -> Iterator[EmbeddedCluster]:
    """Run another system, whose log is far ahead of ours, with a table of the same name."""
    with EmbeddedCluster(replicas=1) as cluster:
        cluster.primary.execute("CREATE TABLE items (id int PRIMARY KEY, value int DEFAULT 0)")
        cluster.primary.execute("INSERT INTO items SELECT generate_series(1, 1000)")
        for _ in range(3):
            cluster.primary.execute("SELECT pg_logical_emit_message(false, '', 'x')")
            cluster.primary.execute("SELECT pg_switch_wal()")
        cluster.wait_caught_up()
        yield cluster


LEVELS = (
    Consistency.CAUSAL,
    Consistency.READ_YOUR_WRITES,
    Consistency.EVENTUAL,
    Consistency.bounded(60.0),
    Consistency.sticky(0.001),
)


def test_a_replica_of_another_system_is_never_used(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, stranger: EmbeddedCluster
) -> None:
    """Its numbers are greater than any token's, and mean nothing: at no level, primary or not."""
    strangers = {
        "their_primary": stranger.primary.conninfo,
        "their_replica": stranger.replicas["replica_1"].conninfo,
    }
    with opened(replicas=strangers, wait_seconds=0.05) as app:
        answers = []
        for number, level in enumerate([*LEVELS, *LEVELS]):
            with app.session():
                if number < len(LEVELS):
                    app.write(f"INSERT INTO {table} VALUES (%s)", [number])
                answers.append(app.ask(f"SELECT count(*) FROM {table}", consistency=level))
        forced = app.ask(f"SELECT count(*) FROM {table}", node="their_replica")
    expected = [1, 2, 3, 4, 5, 5, 5, 5, 5, 5]
    assert [(count, pg.primary.port) for count in expected] == [
        (answer.value, answer.port) for answer in answers
    ]
    assert 1000 == forced.value


def test_a_primary_of_another_system_is_not_taken_for_ours_when_ours_is_down(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, stranger: EmbeddedCluster
) -> None:
    """Ours goes down: no write and no read goes to the stranger, whatever it says it is."""
    nodes = {"theirs": stranger.primary.conninfo, "ours": pg.replicas["replica_1"].conninfo}
    with opened(replicas=nodes, open_timeout=1.0, connect_timeout=0.5) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        pg.wait_caught_up()
        pg.primary.stop("immediate")
        _assert_not_theirs(app, table, stranger)


def test_a_primary_of_another_system_is_not_taken_for_ours_at_a_cold_start(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, stranger: EmbeddedCluster
) -> None:
    """
    Ours is down from the start: two systems answer and nothing says which is ours.

    A write to the other one would be a write to the wrong database.
    """
    nodes = {"theirs": stranger.primary.conninfo, "ours": pg.replicas["replica_1"].conninfo}
    pg.primary.stop("immediate")
    with opened(replicas=nodes, open_timeout=1.0, connect_timeout=0.5) as app:
        _assert_not_theirs(app, table, stranger)


def _assert_not_theirs(app: App, table: str, stranger: EmbeddedCluster) -> None:
    before = stranger.primary.value("SELECT count(*) FROM items")
    with pytest.raises((psycopg.OperationalError, NoNodeAvailableError)), app.session():
        app.write(f"INSERT INTO {table} VALUES (5001)")
    theirs = {node.port for node in stranger.nodes.values()}
    for level in (*LEVELS, Consistency.STRONG):
        with app.session():
            try:
                port = app.where(consistency=level)
            except (NoNodeAvailableError, psycopg.OperationalError):
                continue
        assert port not in theirs
    assert before == stranger.primary.value("SELECT count(*) FROM items")


def test_positions_of_other_systems_change_nothing(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """A token may carry the positions of databases that this router does not know."""
    foreign = Token([Position(4711, 3, Lsn.parse("FFFF/0"))])
    with opened(wait_seconds=5.0) as app, app.session(foreign):
        app.wait_healthy()
        before = app.ask("SELECT 1", consistency=Consistency.READ_YOUR_WRITES)
        app.write(f"INSERT INTO {table} VALUES (1)")
        after = app.ask(f"SELECT count(*) FROM {table}")
        token = current_session().token
    assert Reason.WITHIN_LAG == before.route.reason
    assert (1, Reason.CAUGHT_UP) == (after.value, after.route.reason)
    assert foreign.positions[4711] == token.positions[4711]
    assert 2 == len(token.positions)


# Privileges


def _as_app(pg: EmbeddedCluster) -> dict[str, object]:
    # Tests before may have left the cluster on a new timeline.
    restartpoints(pg)
    nodes = {name: node.conninfo_for(user="app") for name, node in pg.nodes.items()}
    return {"primary": nodes.pop("primary"), "replicas": nodes}


def test_a_plain_role_needs_no_grant(opened: OpenRouter, pg: EmbeddedCluster, table: str) -> None:
    """A role without privileges: tokens, lag, waiting and fallback work as for a superuser."""
    with opened(**_as_app(pg), wait_seconds=0.5) as app:
        answers = []
        for number in range(20):
            with app.session():
                app.write(f"INSERT INTO {table} VALUES (%s)", [number])
                answers.append(app.ask(f"SELECT count(*), current_user::text FROM {table}"))
        app.wait_healthy()
        strangers = []
        for _ in range(40):
            with app.session():
                strangers.append(app.ask("SELECT 1"))
        lags = [node["lag_seconds"] for node in app.snapshot().values()]
        for replica in pg.replicas.values():
            replica.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (20)")
        fallback = app.ask(f"SELECT count(*) FROM {table}")
    assert [(number + 1, "app") for number in range(20)] == [each.rows[0] for each in answers]
    # Whichever of the two has replayed a write first serves its read; without one, chance decides.
    replicas = {replica.port for replica in pg.replicas.values()}
    assert {each.port for each in answers} <= replicas
    assert replicas == {each.port for each in strangers}
    assert None not in lags
    assert (21, pg.primary.port, Reason.NOT_CAUGHT_UP) == (
        fallback.value,
        fallback.port,
        fallback.route.reason,
    )


@contextmanager
def _revoked(pg: EmbeddedCluster, *functions: str) -> Iterator[None]:
    """Take EXECUTE on these functions from everybody but superusers for the time of the block."""
    for function in functions:
        pg.primary.execute(f"REVOKE EXECUTE ON FUNCTION {function} FROM public")
    pg.wait_caught_up()
    try:
        yield
    finally:
        for function in functions:
            pg.primary.execute(f"GRANT EXECUTE ON FUNCTION {function} TO public")
        pg.wait_caught_up()


def test_a_position_that_is_refused_after_the_commit(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """The write is done and raises nothing; unknown goes to the primary."""
    with opened(**_as_app(pg)) as app, app.session():
        app.write(f"INSERT INTO {table} VALUES (0)")
        with ExitStack() as end:
            with app.writing() as conn:
                conn.execute(f"INSERT INTO {table} VALUES (1)")
                end.enter_context(_revoked(pg, "pg_current_wal_insert_lsn()"))
            assert current_session().token.pin_until is not None
        answer = app.ask(f"SELECT max(id) FROM {table}")
    assert (1, pg.primary.port) == (answer.value, answer.port)


def test_a_replica_whose_position_is_secret_serves_no_token(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """EXECUTE on pg_last_wal_replay_lsn() revoked: unknown is not caught up; the primary serves."""
    with (
        _revoked(pg, "pg_last_wal_replay_lsn()"),
        opened(**_as_app(pg), wait_seconds=0.1) as app,
    ):
        answers = []
        for number in range(10):
            with app.session():
                app.write(f"INSERT INTO {table} VALUES (%s)", [number])
                answers.append(app.ask(f"SELECT count(*) FROM {table}"))
        with app.session():
            unproven = app.ask("SELECT 1", consistency=Consistency.bounded(60.0))
    assert [(number + 1, pg.primary.port) for number in range(10)] == [
        (answer.value, answer.port) for answer in answers
    ]
    assert pg.primary.port == unproven.port


@pytest.mark.parametrize("level", [Consistency.EVENTUAL, Consistency.sticky(0.3)], ids=str)
def test_levels_without_positions_use_replicas_that_hide_them(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, level: Consistency
) -> None:
    """sticky() needs no LSN, so sources without the functions serve it; EVENTUAL as well."""
    functions = (
        "pg_last_wal_replay_lsn()",
        "pg_last_wal_receive_lsn()",
        "pg_current_wal_insert_lsn()",
        "pg_current_wal_flush_lsn()",
    )
    with _revoked(pg, *functions), opened(**_as_app(pg), consistency=level) as app:
        before = app.ask("SELECT 1")
        app.write(f"INSERT INTO {table} VALUES (1)")
        after = app.ask(f"SELECT count(*) FROM {table}")
    assert before.port in {replica.port for replica in pg.replicas.values()}
    if level.name == "sticky":
        assert (1, pg.primary.port) == (after.value, after.port)


def test_a_primary_whose_position_is_secret_pins_its_writers(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """No position can be taken after a write: the session reads from the primary."""
    with (
        _revoked(pg, "pg_current_wal_insert_lsn()"),
        opened(**_as_app(pg), wait_seconds=0.1) as app,
    ):
        for replica in pg.replicas.values():
            replica.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        answer = app.ask(f"SELECT count(*) FROM {table}")
        events = app.events_of(PositionUnknown)
        for replica in pg.replicas.values():
            replica.resume_replay()
    assert (1, pg.primary.port, Reason.PRIMARY_REQUIRED) == (
        answer.value,
        answer.port,
        answer.route.reason,
    )
    assert 1 <= len(events)
