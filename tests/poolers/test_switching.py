"""What stands behind a pooler changes, or the pooler goes: nothing stale, and reads go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import psycopg
import pytest

from lsn_consistency.exceptions import NoNodeAvailableError
from lsn_consistency.testing import EmbeddedCluster, PgBouncer
from lsn_consistency.testing._workspace import free_port
from tests.cluster.harness import Answer, App, Kind, open_router, wait_until
from tests.poolers.pgbouncer import SETTINGS, OpenThrough

IN_TRANSACTION_MODE = pytest.mark.parametrize("mode", ["transaction"], indirect=True)
TIMEOUTS = {"probe_timeout": 0.3, "connect_timeout": 1.0}
LIMIT_SECONDS = 5.0
"""What a read may take at most: far more than its time-outs, far less than PgBouncer's own."""

BACK_SECONDS = 20.0


def test_an_entry_that_leads_to_another_replica_is_never_read_stale(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str
) -> None:
    """The entry of one replica leads now to it, now to one that is paused: 0 stale reads."""
    first, paused = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with through("replica_1", only="replica_1", wait_seconds=0.1) as app:
        paused.pause_replay()
        answers, controls = [], []
        for turn in range(6):
            pooler.point("replica_1", (first, paused)[turn % 2])
            found = [_write_and_ask(app, table, turn * 10 + number) for number in range(10)]
            answers += found
            controls.append(_count_through(pooler.conninfo_for("replica_1"), table))
            if pooler.pool_mode == "transaction":
                expected = (first, pg.primary)[turn % 2]
                assert expected.port == found[-1].port
    assert list(range(1, 61)) == [answer.value for answer in answers]
    assert {first.port, pg.primary.port} >= {answer.port for answer in answers}
    # To somebody who does not look, every second turn is stale.
    assert [0] * 3 == controls[1::2]


@IN_TRANSACTION_MODE
def test_primary_and_replica_may_change_places_behind_the_pooler(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str
) -> None:
    """The entries of primary and replica are swapped, twice: the router follows, nothing stale."""
    primary, replica = pg.primary, pg.replicas["replica_1"]
    rows = 0
    with through(only="replica_1", wait_seconds=5.0) as app:
        for behind in ((primary, replica), (replica, primary), (primary, replica)):
            pooler.point("primary", behind[0])
            pooler.point("replica_1", behind[1])
            expected = "primary" if behind[0] is primary else "replica_1"
            other = "replica_1" if expected == "primary" else "primary"
            _wait_roles(app, {expected: "primary", other: "replica"})
            for _ in range(10):
                assert _write_when_possible(app, table, rows)
                rows += 1
                answer = app.ask(f"SELECT count(*) FROM {table}")
                assert (rows, replica.port) == (answer.value, answer.port)


@pytest.fixture
def readers(pg: EmbeddedCluster) -> Iterator[str]:
    """Offer one entry whose transactions go to either replica in turn."""
    port = free_port()
    hosts = ("127.0.0.2", "127.0.0.3")
    with ExitStack() as stack:
        for host, replica in zip(hosts, pg.replicas.values(), strict=True):
            stack.enter_context(PgBouncer(replica, address=host, port=port))
        entry = f"host={','.join(hosts)} port={port} dbname=postgres"
        front = stack.enter_context(PgBouncer({"readers": entry}, settings=SETTINGS))
        yield front.conninfo


def test_two_servers_behind_one_entry_are_told_apart_in_each_transaction(
    kind: Kind, pg: EmbeddedCluster, readers: str, table: str
) -> None:
    """A pooler that takes two servers in turn, one paused: 0 stale, the running one serves."""
    running, paused = pg.replicas["replica_1"], pg.replicas["replica_2"]
    replicas = {"readers": readers}
    with open_router(kind, pg, replicas=replicas, wait_seconds=1.0) as app:
        app.wait_healthy()
        paused.pause_replay()
        answers = []
        for row in range(20):
            _write(app, table, row)
            answers += app.each(4, lambda _: app.ask(f"SELECT count(*) FROM {table}"))
        controls: set[int] = set()
        ends = time.monotonic() + BACK_SECONDS
        while len(controls) < 2 and time.monotonic() < ends:
            controls.add(_count_through(readers, table))
    expected = [row for row in range(1, 21) for _ in range(4)]
    assert expected == [answer.value for answer in answers]
    ports = [answer.port for answer in answers]
    assert 0 == ports.count(paused.port)
    # To somebody who does not look, the entry shows either.
    assert {0, 20} == controls
    assert ports.count(running.port) > 20


def test_a_pooler_that_dies_takes_only_its_nodes_with_it(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str
) -> None:
    """PgBouncer killed before one replica: reads go elsewhere, and back when it is started."""
    with through("replica_1", wait_seconds=5.0, **TIMEOUTS) as app:
        _write(app, table, 0)
        _wait_served(app, pg.replicas["replica_1"].port)
        pooler.kill()
        answers = [_write_and_ask(app, table, row) for row in range(1, 11)]
        assert pg.replicas["replica_1"].port not in {answer.port for answer in answers}
        pooler.start()
        _wait_served(app, pg.replicas["replica_1"].port)
        answers += [_write_and_ask(app, table, row) for row in range(11, 21)]
    assert list(range(2, 22)) == [answer.value for answer in answers]
    assert max(answer.seconds for answer in answers) < LIMIT_SECONDS


