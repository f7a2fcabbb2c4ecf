"""Routers open and close: twice, again, while in use; and nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import psycopg
import pytest

from lsn_consistency import ConfigurationError, Session
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.harness import CALL_SECONDS, App, Kind, running_loop, wait_until
from tests.cluster.web import PATIENT, make_router, open_web

CLOSE_SECONDS = 6.0
ENDED = (ConfigurationError, psycopg.OperationalError)
NAME = "lifespan_test"
COUNT = "SELECT count(*) FROM items"
BACKENDS = """
    SELECT count(*) FILTER (WHERE application_name = 'lsn_consistency'),
           count(*) FILTER (WHERE application_name = 'lifespan_test')
      FROM pg_stat_activity
"""

Made = Callable[..., AbstractContextManager[App]]


@contextmanager
def make(kind: Kind, pg: EmbeddedCluster, **options: Any) -> Iterator[App]:
    """Make a router whose connections have a name, and do not open it."""
    named = {
        "primary": pg.primary.conninfo_for(application_name=NAME),
        "replicas": {
            name: node.conninfo_for(application_name=NAME) for name, node in pg.replicas.items()
        },
    }
    router = make_router(kind, pg, **{**named, **options})
    with Session():
        if kind == "blocking":
            yield App(kind, router)
            router.close()
            return
        with running_loop() as loop:
            app = App(kind, router, loop)
            yield app
            app.close()


@pytest.fixture
def made(kind: Kind, pg: EmbeddedCluster) -> Made:
    """Offer `make` for this kind and the session's cluster."""
    return partial(make, kind, pg)


def open_it(app: App) -> None:
    app.call(app.router.open())


def backends(pg: EmbeddedCluster) -> dict[str, tuple[int, int]]:
    """Return how many connections of monitors and of pools every node has."""
    found = {name: node.execute(BACKENDS)[0] for name, node in pg.nodes.items()}
    return {name: (monitors, pooled) for name, (monitors, pooled) in found.items()}


def wait_gone(pg: EmbeddedCluster) -> None:
    """Wait until no node has a connection left; the server takes a moment to notice an end."""
    wait_until(lambda: set(backends(pg).values()) == {(0, 0)}, describe=lambda: str(backends(pg)))


USES: dict[str, Callable[[App], object]] = {
    "read": lambda app: app.read("SELECT 1"),
    "write": lambda app: app.write("SELECT 1"),
    "run_read": lambda app: app.run_read(lambda conn: conn.execute("SELECT 1")),
    "choose": lambda app: app.choose(),
    "token": lambda app: app.token(),
    "capture": lambda app: app.capture(),
    "snapshot": lambda app: app.snapshot(),
}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_router_that_is_not_open_says_what_to_do(made: Made, moment: str) -> None:
    """Before open and after close, every operation names the three ways to open a router."""
    said: dict[str, str] = {}
    with made() as app:
        if moment == "after":
            open_it(app)
            app.close()
        for name, use in USES.items():
            with pytest.raises(ConfigurationError) as caught:
                use(app)
            said[name] = str(caught.value)
    advice = (
        "the router is not open: use it as a context manager, call open(), or pass "
        "lifespan=router.lifespan to the application"
    )
    assert dict.fromkeys(USES, advice) == said


def test_opening_twice_opens_once(made: Made, pg: EmbeddedCluster, table: str) -> None:
    """A second open() changes nothing: one monitor a node, the same pools."""
    with made(pool_options={"min_size": 2, "max_size": 2}) as app:
        open_it(app)
        pools = dict(app.pools)
        open_it(app)
        app.each(4, lambda _: open_it(app))
        assert app.pools == pools
        wait_until(
            lambda: set(backends(pg).values()) == {(1, 2)}, describe=lambda: str(backends(pg))
        )


def test_closing_twice_and_opening_again(made: Made, pg: EmbeddedCluster, table: str) -> None:
    """A router that was closed, even twice, works again after open()."""
    with made() as app:
        counts = []
        for number in range(3):
            open_it(app)
            app.write("INSERT INTO items VALUES (%s)", [number])
            counts.append(app.ask(COUNT).value)
            app.close()
            app.close()
            wait_gone(pg)
    assert [1, 2, 3] == counts


