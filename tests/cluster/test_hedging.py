"""Two replicas asked the same: the first answer counts, and nothing is left of the other."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest

from lsn_consistency import (
    ConfigurationError,
    Consistency,
    Reason,
    Session,
    Token,
    _workers,
    consistency,
    current_session,
)
from lsn_consistency.events import ReadHedged, ReadRetried
from lsn_consistency.testing import EmbeddedCluster, Node
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App, open_router, wait_until

SOON = 0.05
"""After this many seconds a second replica is asked."""

LONG = 60.0
"""A statement that takes this long ends only if it is cancelled."""

PATIENCE = 20.0
"""A read that is done by then has not waited for a `LONG` statement."""


class Reader:
    """
    Read a value and the port of the server, having slept there first on some of the servers.

    Called with the connection of a blocking or, as `awaited`, of an async router. It keeps what
    every run saw, in ``ports``, and whatever ``values`` they read before they slept.
    """

    def __init__(
        self,
        slow: Collection[int] = (),
        seconds: float = LONG,
        statement: str = "SELECT 42",
    ) -> None:
        self.slow = dict.fromkeys(slow, seconds)
        self.statement = statement
        self.ports: list[int] = []
        self.values: list[Any] = []

    def _steps(self) -> Generator[str, Any, tuple[int, Any]]:
        # A generator of statements, which is sent what each of them gave.
        port = yield "SELECT inet_server_port()"
        self.ports.append(port)
        value = yield self.statement
        self.values.append(value)
        if port in self.slow:
            yield f"SELECT pg_sleep({self.slow[port]}) IS NULL"
        return port, value

    def blocking(self, conn: Any) -> tuple[int, Any]:
        steps = self._steps()
        statement = next(steps)
        while True:
            row = conn.execute(statement).fetchone()
            try:
                statement = steps.send(row[0])
            except StopIteration as done:
                return cast(tuple[int, Any], done.value)

    async def awaited(self, conn: Any) -> tuple[int, Any]:
        steps = self._steps()
        statement = next(steps)
        while True:
            row = await (await conn.execute(statement)).fetchone()
            try:
                statement = steps.send(row[0])
            except StopIteration as done:
                return cast(tuple[int, Any], done.value)

    def of(self, app: App) -> Any:
        return self.blocking if app.kind == "blocking" else self.awaited


def run(app: App, reader: Reader, hedge_after: float | None = SOON, **options: Any) -> Any:
    """Run a reader within the time of a read that nothing holds up."""
    began = time.monotonic()
    answer = app.call(app.router.run_read(reader.of(app), hedge_after=hedge_after, **options))
    assert time.monotonic() - began < PATIENCE
    return answer


@contextmanager
def first_on(app: App, name: str, token: Token | None = None) -> Iterator[Session]:
    """Open a session whose reads go to that replica first."""
    with app.session(token) as session:
        session.node = name
        yield session


def sleeping(node: Node) -> int:
    """Count the statements that sleep on a server."""
    return int(
        node.value(
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active'"
            " AND query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()"
        )
    )


def connected(app: App, node: Node) -> int:
    """Return how many connections the pool of a node has opened so far."""
    return int(app.pools[node.name].get_stats().get("connections_num", 0))


def held(app: App) -> dict[str, int]:
    """Return what reads hold that are under way: by node, and connections out of their pools."""
    found = {name: node.in_flight for name, node in app.cluster_state.nodes.items()}
    for name, pool in app.pools.items():
        stats = pool.get_stats()
        found[f"{name} taken"] = stats["pool_size"] - stats["pool_available"]
    return {name: count for name, count in found.items() if count}


def wait_free(app: App, seconds: float = 10.0) -> None:
    """Wait until nothing is held any more."""
    wait_until(lambda: not held(app), seconds, lambda: str(held(app)))


def ready(app: App) -> None:
    """Wait until both replicas may serve."""
    app.wait_healthy()
    app.wait_for(
        lambda nodes: all(
            node["lag_seconds"] is not None and node["lag_seconds"] < 1.5 for node in nodes.values()
        )
    )


def test_the_answer_of_the_second_replica_is_taken_when_the_first_is_slow(
    opened: OpenRouter, pg: EmbeddedCluster
) -> None:
    """The loser's statement is cancelled on its server, and its connection is used again."""
    slow, quick = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with opened(pool_options={"min_size": 2, "max_size": 2}) as app:
        ready(app)
        wait_free(app)
        before = connected(app, slow)
        reader = Reader({slow.port})
        with first_on(app, slow.name) as session:
            port, value = run(app, reader)
            route, node = session.last_route, session.node
        wait_until(lambda: sleeping(slow) == 0)
        wait_free(app)
        hedged = app.events_of(ReadHedged)
        after = connected(app, slow)
        with first_on(app, slow.name):
            again = run(app, Reader())
    assert (quick.port, 42) == (port, value)
    assert [slow.port, quick.port] == reader.ports
    assert [ReadHedged(slow.name, quick.name, True)] == hedged
    assert route is not None
    assert (quick.name, quick.name) == (route.name, node)
    assert before == after
    assert (slow.port, 42) == again


