"""
The router over machines whose networks fail: nothing stale, nothing stuck, and used again.

A partition closes no connection, so these tests are what an application has then: statements in
`run_read`, and ``tcp_user_timeout`` in the conninfo, without which a statement that was sent into
the dark waits for a quarter of an hour.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg
import psycopg_pool
import pytest

from lsn_consistency import Consistency, Lsn, Position, Reason, Token, current_session
from lsn_consistency.exceptions import NoNodeAvailableError, RoutingError
from lsn_consistency.testing import ContainerCluster, ContainerNode
from tests.cluster.harness import App, Connection, Kind, open_router, wait_until
from tests.containers.conftest import OPTIONS, OpenRouter

USER_TIMEOUT_MS = 1500
LIMIT_SECONDS = 20.0
"""No read and no write takes longer under any of these faults, on a busy machine either."""

AGAIN_SECONDS = 60.0
ROUNDS = 20
WRITE_ERRORS = (psycopg.OperationalError, psycopg_pool.PoolTimeout, NoNodeAvailableError)

Change = Callable[[ContainerNode], None]
FAULTS: dict[str, tuple[Change, Change]] = {
    "disconnected": (ContainerNode.disconnect, ContainerNode.reconnect),
    "paused": (ContainerNode.pause, ContainerNode.unpause),
    "killed": (ContainerNode.kill, ContainerNode.start),
}


@pytest.fixture
def opened(kind: Kind, pg: ContainerCluster) -> OpenRouter:
    """Offer a router whose connections notice a host that is gone."""
    nodes = {
        name: node.conninfo_for(tcp_user_timeout=USER_TIMEOUT_MS) for name, node in pg.nodes.items()
    }
    primary = nodes.pop("primary")
    cluster: Any = pg
    return partial(open_router, kind, cluster, primary=primary, replicas=nodes, **OPTIONS)


@dataclass(frozen=True)
class Seen:
    """
    What one read saw, which server gave it, why, when it began and how long it took.
    """

    count: int
    port: int
    reason: Reason
    began: float
    seconds: float


def _read(app: App, table: str, token: Token | None = None, **options: Any) -> Seen:
    """Count the rows as a client with a token, or without one."""

    def count(conn: Connection) -> tuple[int, int]:
        return int(conn.value(f"SELECT count(*) FROM {table}")), conn.port

    began = time.monotonic()
    with app.session(token):
        rows, port = app.run_read(count, **options)
        route = current_session().last_route
    assert route is not None
    return Seen(rows, port, route.reason, began, time.monotonic() - began)


def _write(app: App, table: str) -> Token:
    """Add a row as a new client, and return that client's token."""
    with app.session() as session:
        app.write(f"INSERT INTO {table} SELECT count(*) FROM {table}")
        return session.token


def _write_and_read(app: App, table: str, rounds: int = ROUNDS) -> list[tuple[int, Seen]]:
    """Write and read as that many clients; return how many rows each had to see, and its read."""
    before = _read(app, table, consistency=Consistency.STRONG).count
    found = []
    for number in range(1, rounds + 1):
        token = _write(app, table)
        found.append((before + number, _read(app, table, token)))
    return found


def _assert_answered(reads: list[tuple[int, Seen]], ports: set[int]) -> None:
    """Assert that every read saw its own write, in time, from one of these servers."""
    assert [rows for rows, _ in reads] == [seen.count for _, seen in reads]
    assert {seen.port for _, seen in reads} <= ports
    assert max(seen.seconds for _, seen in reads) < LIMIT_SECONDS


def _wait_used(app: App, table: str, node: ContainerNode, token: Token) -> None:
    """Wait until a node serves reads of this token again."""
    wait_until(
        lambda: _read(app, table, token).port == node.port,
        AGAIN_SECONDS,
        lambda: f"{node.name} is not used: {app.snapshot()}",
    )


def _ahead(token: Token) -> Token:
    """Return a token that no replica can have reached."""
    return Token(
        Position(each.system_id, each.timeline, Lsn(each.lsn + 1024**3))
        for each in token.positions.values()
    )


# A replica


