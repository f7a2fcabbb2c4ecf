"""
Compare WAIT FOR LSN with polling: from the commit to a replica's answer, and statements per wait.

    python -m tests.benchmarks.wait_for_lsn [--reads 100] [--rounds 3]

It needs PostgreSQL 19 (LSN_CONSISTENCY_BINDIR). Both ways take turns in one run, so that what else
the machine does hits both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from lsn_consistency import Reason, Router, Session
from lsn_consistency._replay_wait import ReplayWait
from lsn_consistency.testing import EmbeddedCluster, Node
from tests.cluster.harness import wait_until

DELAYS_SECONDS = (0.0, 0.02, 0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--reads", type=int, default=100, help="reads a round (default 100)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds a way (default 3)")
    options = parser.parse_args()
    with EmbeddedCluster(replicas=1) as pg:
        if pg.version < 19:
            print(f"WAIT FOR LSN came with PostgreSQL 19, this is {pg.version}")
            return 2
        pg.primary.execute("CREATE TABLE items (id int)")
        pg.wait_caught_up()
        print("| apply delay | way | median | p99 | statements per wait |")
        print("|---:|---|---:|---:|---:|")
        for delay in DELAYS_SECONDS:
            pg.replicas["replica_1"].apply_delay(delay)
            _compare(pg, delay, options.reads, options.rounds)
    return 0


def _compare(pg: EmbeddedCluster, delay: float, reads: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {"wait": [], "poll": []}
    statements = dict.fromkeys(seconds, 0)
    for _ in range(rounds):
        for way in seconds:
            with _only(way), _counted(pg.replicas["replica_1"]) as counted:
                seconds[way] += _waits(pg, reads)
            statements[way] += counted[0]
    for way, times in seconds.items():
        times.sort()
        median, p99 = statistics.median(times), times[int(len(times) * 0.99)]
        each = statements[way] / len(times)
        print(
            f"| {delay * 1000:.0f} ms | {way} | {median * 1000:.2f} ms | {p99 * 1000:.2f} ms "
            f"| {each:.1f} |",
            flush=True,
        )


@contextmanager
def _only(way: str) -> Iterator[None]:
    if way == "wait":
        yield
        return
    with mock.patch.object(ReplayWait, "tend", return_value=None):
        yield


@contextmanager
def _counted(replica: Node) -> Iterator[list[int]]:
    """Count what the replica was sent by the monitor, by the replica's own log."""
    log = Path(getattr(replica, "log"))  # noqa: B009
    replica.configure("log_statement", "all")
    began = len(log.read_text())
    counted = [0]
    try:
        yield counted
    finally:
        lines = log.read_text()[began:].splitlines()
        probes = sum("select pg_catalog.pg_backend_pid()," in line for line in lines)
        counted[0] = probes + sum("wait for lsn" in line for line in lines)
        replica.configure("log_statement", "none")


def _waits(pg: EmbeddedCluster, reads: int) -> list[float]:
    nodes = {"replica_1": pg.replicas["replica_1"].conninfo}
    times: list[float] = []
    with Router(primary=pg.primary.conninfo, replicas=nodes, wait_seconds=5.0) as router:
        wait_until(lambda: all(_is_measured(node) for node in router.snapshot().values()))
        for _ in range(reads):
            with Session() as session:
                with router.write() as conn:
                    conn.execute("INSERT INTO items VALUES (1)")
                began = time.perf_counter()
                with router.read() as conn:
                    conn.execute("SELECT 1").fetchone()
                times.append(time.perf_counter() - began)
                assert session.last_route is not None
                assert session.last_route.reason is Reason.CAUGHT_UP, session.last_route
    return times


def _is_measured(node: dict[str, Any]) -> bool:
    return node["healthy"] and node["lag_seconds"] is not None


if __name__ == "__main__":
    sys.exit(main())
