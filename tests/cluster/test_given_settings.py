"""What users set for themselves still works: sessions, row factories, pools of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import psycopg_pool
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import class_row, dict_row

from lsn_consistency import Reason, current_session
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App, Kind, running_loop, wait_until

COMMITS = ("off", "local", "remote_write", "on", "remote_apply")


def _with_options(pg: EmbeddedCluster, options: str) -> dict[str, Any]:
    """Return a router's nodes whose sessions have these settings."""
    nodes = {name: make_conninfo(node.conninfo, options=options) for name, node in pg.nodes.items()}
    return {"primary": nodes.pop("primary"), "replicas": nodes}


def _write_and_read(app: App, table: str, count: int = 5) -> list[tuple[int, int]]:
    found = []
    for number in range(count):
        with app.session():
            app.write(f"INSERT INTO {table} VALUES (%s)", [number])
            answer = app.ask(f"SELECT count(*) FROM {table}")
        found.append((answer.value, answer.port))
    return found


@pytest.mark.parametrize("commit", COMMITS)
def test_reads_follow_writes_under_every_synchronous_commit(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, commit: str
) -> None:
    """synchronous_commit set by the user stays in force and changes no promise."""
    with opened(**_with_options(pg, f"-c synchronous_commit={commit}"), wait_seconds=5.0) as app:
        answers = _write_and_read(app, table)
        with app.writing() as conn:
            setting = conn.value("SHOW synchronous_commit")
    assert list(range(1, 6)) == [count for count, _ in answers]
    assert pg.primary.port not in {port for _, port in answers}
    assert commit == setting


OPTIONS = (
    r"-c default_transaction_isolation=repeatable\ read",
    "-c default_transaction_deferrable=on",
    "-c statement_timeout=2000 -c idle_in_transaction_session_timeout=2000",
    r"-c datestyle=german -c intervalstyle=sql_standard -c timezone=Asia/Kathmandu",
    "-c client_encoding=latin1 -c standard_conforming_strings=on -c extra_float_digits=-15",
    "-c search_path=pg_temp,public -c row_security=off -c quote_all_identifiers=on",
)


@pytest.mark.parametrize("options", OPTIONS)
def test_reads_follow_writes_under_the_users_session_settings(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, options: str
) -> None:
    """Whatever a session's settings do to dates, names or transactions: routing works."""
    with opened(**_with_options(pg, options), wait_seconds=5.0) as app:
        answers = _write_and_read(app, f"public.{table}")
        lags = [node["lag_seconds"] for node in app.snapshot().values()]
    assert list(range(1, 6)) == [count for count, _ in answers]
    assert pg.primary.port not in {port for _, port in answers}
    assert None not in lags