@pytest.mark.parametrize("fault", FAULTS)
def test_reads_go_on_without_a_replica_and_it_is_used_again(
    opened: OpenRouter, pg: ContainerCluster, table: str, fault: str
) -> None:
    """Every client sees its write, from others; back again the replica serves again."""
    begin, end = FAULTS[fault]
    gone, well = pg.replicas.values()
    with opened() as app:
        app.wait_healthy()
        begin(gone)
        reads = _write_and_read(app, table)
        app.wait_for(lambda nodes: not nodes[gone.name]["healthy"], AGAIN_SECONDS)
        reads += _write_and_read(app, table)
        end(gone)
        token = _write(app, table)
        _wait_used(app, table, gone, token)
        afterwards = _write_and_read(app, table)
    _assert_answered(reads, {well.port, pg.primary.port})
    assert well.port in {seen.port for _, seen in reads}
    _assert_answered(afterwards, {node.port for node in pg.nodes.values()})


def test_statements_that_were_sent_into_the_dark_run_again_elsewhere(
    opened: OpenRouter, pg: ContainerCluster, table: str
) -> None:
    """
    A replica vanishes with connections in use: run_read answers from another node in time.

    Its last observation satisfies the token, so nothing but the lost statement tells.
    """
    gone, well = pg.replicas.values()
    with opened() as app:
        token = _write(app, table)
        pg.wait_caught_up()
        _wait_used(app, table, gone, token)
        gone.disconnect()
        reads = app.each(8, lambda _: _read(app, table, token))
        reads += [_read(app, table, token) for _ in range(ROUNDS)]
    _assert_answered([(1, seen) for seen in reads], {well.port, pg.primary.port})


def test_a_replica_that_only_its_clients_reach_serves_no_newer_token(
    opened: OpenRouter, pg: ContainerCluster, table: str
) -> None:
    """
    Cut off from the primary, answering all probes: never stale, and out beyond the lag bound.

    Reads without a token may go there, but what was committed longer ago than max_lag_seconds
    must be in them.
    """
    cut_off, well = pg.replicas.values()
    bound = OPTIONS["max_lag_seconds"]
    committed: list[float] = []
    reads: list[tuple[int, Seen]] = []
    without: list[Seen] = []
    with opened() as app:
        app.wait_healthy()
        cut_off.disconnect("replication")
        ends = time.monotonic() + 2 * bound
        while time.monotonic() < ends:
            token = _write(app, table)
            committed.append(time.monotonic())
            reads.append((len(committed), _read(app, table, token)))
            without.append(_read(app, table))
            time.sleep(0.02)
        still_answers = cut_off.value("SELECT 1")
        cut_off.reconnect()
        _wait_used(app, table, cut_off, token)
    _assert_answered(reads, {well.port, pg.primary.port})
    for seen in without:
        due = [moment for moment in committed if moment < seen.began - bound]
        assert len(due) <= seen.count
    last = [seen.port for seen in without if seen.began > ends - bound / 2]
    assert cut_off.port not in last
    assert (1, well.port in last) == (still_answers, True)


# The primary


@pytest.mark.parametrize("fault", FAULTS)
def test_without_the_primary_satisfied_tokens_are_served_and_the_rest_ends_in_time(
    opened: OpenRouter, pg: ContainerCluster, table: str, fault: str
) -> None:
    """PRIMARY_DOWN for what a replica has; errors in time for all else; back again it is used."""
    begin, end = FAULTS[fault]
    replicas = {node.port for node in pg.replicas.values()}
    with opened() as app:
        token = _write(app, table)
        pg.wait_caught_up()
        app.choose(token, timeout=LIMIT_SECONDS)
        begin(pg.primary)
        app.wait_for(lambda nodes: not nodes["primary"]["healthy"], AGAIN_SECONDS)
        # Beyond the lag bound too: without its primary a replica's lag cannot be known.
        ends = time.monotonic() + OPTIONS["max_lag_seconds"] + 1
        reads = []
        while time.monotonic() < ends:
            reads.append(_read(app, table, token))
            time.sleep(0.02)
        began = time.monotonic()
        with pytest.raises(WRITE_ERRORS):
            _write(app, table)
        with pytest.raises(RoutingError):
            _read(app, table, _ahead(token))
        with pytest.raises(RoutingError):
            _read(app, table, token, consistency=Consistency.STRONG)
        refused = time.monotonic() - began
        end(pg.primary)
        app.wait_for(lambda nodes: nodes["primary"]["healthy"], AGAIN_SECONDS)
        afterwards = _write_and_read(app, table)
    _assert_answered([(1, seen) for seen in reads], replicas)
    assert Reason.PRIMARY_DOWN == reads[-1].reason
    assert refused < 3 * LIMIT_SECONDS
    _assert_answered(afterwards, {node.port for node in pg.nodes.values()})