def test_the_lifespan_opens_and_closes(kind: Kind, pg: EmbeddedCluster, table: str) -> None:
    """The application's life is the router's: open at the first request, closed at the end."""
    with open_web(kind, pg) as web:
        healthy = [node["healthy"] for node in web.router.snapshot().values()]
        status = web.browser().get("/items").status_code
    assert ([True] * 3, 200) == (healthy, status)
    with pytest.raises(ConfigurationError, match="the router is not open"):
        web.router.snapshot()


def test_nothing_is_left_after_close(made: Made, pg: EmbeddedCluster, table: str) -> None:
    """After many reads and writes at once, no thread, task or connection is left."""
    before = set(threading.enumerate())

    def client(number: int) -> int:
        with Session():
            app.write("INSERT INTO items VALUES (%s)", [number])
            return int(app.ask("SELECT count(*) FROM items WHERE id = %s", [number]).value)

    with made() as app:
        open_it(app)
        wait_until(lambda: {1} == {monitors for monitors, _ in backends(pg).values()})
        counts = app.each(12, client)
        app.close()
        wait_gone(pg)
        wait_until(lambda: not leftovers(app, before), describe=lambda: str(leftovers(app, before)))
    assert [1] * 12 == counts


def leftovers(app: App, before: set[threading.Thread]) -> list[str]:
    """Return the threads and tasks that a router could have left."""
    threads = set(threading.enumerate()) - before
    names = [each.name for each in threads if not each.name.startswith(("scenario", "event loop"))]
    return names if app.loop is None else names + app.call(tasks_left())


async def tasks_left() -> list[str]:
    return [repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()]


def test_closing_waits_for_no_connection_in_use(
    made: Made, pg: EmbeddedCluster, table: str
) -> None:
    """close() returns while a read holds its connection; that ends well, and is closed then."""
    entered, release = threading.Event(), threading.Event()

    def hold(_: int) -> int:
        with Session(), app.reading() as conn:
            entered.set()
            assert release.wait(CALL_SECONDS)
            return int(conn.value(COUNT))

    with made() as app:
        open_it(app)
        (held,) = app.start_each(1, hold)
        assert entered.wait(CALL_SECONDS)
        took = seconds_of(app.close)
        release.set()
        assert 0 == held.result(CALL_SECONDS)
        wait_gone(pg)
    assert took < CLOSE_SECONDS


def test_closing_ends_reads_that_wait(made: Made, pg: EmbeddedCluster, table: str) -> None:
    """Reads that wait for a replica when the router closes end in time, with an error of use."""
    with made(wait_seconds=1.5, **PATIENT) as app:
        open_it(app)
        for replica in pg.replicas.values():
            replica.pause_replay()
        app.write("INSERT INTO items VALUES (1)")
        futures = app.start_each(5, lambda _: app.ask(COUNT).value)
        positions = app.cluster_state.positions
        wait_until(lambda: len(positions) == 5, describe=lambda: str(len(positions)))
        took = seconds_of(app.close)
        errors = [future.exception(CLOSE_SECONDS) for future in futures]
        wait_gone(pg)
    assert took < CLOSE_SECONDS
    assert [True] * 5 == [isinstance(error, ENDED) for error in errors]
    assert 0 == len(positions)


def seconds_of(function: Callable[[], object]) -> float:
    began = time.monotonic()
    function()
    return time.monotonic() - began


def test_an_interrupted_open_leaves_nothing(pg: EmbeddedCluster) -> None:
    """An open() that is cancelled leaves no task, and the router can be opened again."""
    pg.replicas["replica_1"].freeze()

    async def scenario() -> tuple[list[str], bool]:
        router = make_router("async", pg, probe_timeout=5.0, connect_timeout=5.0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await router.open()
        left = await tasks_left()
        pg.replicas["replica_1"].thaw()
        await router.open()
        healthy = all(node["healthy"] for node in router.snapshot().values())
        await router.close()
        return left, healthy

    assert ([], True) == asyncio.run(scenario())
