"""
One blocking-looking surface over both routers, so that one test runs both.

`open_router("async", ...)` keeps an event loop in a thread of its own and runs each call there as
a task that inherits the caller's context: its session, its consistency block. Many calls at once
are threads here and, for the async router, as many tasks there.

A scenario proves where a read went by the server's own ``inet_server_port()``: `App.ask` returns
it beside the rows. The router's word is only in `Answer.route`.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lsn_consistency import (
    AsyncRouter,
    Consistency,
    Lsn,
    Route,
    Router,
    Session,
    Token,
    current_session,
)
from lsn_consistency.events import Event
from lsn_consistency.testing import EmbeddedCluster, Node

Kind = Literal["blocking", "async"]
KINDS: tuple[Kind, ...] = ("blocking", "async")

CALL_SECONDS = 60.0
"""No call of a test takes longer: one that hangs fails instead of holding up the run."""

POLL_SECONDS = 0.005
MEASURED_SECONDS = 2.0
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Answer:
    """
    Hold what a read gave, the port of the server that gave it, and how long it took.
    """

    rows: list[Any]
    port: int
    route: Route
    seconds: float

    @property
    def value(self) -> Any:
        """
        Return the first column of the first row.
        """
        return self.rows[0][0]


class Connection:
    """
    Wrap a blocking or an async psycopg connection; ``raw`` is the connection itself.
    """

    def __init__(self, app: App, raw: Any) -> None:
        self._app = app
        self.raw = raw

    def execute(self, statement: str, parameters: Sequence[Any] | None = None) -> list[Any]:
        """
        Run a statement and return its rows, none where it gives none.
        """
        cursor = self._app.call(self.raw.execute(statement.encode(), parameters))
        return self._app.call(cursor.fetchall()) if cursor.description else []

    def value(self, statement: str, parameters: Sequence[Any] | None = None) -> Any:
        """
        Return the first column of the first row of a statement.
        """
        row = self.execute(statement, parameters)[0]
        return next(iter(row.values())) if isinstance(row, dict) else row[0]

    @property
    def port(self) -> int:
        """
        Ask the server for its port.
        """
        return int(self.value("SELECT inet_server_port()"))

    def commit(self) -> None:
        """
        Commit the transaction that is open.
        """
        self._app.call(self.raw.commit())

    def rollback(self) -> None:
        """
        Roll the transaction back that is open.
        """
        self._app.call(self.raw.rollback())

    def set_isolation_level(self, level: Any) -> None:
        """
        Set the isolation level of the transactions to come.
        """
        self._app.call(self.raw.set_isolation_level(level))


class App:
    """
    Use a router as an application would, from any thread.
    """

    def __init__(
        self,
        kind: Kind,
        router: Router | AsyncRouter | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
        events: list[Event] | None = None,
    ) -> None:
        self.kind = kind
        self.router: Any = router
        self.loop = loop
        self.events: list[Event] = [] if events is None else events

    # Carrying out

    def call(self, result: Any, seconds: float = CALL_SECONDS) -> Any:
        """
        Return ``result``; what an async router gave is awaited on the loop, in this context.
        """
        if asyncio.iscoroutine(result):
            return self.submit(result).result(seconds)
        return result

    def submit(self, coroutine: Coroutine[Any, Any, _Result]) -> Any:
        """
        Start a coroutine as a task of the loop and return its `concurrent.futures.Future`.
        """
        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def each(self, count: int, scenario: Callable[[int], _Result]) -> list[_Result]:
        """
        Run ``scenario(0)`` ... ``scenario(count - 1)`` at once and return what each gave.

        Every one has the caller's context, so they share its session unless they open their own.
        """
        futures = self.start_each(count, scenario)
        return [future.result(CALL_SECONDS) for future in futures]

    def start_each(self, count: int, scenario: Callable[[int], _Result]) -> list[Any]:
        """
        Do what `each` does, and return the futures at once.
        """
        pool = ThreadPoolExecutor(count, thread_name_prefix="scenario")
        futures = [
            pool.submit(contextvars.copy_context().run, scenario, number) for number in range(count)
        ]
        pool.shutdown(wait=False)
        return futures

    # Sessions

    def session(self, token: Token | None = None) -> Session:
        """
        Return a new session, to be entered: one unit of work of one client.
        """
        return Session(token)

    # Reads and writes

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """
        Enter `router.write()`.
        """
        with self._entered(self.router.write()) as conn:
            yield conn

    @contextmanager
    def reading(self, token: Token | None = None, **options: Any) -> Iterator[Connection]:
        """
        Enter `router.read()`.
        """
        with self._entered(self.router.read(token, **options)) as conn:
            yield conn

    def write(self, statement: str, parameters: Sequence[Any] | None = None) -> list[Any]:
        """
        Run one statement in a transaction of the primary and return its rows.
        """
        with self.writing() as conn:
            return conn.execute(statement, parameters)

    def read(
        self, statement: str, parameters: Sequence[Any] | None = None, **options: Any
    ) -> list[Any]:
        """
        Run one statement in a routed read and return its rows.
        """
        with self.reading(**options) as conn:
            return conn.execute(statement, parameters)

    def ask(
        self, statement: str, parameters: Sequence[Any] | None = None, **options: Any
    ) -> Answer:
        """
        Do what `read` does, and tell which server answered.
        """
        began = time.monotonic()
        with self.reading(**options) as conn:
            rows = conn.execute(statement, parameters)
            port = conn.port
        route = current_session().last_route
        assert route is not None
        return Answer(rows, port, route, time.monotonic() - began)

    read_with_port = ask

    def where(self, **options: Any) -> int:
        """
        Return the port of the server that serves a read.
        """
        with self.reading(**options) as conn:
            return conn.port

    def run_read(
        self,
        function: Callable[[Connection], _Result],
        consistency: Consistency | None = None,
    ) -> _Result:
        """
        Call `router.run_read` with a function that takes a `Connection`.
        """

        def blocking(raw: Any) -> _Result:
            return function(Connection(self, raw))

        async def in_a_thread(raw: Any) -> _Result:
            # The function blocks on this loop, so it runs beside it.
            return await asyncio.to_thread(blocking, raw)

        passed = blocking if self.kind == "blocking" else in_a_thread
        result: _Result = self.call(self.router.run_read(passed, consistency=consistency))
        return result

    def choose(self, token: Token | None = None, **options: Any) -> Route:
        """
        Call `router.choose`.
        """
        route: Route = self.call(self.router.choose(token, **options))
        return route

    def token(self) -> Token:
        """
        Call `router.token`.
        """
        token: Token = self.call(self.router.token())
        return token

    def capture(self) -> None:
        """
        Call `router.capture`.
        """
        self.call(self.router.capture())

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """
        Call `router.snapshot`.
        """
        snapshot: dict[str, dict[str, Any]] = self.router.snapshot()
        return snapshot

    def close(self) -> None:
        """
        Call `router.close`.
        """
        self.call(self.router.close())

    # Watching

    def events_of(self, kind: type[Any]) -> list[Any]:
        """
        Return the events of one kind so far.
        """
        return [event for event in list(self.events) if isinstance(event, kind)]

    def wait_for(
        self,
        condition: Callable[[dict[str, dict[str, Any]]], Any],
        seconds: float = 10.0,
    ) -> None:
        """
        Wait until the snapshot fulfils a condition.
        """
        wait_until(lambda: condition(self.snapshot()), seconds, lambda: str(self.snapshot()))

    def wait_healthy(self, seconds: float = 10.0) -> None:
        """
        Wait until every node is observed, and for a moment until every lag is measured.

        What is not flushed yet on the primary keeps the lags unknown; so does a paused replica.
        """
        self.wait_for(lambda nodes: all(node["healthy"] for node in nodes.values()), seconds)
        ends = time.monotonic() + MEASURED_SECONDS
        while time.monotonic() < ends:
            if all(node["lag_seconds"] is not None for node in self.snapshot().values()):
                return
            time.sleep(POLL_SECONDS)

    @property
    def pools(self) -> Mapping[str, Any]:
        """
        Return the pools by node name; a look inside, for the tests of leaks.
        """
        pools: dict[str, Any] = self.router._pools
        return pools

    @property
    def cluster_state(self) -> Any:
        """
        Return the shared state of the nodes; a look inside, for the tests of leaks.
        """
        return self.router._core.cluster

    @contextmanager
    def _entered(self, manager: Any) -> Iterator[Connection]:
        if self.kind == "blocking":
            with manager as raw:
                yield Connection(self, raw)
            return
        raw = self.call(manager.__aenter__())
        try:
            yield Connection(self, raw)
        except BaseException as error:
            if not self.call(manager.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self.call(manager.__aexit__(None, None, None))


@contextmanager
def open_router(
    kind: Kind,
    pg: EmbeddedCluster,
    *,
    primary: Any = None,
    replicas: Any = None,
    **options: Any,
) -> Iterator[App]:
    """
    Open a router over a cluster, within a session of its own, and see that it leaves nothing.

    ``primary`` and ``replicas`` take the place of the cluster's. Every event is kept in
    `App.events`, beside an ``on_event`` of the test's own.
    """
    nodes: dict[str, Any] = {
        "primary": pg.primary.conninfo if primary is None else primary,
        "replicas": {name: node.conninfo for name, node in pg.replicas.items()}
        if replicas is None
        else replicas,
    }
    events: list[Event] = []
    hook = options.pop("on_event", None)

    def on_event(event: Event) -> None:
        events.append(event)
        if hook is not None:
            hook(event)

    options["on_event"] = on_event
    with Session():
        if kind == "blocking":
            before = set(threading.enumerate())
            with Router(**nodes, **options) as router:
                yield App(kind, router, events=events)
            wait_until(lambda: not _threads_of_router(before), 5, lambda: str(before))
            return
        with running_loop() as loop:
            app = App(kind, AsyncRouter(**nodes, **options), loop, events)
            app.call(app.router.open())
            try:
                yield app
            finally:
                app.call(app.router.close())
            assert [] == app.call(_tasks_left())


@contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """
    Run an event loop in a thread for the time of the block.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="event loop of a test")
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CALL_SECONDS)
        if not loop.is_running():
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()