def test_serializable_sessions_are_served_by_the_primary(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """A standby refuses SERIALIZABLE (0A000), so the primary serves: right, if not spread."""
    nodes = _with_options(pg, "-c default_transaction_isolation=serializable")
    with opened(**nodes, wait_seconds=0.2, open_timeout=1.0) as app:
        answers = _write_and_read(app, table)
    assert [(number, pg.primary.port) for number in range(1, 6)] == answers


class Item:
    """
    A row of the user's own class.
    """

    def __init__(self, count: int) -> None:
        self.count = count


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize("row_factory", [dict_row, class_row(Item)], ids=["dict", "class"])
def test_the_users_row_factory_and_autocommit_are_in_force(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, row_factory: Any, autocommit: bool
) -> None:
    """The router's own statements depend on neither, and leave both alone."""
    kwargs = {"row_factory": row_factory, "autocommit": autocommit, "prepare_threshold": 0}
    with opened(wait_seconds=5.0, pool_options={"kwargs": kwargs}) as app:
        rows = []
        for number in range(10):
            app.write(f"INSERT INTO {table} VALUES (%s)", [number])
            with app.reading() as conn:
                rows += conn.execute(f"SELECT count(*)::int AS count FROM {table}")
                assert autocommit == conn.raw.autocommit
    counts = [row["count"] if isinstance(row, dict) else row.count for row in rows]
    assert list(range(1, 11)) == counts


def test_pool_options_reach_the_pools(opened: OpenRouter, pg: EmbeddedCluster, kind: Kind) -> None:
    """Sizes, name and configure are the user's: the callback has run on each connection."""

    def configure(conn: Any) -> None:
        conn.prepare_threshold = 7

    async def configure_async(conn: Any) -> None:
        configure(conn)

    with opened(
        pool_options={
            "min_size": 1,
            "max_size": 3,
            "configure": configure if kind == "blocking" else configure_async,
            "kwargs": {"application_name": "shop"},
        }
    ) as app:
        with app.reading() as first, app.reading() as second, app.writing() as third:
            thresholds = [conn.raw.prepare_threshold for conn in (first, second, third)]
            names = [conn.value("SHOW application_name") for conn in (first, second, third)]
        sizes = {(pool.min_size, pool.max_size) for pool in app.pools.values()}
    assert [7, 7, 7] == thresholds
    assert ["shop", "shop", "shop"] == names
    assert {(1, 3)} == sizes


def test_a_configure_callback_that_leaves_the_connection_in_a_transaction_fails_as_without_us(
    opened: OpenRouter, kind: Kind
) -> None:
    """psycopg_pool refuses such a connection; the reads go nowhere, and nothing hangs."""

    def configure(conn: Any) -> None:
        conn.execute("SELECT 1")

    async def configure_async(conn: Any) -> None:
        await conn.execute("SELECT 1")

    chosen = configure if kind == "blocking" else configure_async
    with (
        opened(
            connect_timeout=0.3, pool_options={"configure": chosen, "min_size": 1, "timeout": 0.5}
        ) as app,
        pytest.raises(psycopg_pool.PoolTimeout),
    ):
        app.write("SELECT 1")


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_write_inside_a_read_fails_wherever_the_read_went(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, autocommit: bool
) -> None:
    """25006 on a replica, and on the primary as well, so that it shows before a fallback does."""
    failed = []
    with opened(
        wait_seconds=0.05, pool_options={"min_size": 1, "kwargs": {"autocommit": autocommit}}
    ) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        pg.wait_caught_up()
        for fallback in (False, True):
            if fallback:
                for replica in pg.replicas.values():
                    replica.pause_replay()
                app.write(f"INSERT INTO {table} VALUES (2)")
            for _ in range(3):
                with app.reading() as conn:
                    failed.append(conn.port == pg.primary.port)
                    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                        conn.execute(f"INSERT INTO {table} VALUES (99)")
        # The same connection writes again.
        app.write(f"INSERT INTO {table} VALUES (3)")
        with app.writing() as conn:
            state = (conn.raw.read_only, conn.value("SHOW transaction_read_only"))
    assert [False] * 3 + [True] * 3 == failed
    assert [1, 2, 3] == [row for (row,) in pg.primary.execute(f"SELECT id FROM {table}")]
    assert (None, "off") == state


@contextmanager
def _own_pools(
    kind: Kind, pg: EmbeddedCluster, **options: Any
) -> Iterator[tuple[dict[str, Any], Callable[[Any], Any]]]:
    """Open pools as an application would; also yield what awaits their coroutines."""
    if kind == "blocking":
        pools = {
            name: psycopg_pool.ConnectionPool(node.conninfo, open=True, **options)
            for name, node in pg.nodes.items()
        }
        try:
            yield pools, lambda result: result
        finally:
            for pool in pools.values():
                pool.close()
        return
    with running_loop() as loop:

        def call(coroutine: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

        async def make() -> dict[str, Any]:
            made = {
                name: psycopg_pool.AsyncConnectionPool(node.conninfo, open=False, **options)
                for name, node in pg.nodes.items()
            }
            for pool in made.values():
                await pool.open()
            return made

        asyncs = call(make())
        try:
            yield asyncs, call
        finally:
            for pool in asyncs.values():
                call(pool.close())


@contextmanager
def _over_pools(
    kind: Kind, pools: dict[str, Any], call: Callable[[Any], Any], **options: Any
) -> Iterator[App]:
    """Open a router over the application's pools, on the loop where they live."""
    from lsn_consistency import AsyncRouter, Router, Session

    nodes: dict[str, Any] = dict(pools)
    primary = nodes.pop("primary")
    with Session():
        if kind == "blocking":
            with Router(primary=primary, replicas=nodes, **options) as router:
                yield App(kind, router)
            return
        app = App(kind, AsyncRouter(primary=primary, replicas=nodes, **options))
        app.call = lambda result, seconds=30.0: (  # type: ignore[method-assign]
            call(result) if asyncio.iscoroutine(result) else result
        )
        app.call(app.router.open())
        try:
            yield app
        finally:
            app.call(app.router.close())


@pytest.mark.parametrize("autocommit", [False, True])
def test_the_users_own_pools_work_and_are_unharmed_afterwards(
    kind: Kind, pg: EmbeddedCluster, table: str, autocommit: bool
) -> None:
    """Given pools route as made ones do, stay open, and their connections can still write."""
    kwargs = {"autocommit": autocommit, "row_factory": dict_row}
    with _own_pools(kind, pg, min_size=1, max_size=2, kwargs=kwargs) as (pools, call):
        with _over_pools(kind, pools, call, wait_seconds=0.5) as app:
            counts = []
            for number in range(5):
                app.write(f"INSERT INTO {table} VALUES (%s)", [number])
                with app.reading() as conn:
                    counts.append((conn.value(f"SELECT count(*) FROM {table}"), conn.port))
                with (
                    pytest.raises(psycopg.errors.ReadOnlySqlTransaction),
                    app.reading(node="primary") as conn,
                ):
                    conn.execute(f"INSERT INTO {table} VALUES (77)")
            for replica in pg.replicas.values():
                replica.pause_replay()
            app.write(f"INSERT INTO {table} VALUES (5)")
            with app.reading() as conn:
                fallback = (conn.value(f"SELECT count(*) FROM {table}"), conn.port)
            reason = _last_reason()
            states = [_state(pools["primary"], call) for _ in range(4)]
        after = _state(pools["primary"], call)
        written = _insert(pools["primary"], call, table)
        stats = {name: pool.get_stats() for name, pool in pools.items()}
        closed = [pool.closed for pool in pools.values()]
    assert list(range(1, 6)) == [count for count, _ in counts]
    assert pg.primary.port not in {port for _, port in counts}
    assert ((6, pg.primary.port), Reason.NOT_CAUGHT_UP) == (fallback, reason)
    assert [(None, autocommit, "off")] * 5 == [*states, after]
    assert 1 == written
    assert [False] * 3 == closed
    assert all(each["pool_size"] == each["pool_available"] for each in stats.values())


def _last_reason() -> Reason | None:
    route = current_session().last_route
    return None if route is None else route.reason


def _state(pool: Any, call: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
    """Return what the owner of a pool finds on a connection of it."""
    conn = call(pool.getconn())
    try:
        cursor = call(conn.execute("SHOW transaction_read_only"))
        row = call(cursor.fetchone())
        call(conn.rollback())
        setting = row["transaction_read_only"] if isinstance(row, dict) else row[0]
        return conn.read_only, conn.autocommit, setting
    finally:
        call(pool.putconn(conn))


def _insert(pool: Any, call: Callable[[Any], Any], table: str) -> int:
    conn = call(pool.getconn())
    try:
        cursor = call(conn.execute(f"INSERT INTO {table} VALUES (100)".encode()))
        call(conn.commit())
        return int(cursor.rowcount)
    finally:
        call(pool.putconn(conn))


def test_the_read_only_attribute_of_a_given_connection_is_restored(
    kind: Kind, pg: EmbeddedCluster
) -> None:
    """An owner who had set read_only to False finds it so again after a read."""

    def configure(conn: Any) -> None:
        conn.read_only = False

    async def configure_async(conn: Any) -> None:
        await conn.set_read_only(False)

    chosen = configure if kind == "blocking" else configure_async
    with (
        _own_pools(kind, pg, min_size=1, max_size=1, configure=chosen) as (pools, call),
        _over_pools(kind, pools, call, wait_seconds=0.5) as app,
    ):
        with app.reading(node="primary") as conn:
            during = conn.raw.read_only
        after = _state(pools["primary"], call)[0]
        with pytest.raises(ZeroDivisionError), app.reading(node="primary"):
            raise ZeroDivisionError
        after_error = _state(pools["primary"], call)[0]
    assert (True, False, False) == (during, after, after_error)


def test_an_error_that_the_block_swallows_does_not_spoil_the_connection(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """A block may end in a failed transaction; the next one on that connection works."""
    with opened(wait_seconds=5.0, pool_options={"min_size": 1, "max_size": 1}) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        for entered in (app.reading, app.writing):
            with entered() as conn, pytest.raises(psycopg.errors.UndefinedColumn):
                conn.execute("SELECT nonsense")
        app.write(f"INSERT INTO {table} VALUES (2)")
        answer = app.ask(f"SELECT count(*) FROM {table}")
        wait_until(lambda: all(node["reads_in_flight"] == 0 for node in app.snapshot().values()))
    assert 2 == answer.value
