"""
The router over a primary whose network fails: what a replica has goes on, the rest ends in time.
"""

from __future__ import annotations

import time

import psycopg
import psycopg_pool
import pytest

from lsn_consistency import Consistency, Lsn, Position, Reason, Token
from lsn_consistency.exceptions import NoNodeAvailableError, RoutingError
from lsn_consistency.testing import ContainerCluster, ContainerNode
from tests.containers.conftest import OPTIONS, OpenRouter
from tests.containers.traffic import (
    AGAIN_SECONDS,
    FAULTS,
    LIMIT_SECONDS,
    assert_answered,
    read,
    wait_used,
    write,
    write_and_read,
)

WRITE_ERRORS = (psycopg.OperationalError, psycopg_pool.PoolTimeout, NoNodeAvailableError)


def _ahead(token: Token) -> Token:
    """Return a token that no replica can have reached."""
    return Token(
        Position(each.system_id, each.timeline, Lsn(each.lsn + 1024**3))
        for each in token.positions.values()
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_without_the_primary_satisfied_tokens_are_served_and_the_rest_ends_in_time(
    opened: OpenRouter, pg: ContainerCluster, table: str, fault: str
) -> None:
    """PRIMARY_DOWN for what a replica has; errors in time for all else; back again it is used."""
    begin, end = FAULTS[fault]
    replicas = {node.port for node in pg.replicas.values()}
    with opened() as app:
        token = write(app, table)
        pg.wait_caught_up()
        app.choose(token, timeout=LIMIT_SECONDS)
        begin(pg.primary)
        app.wait_for(lambda nodes: not nodes["primary"]["healthy"], AGAIN_SECONDS)
        # Beyond the lag bound too: without its primary a replica's lag cannot be known.
        ends = time.monotonic() + OPTIONS["max_lag_seconds"] + 1
        reads = []
        while time.monotonic() < ends:
            reads.append(read(app, table, token))
            time.sleep(0.02)
        began = time.monotonic()
        with pytest.raises(WRITE_ERRORS):
            write(app, table)
        with pytest.raises(RoutingError):
            read(app, table, _ahead(token))
        with pytest.raises(RoutingError):
            read(app, table, token, consistency=Consistency.STRONG)
        refused = time.monotonic() - began
        end(pg.primary)
        app.wait_for(lambda nodes: nodes["primary"]["healthy"], AGAIN_SECONDS)
        afterwards = write_and_read(app, table)
    assert_answered([(1, seen) for seen in reads], replicas)
    assert Reason.PRIMARY_DOWN == reads[-1].reason
    assert refused < 3 * LIMIT_SECONDS
    assert_answered(afterwards, {node.port for node in pg.nodes.values()})


def test_a_primary_that_only_its_clients_reach_serves_what_its_replicas_lack(
    opened: OpenRouter, pg: ContainerCluster, table: str
) -> None:
    """Cut off from all replicas: every own write is read, from it, until they are back."""
    with opened() as app:
        app.wait_healthy()
        pg.primary.disconnect("replication")
        reads = write_and_read(app, table, 8)
        pg.primary.reconnect()
        token = write(app, table)
        for replica in pg.replicas.values():
            wait_used(app, table, replica, token)
    assert_answered(reads, {pg.primary.port})
    assert {Reason.NOT_CAUGHT_UP, Reason.LAG_EXCEEDED} >= {seen.reason for _, seen in reads}


# All of them


def test_cut_off_from_everything_a_read_ends_in_time_and_later_goes_on(
    opened: OpenRouter, pg: ContainerCluster, table: str
) -> None:
    """The application's own network fails: errors, not hangs, and no restart afterwards."""
    with opened() as app:
        token = write(app, table)
        pg.wait_caught_up()
        for node in pg.nodes.values():
            node.disconnect("clients")
        began = time.monotonic()
        with pytest.raises((psycopg.OperationalError, RoutingError)):
            read(app, table, token)
        refused = time.monotonic() - began
        for node in pg.nodes.values():
            node.reconnect()
        app.wait_healthy(AGAIN_SECONDS)
        reads = write_and_read(app, table)
    assert refused < 3 * LIMIT_SECONDS
    assert_answered(reads, {node.port for node in pg.nodes.values()})


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
        before = write(app, table)
        pg.wait_caught_up()
        pg.primary.disconnect()
        _insert_unseen(pg.primary, table)
        pg.failover(promoted.name)
        app.wait_for(lambda nodes: nodes[promoted.name]["role"] == "primary", AGAIN_SECONDS)
        reads = [(1, read(app, table, before)), *write_and_read(app, table)]
        pg.primary.reconnect()
        app.wait_for(lambda nodes: nodes["primary"]["healthy"], AGAIN_SECONDS)
        ends = time.monotonic() + 5 * OPTIONS["poll_interval"]
        while time.monotonic() < ends:
            reads += write_and_read(app, table, 3)
        _insert_unseen(pg.primary, table)
        reads += write_and_read(app, table)
        pg.primary.rewind(promoted)
        token = write(app, table)
        wait_used(app, table, pg.primary, token)
        afterwards = write_and_read(app, table)
        numbers = [row[0] for row in promoted.execute(f"SELECT id FROM {table} ORDER BY id")]
    assert_answered(reads, {promoted.port, other.port})
    assert_answered(afterwards, everybody)
    assert list(range(len(numbers))) == numbers


def _insert_unseen(node: ContainerNode, table: str) -> None:
    """Commit a row on a primary that the router must not use, on its own machine."""
    statement = f"INSERT INTO {table} SELECT -1 - count(*) FROM {table}"
    node.run("psql", "-h", "127.0.0.1", "-p", str(node.port), "-qc", statement)