def test_a_first_answer_that_comes_late_still_counts_if_it_is_the_first(
    opened: OpenRouter, pg: EmbeddedCluster
) -> None:
    """Both are slow and the first is less so: the hedge is the loser and is cancelled."""
    first, second = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with opened() as app:
        ready(app)
        reader = Reader({first.port, second.port})
        reader.slow[first.port] = 1.0
        with first_on(app, first.name):
            port, _ = run(app, reader)
        wait_until(lambda: sleeping(second) == 0)
        wait_free(app)
        hedged = app.events_of(ReadHedged)
    assert first.port == port
    assert {first.port, second.port} == set(reader.ports)
    assert [ReadHedged(first.name, second.name, False)] == hedged


@pytest.mark.parametrize("libpq", ["newer", "before 17"])
def test_a_frozen_replica_is_not_waited_for(
    opened: OpenRouter, pg: EmbeddedCluster, libpq: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hangs cannot be cancelled: its connection is cut off, and the others go on."""
    if libpq == "before 17":
        monkeypatch.setattr(psycopg.capabilities, "has_cancel_safe", lambda check=False: False)
    frozen, well = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with opened(poll_interval=30.0, max_lag_seconds=60.0, pin_seconds=60.0) as app:
        ready(app)
        before = connected(app, frozen)
        frozen.freeze()
        with first_on(app, frozen.name):
            port, value = run(app, Reader())
        # The read's share of the frozen node is given back while it is frozen.
        nodes = app.cluster_state.nodes
        wait_until(lambda: nodes[frozen.name].in_flight == 0)
        frozen.thaw()
        wait_free(app)
        wait_until(lambda: connected(app, frozen) > before)
        with first_on(app, frozen.name):
            again = run(app, Reader())
    assert (well.port, 42) == (port, value)
    assert (frozen.port, 42) == again


def test_a_read_in_time_is_not_hedged(opened: OpenRouter, pg: EmbeddedCluster) -> None:
    """A quick answer asks nobody else."""
    with opened() as app:
        ready(app)
        readers = [Reader() for _ in range(20)]
        for reader in readers:
            run(app, reader, hedge_after=PATIENCE)
        assert [] == app.events_of(ReadHedged)
    assert [1] * 20 == [len(reader.ports) for reader in readers]


def test_without_a_second_replica_that_satisfies_the_token_nobody_else_is_asked(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """A hedge holds the same promise as the read, and never goes to the primary."""
    slow, paused = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with opened(wait_seconds=10.0) as app:
        ready(app)
        paused.pause_replay()
        with first_on(app, slow.name):
            app.write(f"INSERT INTO {table} VALUES (1)")
            reader = Reader({slow.port}, 0.5, f"SELECT count(*) FROM {table}")
            answer = run(app, reader)
        assert [] == app.events_of(ReadHedged)
    assert (slow.port, 1) == answer
    assert [slow.port] == reader.ports


def test_a_read_of_the_primary_is_not_hedged(opened: OpenRouter, pg: EmbeddedCluster) -> None:
    """STRONG is the primary's, however slow it is."""
    with opened() as app:
        ready(app)
        reader = Reader({pg.primary.port}, 0.5)
        answer = run(app, reader, consistency=Consistency.STRONG)
    assert (pg.primary.port, 42) == answer
    assert [pg.primary.port] == reader.ports


@pytest.mark.parametrize(("share", "reads", "least", "most"), [(0.0, 10, 0, 0), (0.1, 40, 12, 14)])
def test_hedges_are_a_share_of_the_reads(
    opened: OpenRouter, pg: EmbeddedCluster, share: float, reads: int, least: int, most: int
) -> None:
    """Ten in a row, then one for every tenth read; the others wait for their replica."""
    slow = pg.replicas["replica_1"]
    with opened(hedge_share=share) as app:
        ready(app)
        ports = []
        for _ in range(reads):
            reader = Reader({slow.port}, 0.2)
            with first_on(app, slow.name):
                run(app, reader, hedge_after=0.01)
            ports += reader.ports
        hedged = len(app.events_of(ReadHedged))
        wait_free(app)
    assert least <= hedged <= most
    # A slow run can be cancelled before it has told where it is.
    assert reads <= len(ports) <= reads + hedged


def test_the_session_advances_by_the_winner_alone(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """What only the loser saw was shown to nobody: the session does not wait for it."""
    slow, behind = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with opened(max_lag_seconds=600.0, pin_seconds=600.0) as app:
        ready(app)
        app.write(f"INSERT INTO {table} VALUES (1)")
        pg.wait_caught_up()
        token = app.token()
        (asked,) = token.positions.values()
        app.wait_for(
            lambda nodes: all(nodes[name]["replay_lsn"] >= asked.lsn for name in pg.replicas)
        )
        behind.pause_replay()
        pg.primary.execute(f"INSERT INTO {table} VALUES (2)")
        wait_until(lambda: slow.value(f"SELECT count(*) FROM {table}") == 2)
        reader = Reader({slow.port}, LONG, f"SELECT count(*) FROM {table}")
        with first_on(app, slow.name, token) as session:
            answer = run(app, reader)
            (position,) = session.token.positions.values()
            wait_until(lambda: sleeping(slow) == 0)
            wait_free(app)
            (later,) = session.token.positions.values()
            pinned = session.token.pin_until
        shown, seen = behind.replay_lsn(), slow.replay_lsn()
    assert (behind.port, 1) == answer
    assert [2, 1] == reader.values
    assert position.lsn <= shown < seen
    assert (position, None) == (later, pinned)


def _terminate_sleepers(node: Node) -> None:
    wait_until(lambda: sleeping(node))
    node.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE state = 'active'"
        " AND query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()"
    )


def test_one_that_fails_leaves_the_answer_to_the_other(
    opened: OpenRouter, pg: EmbeddedCluster
) -> None:
    """A node that dies under one run is no reason to run the function a third time."""
    first, second = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with opened() as app:
        ready(app)
        reader = Reader({first.port, second.port})
        reader.slow[second.port] = 2.0
        with first_on(app, first.name):
            (running,) = app.start_each(1, lambda _: run(app, reader))
            wait_until(lambda: sleeping(second))
            _terminate_sleepers(first)
            answer = running.result(PATIENCE)
        assert [] == app.events_of(ReadRetried)
        wait_free(app)
    assert (second.port, 42) == answer
    assert [first.port, second.port] == reader.ports


def test_when_both_fail_the_read_runs_where_it_has_not_run(
    opened: OpenRouter, pg: EmbeddedCluster
) -> None:
    """Both replicas are out; the primary is the last one and answers."""
    first, second = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with opened() as app:
        ready(app)
        reader = Reader({first.port, second.port})
        with first_on(app, first.name):
            (running,) = app.start_each(1, lambda _: run(app, reader))
            wait_until(lambda: sleeping(second))
            _terminate_sleepers(first)
            _terminate_sleepers(second)
            answer = running.result(PATIENCE)
        retried = {each.name for each in app.events_of(ReadRetried)}
        wait_free(app)
    assert (pg.primary.port, 42) == answer
    assert [first.port, second.port, pg.primary.port] == reader.ports
    assert {first.name, second.name} == retried


def test_an_error_of_the_function_is_an_answer(opened: OpenRouter, pg: EmbeddedCluster) -> None:
    """What the first to end raises is raised; the other is cancelled all the same."""
    slow = pg.replicas["replica_1"]
    with opened() as app:
        ready(app)
        reader = Reader({slow.port})

        def blocking(conn: Any) -> Any:
            port, _ = reader.blocking(conn)
            raise LookupError(port)

        async def awaited(conn: Any) -> Any:
            port, _ = await reader.awaited(conn)
            raise LookupError(port)

        function = blocking if app.kind == "blocking" else awaited
        with first_on(app, slow.name), pytest.raises(LookupError) as raised:
            app.call(app.router.run_read(function, hedge_after=SOON))
        wait_until(lambda: sleeping(slow) == 0)
        wait_free(app)
    assert (pg.replicas["replica_2"].port,) == raised.value.args


def test_a_loser_that_will_not_end_is_cut_off(opened: OpenRouter, pg: EmbeddedCluster) -> None:
    """A function that goes on after its statement was cancelled loses its connection."""
    slow, quick = pg.replicas["replica_1"], pg.replicas["replica_2"]
    ends: list[str] = []

    def blocking(conn: Any) -> int:
        port = conn.execute("SELECT inet_server_port()").fetchone()[0]
        if port == quick.port:
            return int(port)
        for _ in range(2):
            try:
                conn.execute(f"SELECT pg_sleep({LONG})")
            except psycopg.Error as error:
                ends.append(type(error).__name__)
                if not conn.closed:
                    conn.rollback()
        return int(port)

    async def awaited(conn: Any) -> int:
        port = (await (await conn.execute("SELECT inet_server_port()")).fetchone())[0]
        if port == quick.port:
            return int(port)
        for _ in range(2):
            try:
                await conn.execute(f"SELECT pg_sleep({LONG})")
            except (psycopg.Error, asyncio.CancelledError) as error:
                ends.append(type(error).__name__)
                if not conn.closed:
                    await conn.rollback()
        return int(port)

    with opened() as app:
        ready(app)
        function = blocking if app.kind == "blocking" else awaited
        with first_on(app, slow.name):
            began = time.monotonic()
            port = app.call(app.router.run_read(function, hedge_after=SOON))
            took = time.monotonic() - began
        wait_until(lambda: len(ends) == 2)
        wait_free(app)
        wait_until(lambda: sleeping(slow) == 0)
    assert quick.port == port
    assert took < PATIENCE
    assert "QueryCanceled" == ends[0] or app.kind == "async"


def test_a_cancelled_caller_leaves_nothing_running(pg: EmbeddedCluster, opened: OpenRouter) -> None:
    """Task cancelled, or Ctrl-C in the waiting thread: both statements end on their servers."""
    both = list(pg.replicas.values())
    with opened() as app:
        ready(app)
        reader = Reader({node.port for node in both})
        with first_on(app, "replica_1") as session:
            if app.kind == "async":
                task = app.submit(app.router.run_read(reader.awaited, hedge_after=SOON))
                wait_until(lambda: all(sleeping(node) for node in both))
                task.cancel()
                wait_until(task.done)
            else:
                interrupting = threading.Thread(
                    target=_interrupt_when, args=(both,), name="scenario interrupts"
                )
                interrupting.start()
                with pytest.raises(KeyboardInterrupt):
                    run(app, reader)
                interrupting.join()
        wait_until(lambda: not any(sleeping(node) for node in both))
        wait_free(app)
        pinned = session.token.pin_until
        with app.session():
            answer = run(app, Reader())
    assert {node.port for node in both} == set(reader.ports)
    # What the function saw may have been told to somebody.
    assert pinned is not None
    assert 42 == answer[1]


def _interrupt_when(nodes: list[Any]) -> None:
    wait_until(lambda: all(sleeping(node) for node in nodes))
    os.kill(os.getpid(), signal.SIGINT)


def test_many_hedged_reads_at_once_leave_nothing(opened: OpenRouter, pg: EmbeddedCluster) -> None:
    """More reads than there are threads for: all are answered, some without a hedge."""
    slow = pg.replicas["replica_1"]
    with opened(hedge_share=1.0, pool_options={"min_size": 2, "max_size": 8}) as app:
        ready(app)

        def read(_: int) -> Any:
            with first_on(app, slow.name):
                return run(app, Reader({slow.port}, 0.2))

        answers = app.each(60, read)
        wait_free(app)
        running = [thread.name for thread in threading.enumerate()]
    assert [42] * 60 == [value for _, value in answers]
    names = [name for name in running if name.startswith("lsn_consistency run_read")]
    assert len(names) <= 2 * _workers.MAX_RUNS


def test_without_a_free_thread_the_caller_reads_itself(
    pg: EmbeddedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of threads is bounded; who finds none waits for the one replica."""
    slow = pg.replicas["replica_1"]
    with open_router("blocking", pg) as app:
        monkeypatch.setattr(_workers, "MAX_RUNS", 0)
        ready(app)
        reader = Reader({slow.port}, 0.3)
        with first_on(app, slow.name):
            answer = run(app, reader)
    assert (slow.port, 42) == answer
    assert [slow.port] == reader.ports


def test_a_function_that_may_run_twice_cannot_write(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """Two writes in place of one would be worse than an error."""

    def blocking(conn: Any) -> None:
        with app.router.write() as primary:
            primary.execute(f"INSERT INTO {table} VALUES (1)")

    async def awaited(conn: Any) -> None:
        async with app.router.write() as primary:
            await primary.execute(f"INSERT INTO {table} VALUES (1)")

    with opened() as app:
        function = blocking if app.kind == "blocking" else awaited
        with pytest.raises(ConfigurationError, match="hedge_after"):
            app.call(app.router.run_read(function, hedge_after=SOON))
    assert 0 == pg.primary.value(f"SELECT count(*) FROM {table}")


@pytest.mark.parametrize("value", [-1, float("nan"), "1", True])
def test_a_time_that_is_none_is_refused(opened: OpenRouter, value: Any) -> None:
    """A number of seconds from 0 up, or None."""
    with opened() as app, pytest.raises(ConfigurationError, match="hedge_after takes a number"):
        app.call(app.router.run_read(Reader().of(app), hedge_after=value))


def test_the_function_finds_the_callers_session_and_level(opened: OpenRouter) -> None:
    """Threads and tasks carry the context of the caller."""
    found = []

    def blocking(conn: Any) -> None:
        found.append((current_session(), conn is not None))

    async def awaited(conn: Any) -> None:
        blocking(conn)

    with opened() as app:
        ready(app)
        function = blocking if app.kind == "blocking" else awaited
        with app.session() as session, consistency(Consistency.STRONG):
            app.call(app.router.run_read(function, hedge_after=0.0))
        route = session.last_route
    assert (session, True) == found[0]
    assert route is not None
    assert Reason.PRIMARY_REQUIRED == route.reason


IN_CHILDREN = """
import json, sys
from lsn_consistency import Router
from tests.cluster.forking import in_child

def read():
    return router.run_read(lambda conn: conn.execute("SELECT 42").fetchone()[0], hedge_after=5.0)

with Router(**json.load(sys.stdin)) as router:
    print(json.dumps([read(), in_child(read), in_child(read, exits=True), read()]))
"""


def test_a_forked_child_has_threads_of_its_own(pg: EmbeddedCluster) -> None:
    """The parent's threads do not exist there; reads go on in both."""
    nodes = {
        "primary": pg.primary.conninfo,
        "replicas": {name: node.conninfo for name, node in pg.replicas.items()},
    }
    done = subprocess.run(
        # Python 3.12 and newer warn of a fork beside threads, which is what this is about.
        [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", IN_CHILDREN],
        input=json.dumps(nodes),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=100.0,
        check=False,
    )
    assert ("", 0) == (done.stderr, done.returncode)
    assert [42, 42, 42, 42] == json.loads(done.stdout)


def test_a_router_that_closes_ends_its_losers(opened: OpenRouter, pg: EmbeddedCluster) -> None:
    """close() right after a hedge has won: the loser's statement ends on its server."""
    slow = pg.replicas["replica_1"]
    with opened() as app:
        ready(app)
        with first_on(app, slow.name):
            run(app, Reader({slow.port}))
        app.close()
    wait_until(lambda: sleeping(slow) == 0)