async def _tasks_left() -> list[str]:
    return [repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()]


def _threads_of_router(before: set[threading.Thread]) -> list[threading.Thread]:
    new = set(threading.enumerate()) - before
    return [thread for thread in new if not thread.name.startswith("scenario")]


def wait_until(
    condition: Callable[[], Any],
    seconds: float = 10.0,
    describe: Callable[[], str] = lambda: "",
) -> None:
    """
    Wait until a condition holds; fail with a description of what is instead.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {seconds:g} s: {describe()}")
        time.sleep(POLL_SECONDS)


def ports(pg: EmbeddedCluster) -> dict[str, int]:
    """
    Return the port of every node by name.
    """
    return {name: node.port for name, node in pg.nodes.items()}


def make_table(pg: EmbeddedCluster, name: str) -> str:
    """
    Make an empty table ``(id int primary key, value int)`` that every replica has.
    """
    pg.primary.execute(
        f"DROP TABLE IF EXISTS {name};"
        f"CREATE TABLE {name} (id int PRIMARY KEY, value int NOT NULL DEFAULT 0);"
        f"GRANT ALL ON {name} TO app"
    )
    pg.wait_caught_up()
    return name


def restartpoints(pg: EmbeddedCluster) -> None:
    """
    Let the control file of every node name its timeline, which is what a plain role goes by.
    """
    leader = pg.leader
    leader.execute("CHECKPOINT")
    pg.wait_caught_up()
    for node in pg.nodes.values():
        if node is not leader:
            node.execute("CHECKPOINT")


def insert_lsn(node: Node) -> Lsn:
    """
    Return the primary's insert position as its function gives it, headers and all.
    """
    return Lsn.parse(node.value("SELECT pg_current_wal_insert_lsn()::text"))


def write_wal(node: Node, megabytes: int) -> None:
    """
    Have a primary write and flush that much of the log, with no effect on any table.
    """
    with node.connect() as conn:
        for _ in range(megabytes):
            conn.execute("SELECT pg_logical_emit_message(false, 'bulk', repeat('x', 1 << 20))")
        conn.execute("SELECT pg_logical_emit_message(true, 'end', '')")
