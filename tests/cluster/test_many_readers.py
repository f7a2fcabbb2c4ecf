"""Many readers at once: probes do not grow with requests, and waiters leave together."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lsn_consistency import current_session
from lsn_consistency.testing import EmbeddedCluster, Node
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App, wait_until

READERS = 200
PROBES_A_SECOND = 250
"""One probe in four milliseconds; with a probe of its own each reader would make as many."""

_BACKENDS = """
    SELECT application_name, state, query_start, query
    FROM pg_stat_activity
    WHERE backend_type = 'client backend' AND application_name <> 'watch'
"""


@dataclass
class Activity:
    """
    Hold what a server says of the connections of a router, seen again and again.
    """

    probes: int = 0
    """How many probes were in flight at once, at most."""
    connections: int = 0
    """How many monitor connections there were at once, at most."""
    others: set[str] = field(default_factory=set)
    """Statements that the pools' connections began while it was watched."""
    looks: int = 0

    @contextmanager
    def watching(self, node: Node) -> Iterator[None]:
        """
        Look at the server for the time of the block.
        """
        done = threading.Event()

        def watch() -> None:
            with node.connect(application_name="watch") as conn:
                began = conn.execute("SELECT clock_timestamp()").fetchone()
                assert began is not None
                while not done.is_set():
                    rows = conn.execute(_BACKENDS).fetchall()
                    monitors = [state for name, state, *_ in rows if name == "lsn_consistency"]
                    self.probes = max(self.probes, monitors.count("active"))
                    self.connections = max(self.connections, len(monitors))
                    self.others.update(
                        query
                        for name, _, start, query in rows
                        if name != "lsn_consistency" and start is not None and start > began[0]
                    )
                    self.looks += 1
                    time.sleep(0.002)

        thread = threading.Thread(target=watch, name="scenario watch")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def test_200_readers_of_a_position_that_no_replica_has_share_one_probe(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """200 concurrent reads: at most one probe in flight a replica; all released on resume."""
    activities = {name: Activity() for name in pg.replicas}
    with opened(wait_seconds=20.0, pool_options={"min_size": 6, "max_size": 6}) as app:
        for pool in app.pools.values():
            app.call(pool.wait())
        for replica in pg.replicas.values():
            replica.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        token = current_session().token

        def read(_: int) -> tuple[int, int]:
            with app.session(token):
                answer = app.ask(f"SELECT count(*) FROM {table}")
            return answer.value, answer.port

        readers = app.start_each(READERS, read)
        wait_until(lambda: READERS == len(app.cluster_state.positions), 20)
        with (
            activities["replica_1"].watching(pg.replicas["replica_1"]),
            activities["replica_2"].watching(pg.replicas["replica_2"]),
        ):
            rate = _transactions_a_second(pg.replicas["replica_1"], 1.5)
        waiting = [reader for reader in readers if not reader.done()]
        resumed = pg.replicas["replica_2"]
        resumed.resume_replay()
        began = time.monotonic()
        answers = [reader.result(20) for reader in readers]
        took = time.monotonic() - began
    assert READERS == len(waiting)
    assert {(1, resumed.port)} == set(answers)
    assert took < 3.0
    for activity in activities.values():
        assert activity.looks > 20
        assert activity.probes <= 1
        # A monitor may leave its connection for another while its node serves nobody.
        assert 1 <= activity.connections <= 2
        assert set() == activity.others
    # Each look of the watcher is a transaction, too.
    assert rate < PROBES_A_SECOND + activities["replica_1"].looks / 1.5 + 50


def test_a_waiter_is_released_as_soon_as_its_position_is_reached(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """Readers of different positions are released one by one, each when its own is reached."""
    replica = pg.replicas["replica_1"]
    replicas = {"replica_1": replica.conninfo}
    with opened(replicas=replicas, wait_seconds=20.0, max_lag_seconds=30.0, pin_seconds=30) as app:
        app.wait_healthy()
        replica.stop_replication()
        app.write(f"INSERT INTO {table} VALUES (1)")
        first = current_session().token
        replica.start_replication()
        pg.wait_caught_up()
        replica.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (2)")
        second = current_session().token
        late = app.start_each(1, lambda _: _ask(app, second, table))
        early = _ask(app, first, table)
        wait_until(lambda: 1 == len(app.cluster_state.positions))
        assert not late[0].done()
        replica.resume_replay()
        assert (2, replica.port) == late[0].result(10)
    assert (1, replica.port) == early


def _ask(app: App, token: object, table: str) -> tuple[int, int]:
    with app.session(token):  # type: ignore[arg-type]
        answer = app.ask(f"SELECT count(*) FROM {table}")
    return answer.value, answer.port


def _transactions_a_second(node: Node, seconds: float) -> float:
    """Measure how many transactions a server ends; idle backends report within a second."""
    with node.connect(application_name="watch") as conn:

        def count() -> int:
            conn.execute("SELECT pg_stat_clear_snapshot()")
            row = conn.execute("SELECT sum(xact_commit) FROM pg_stat_database").fetchone()
            assert row is not None
            return int(row[0])

        began, before = time.monotonic(), count()
        time.sleep(seconds)
        return (count() - before) / (time.monotonic() - began)