def test_a_primary_that_only_its_clients_reach_serves_what_its_replicas_lack(
    opened: OpenRouter, pg: ContainerCluster, table: str
) -> None:
    """Cut off from all replicas: every own write is read, from it, until they are back."""
    with opened() as app:
        app.wait_healthy()
        pg.primary.disconnect("replication")
        reads = _write_and_read(app, table, 8)
        pg.primary.reconnect()
        token = _write(app, table)
        for replica in pg.replicas.values():
            _wait_used(app, table, replica, token)
    _assert_answered(reads, {pg.primary.port})
    assert {Reason.NOT_CAUGHT_UP, Reason.LAG_EXCEEDED} >= {seen.reason for _, seen in reads}


# All of them


def test_cut_off_from_everything_a_read_ends_in_time_and_later_goes_on(
    opened: OpenRouter, pg: ContainerCluster, table: str
) -> None:
    """The application's own network fails: errors, not hangs, and no restart afterwards."""
    with opened() as app:
        token = _write(app, table)
        pg.wait_caught_up()
        for node in pg.nodes.values():
            node.disconnect("clients")
        began = time.monotonic()
        with pytest.raises((psycopg.OperationalError, RoutingError)):
            _read(app, table, token)
        refused = time.monotonic() - began
        for node in pg.nodes.values():
            node.reconnect()
        app.wait_healthy(AGAIN_SECONDS)
        reads = _write_and_read(app, table)
    assert refused < 3 * LIMIT_SECONDS
    _assert_answered(reads, {node.port for node in pg.nodes.values()})


def test_a_failover_under_partition_is_followed_and_the_old_primary_never_serves(
    opened: OpenRouter, pg: ContainerCluster, table: str
) -> None:
    """
    The primary is cut off, a replica promoted, the old primary comes back and still writes.

    Its writes of that time are seen by nobody; rewound it is a replica like any other.
    """
    promoted, other = pg.replicas.values()
    everybody = {node.port for node in pg.nodes.values()}
    with opened() as app:
        before = _write(app, table)
        pg.wait_caught_up()
        pg.primary.disconnect()
        _insert_unseen(pg.primary, table)
        pg.failover(promoted.name)
        app.wait_for(lambda nodes: nodes[promoted.name]["role"] == "primary", AGAIN_SECONDS)
        reads = [(1, _read(app, table, before)), *_write_and_read(app, table)]
        pg.primary.reconnect()
        app.wait_for(lambda nodes: nodes["primary"]["healthy"], AGAIN_SECONDS)
        ends = time.monotonic() + 5 * OPTIONS["poll_interval"]
        while time.monotonic() < ends:
            reads += _write_and_read(app, table, 3)
        _insert_unseen(pg.primary, table)
        reads += _write_and_read(app, table)
        pg.primary.rewind(promoted)
        token = _write(app, table)
        _wait_used(app, table, pg.primary, token)
        afterwards = _write_and_read(app, table)
        numbers = [row[0] for row in promoted.execute(f"SELECT id FROM {table} ORDER BY id")]
    _assert_answered(reads, {promoted.port, other.port})
    _assert_answered(afterwards, everybody)
    assert list(range(len(numbers))) == numbers


def _insert_unseen(node: ContainerNode, table: str) -> None:
    """Commit a row on a primary that the router must not use, on its own machine."""
    statement = f"INSERT INTO {table} SELECT -1 - count(*) FROM {table}"
    node.run("psql", "-h", "127.0.0.1", "-p", str(node.port), "-qc", statement)
