"""
The router over replicas whose networks fail: nothing stale, nothing stuck, and used again.
"""

from __future__ import annotations

import time

import pytest

from lsn_consistency.testing import ContainerCluster
from tests.containers.conftest import OPTIONS, OpenRouter
from tests.containers.traffic import (
    AGAIN_SECONDS,
    FAULTS,
    ROUNDS,
    Seen,
    assert_answered,
    read,
    wait_used,
    write,
    write_and_read,
)


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
        reads = write_and_read(app, table)
        app.wait_for(lambda nodes: not nodes[gone.name]["healthy"], AGAIN_SECONDS)
        reads += write_and_read(app, table)
        end(gone)
        token = write(app, table)
        wait_used(app, table, gone, token)
        afterwards = write_and_read(app, table)
    assert_answered(reads, {well.port, pg.primary.port})
    assert well.port in {seen.port for _, seen in reads}
    assert_answered(afterwards, {node.port for node in pg.nodes.values()})


def test_statements_that_were_sent_into_the_dark_run_again_elsewhere(
    opened: OpenRouter, pg: ContainerCluster, table: str
) -> None:
    """
    A replica vanishes with connections in use: run_read answers from another node in time.

    Its last observation satisfies the token, so nothing but the lost statement tells.
    """
    gone, well = pg.replicas.values()
    with opened() as app:
        token = write(app, table)
        pg.wait_caught_up()
        wait_used(app, table, gone, token)
        gone.disconnect()
        reads = app.each(8, lambda _: read(app, table, token))
        reads += [read(app, table, token) for _ in range(ROUNDS)]
    assert_answered([(1, seen) for seen in reads], {well.port, pg.primary.port})


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
            token = write(app, table)
            committed.append(time.monotonic())
            reads.append((len(committed), read(app, table, token)))
            without.append(read(app, table))
            time.sleep(0.02)
        still_answers = cut_off.value("SELECT 1")
        cut_off.reconnect()
        wait_used(app, table, cut_off, token)
    assert_answered(reads, {well.port, pg.primary.port})
    for seen in without:
        due = [moment for moment in committed if moment < seen.began - bound]
        assert len(due) <= seen.count
    last = [seen.port for seen in without if seen.began > ends - bound / 2]
    assert cut_off.port not in last
    assert (1, well.port in last) == (still_answers, True)