def test_a_pooler_before_everything_may_be_started_anew(
    through: OpenThrough, pooler: PgBouncer, table: str
) -> None:
    """Every node behind it, PgBouncer killed: errors within the limits, and then all is well."""
    with through(wait_seconds=5.0, **TIMEOUTS) as app:
        assert 1 == _write_and_ask(app, table, 1).value
        pooler.kill()
        began = time.monotonic()
        with pytest.raises((psycopg.OperationalError, NoNodeAvailableError)):
            _write(app, table, 2)
        with pytest.raises(NoNodeAvailableError):
            app.ask(f"SELECT count(*) FROM {table}")
        assert time.monotonic() - began < LIMIT_SECONDS
        pooler.start()
        assert _write_when_possible(app, table, 3)
        with app.session(app.token()):
            assert 2 == app.ask(f"SELECT count(*) FROM {table}").value


@IN_TRANSACTION_MODE
def test_reads_leave_an_entry_that_is_paused(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str
) -> None:
    """PAUSE before one replica: reads go elsewhere within the limits, and back after RESUME."""
    with through("replica_1", wait_seconds=5.0, **TIMEOUTS) as app:
        _write(app, table, 0)
        _wait_served(app, pg.replicas["replica_1"].port)
        pooler.pause("replica_1")
        answers = [_write_and_ask(app, table, row) for row in range(1, 11)]
        assert pg.replicas["replica_1"].port not in {answer.port for answer in answers}
        pooler.resume("replica_1")
        _wait_served(app, pg.replicas["replica_1"].port)
    assert list(range(2, 12)) == [answer.value for answer in answers]
    assert max(answer.seconds for answer in answers) < LIMIT_SECONDS


@IN_TRANSACTION_MODE
def test_reads_go_on_while_the_primarys_entry_is_paused(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str
) -> None:
    """PAUSE before the primary: proven reads go on, writes raise, and go on after RESUME."""
    with through("primary", wait_seconds=5.0, **TIMEOUTS) as app:
        _write(app, table, 0)
        _wait_served(app, pg.replicas["replica_1"].port)
        token = app.token()
        pooler.pause("primary")
        with pytest.raises(psycopg.OperationalError):
            _write(app, table, 1)
        with app.session(token):
            answers = [app.ask(f"SELECT count(*) FROM {table}") for _ in range(10)]
        assert {1} == {answer.value for answer in answers}
        assert pg.primary.port not in {answer.port for answer in answers}
        assert max(answer.seconds for answer in answers) < LIMIT_SECONDS
        pooler.resume("primary")
        assert _write_when_possible(app, table, 2)
        with app.session(app.token()):
            assert 2 == app.ask(f"SELECT count(*) FROM {table}").value


def test_reads_leave_a_pooler_that_hangs(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str
) -> None:
    """PgBouncer frozen before one replica: as with a frozen server, within the limits."""
    with through("replica_1", wait_seconds=5.0, poll_interval=0.1, **TIMEOUTS) as app:
        _write(app, table, 0)
        pooler.freeze()
        try:
            app.wait_for(lambda nodes: not nodes["replica_1"]["healthy"])
            answers = [_write_and_ask(app, table, row) for row in range(1, 11)]
        finally:
            pooler.thaw()
        _wait_served(app, pg.replicas["replica_1"].port)
    assert list(range(2, 12)) == [answer.value for answer in answers]
    assert max(answer.seconds for answer in answers) < LIMIT_SECONDS


def _write(app: App, table: str, row: int) -> None:
    app.write(f"INSERT INTO {table} VALUES (%s)", [row])


def _write_when_possible(app: App, table: str, row: int) -> bool:
    """Write a row once the router has found the primary."""

    def written() -> bool:
        try:
            _write(app, table, row)
        except (psycopg.OperationalError, NoNodeAvailableError):
            return False
        return True

    wait_until(written, BACK_SECONDS)
    return True


def _write_and_ask(app: App, table: str, row: int) -> Answer:
    """Write one more row and count them, as a client of its own."""
    with app.session():
        _write(app, table, row)
        return app.ask(f"SELECT count(*) FROM {table}")


def _count_through(conninfo: str, table: str) -> int:
    """Count the rows without looking where."""
    with closing(psycopg.connect(conninfo)) as conn:
        row = conn.execute(f"SELECT count(*) FROM {table}".encode()).fetchone()
    assert row is not None
    return int(row[0])


def _wait_served(app: App, port: int) -> None:
    """Wait until new sessions are served by a server."""

    def served() -> bool:
        with app.session():
            return app.ask("SELECT 1").port == port

    wait_until(served, BACK_SECONDS)


def _wait_roles(app: App, expected: dict[str, str]) -> None:
    app.wait_for(
        lambda nodes: expected == {name: node["role"] for name, node in nodes.items()}, BACK_SECONDS
    )
