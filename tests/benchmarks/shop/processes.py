"""
Servers with several processes: how they are started, what they hold, how often they ask a replica.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg

from lsn_consistency.testing._workspace import free_port
from tests.benchmarks.sent import MONITOR
from tests.benchmarks.shop.application import Config
from tests.benchmarks.shop.served import CONFIG
from tests.benchmarks.shop.visitors import visit

START_SECONDS: Final = 60.0
START_TRIALS: Final = 3
KEYS_OF_TRIAL: Final = 10_000
THREADS: Final = 4

_MODULE: Final = "tests.benchmarks.shop.served"
# What the router asks a standby for its position with; nothing else of the application does.
_PROBES: Final = """
    SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements AS statements
    JOIN pg_roles AS roles ON roles.oid = statements.userid
    WHERE rolname = 'app' AND query LIKE '%pg_last_wal_replay_lsn()%'
"""
# A CAUSAL read that is alone asks too, on its own connection: that is no probe.
_IN_FLIGHT: Final = f"""
    SELECT count(*) FROM pg_stat_activity
    WHERE usename = 'app' AND application_name = '{MONITOR}' AND state = 'active'
    AND query LIKE '%pg_last_wal_replay_lsn()%'
"""


@dataclass(frozen=True, slots=True)
class Setup:
    """
    Name a server, its number of workers, and whether they use the router.

    ``preload`` imports the application, and so opens the router, before the workers are forked.
    """

    server: str
    workers: int
    router: bool = True
    preload: bool = False

    def __str__(self) -> str:
        plural = "" if self.workers == 1 else "s"
        preload = ", preloaded" if self.preload else ""
        without = "" if self.router else ", without router"
        return f"{self.server}, {self.workers} worker{plural}{preload}{without}"

    @property
    def routers(self) -> int:
        """
        Return how many processes have an open router: a master that has forked keeps its own.
        """
        return self.workers + self.preload

    def command(self, port: int) -> list[str]:
        """
        Return the command line that serves the shop.
        """
        if self.server == "uvicorn":
            options = ["--factory", "--port", str(port), "--workers", str(self.workers)]
            return ["uvicorn", f"{_MODULE}:asgi", *options, "--no-access-log", "--log-level=error"]
        options = ["--bind", f"127.0.0.1:{port}", "--workers", str(self.workers)]
        options += ["--worker-class", "gthread", "--threads", str(THREADS), "--log-level=error"]
        options += ["--preload"] if self.preload else []
        return ["gunicorn", f"{_MODULE}:wsgi", *options]


@contextmanager
def serving(setup: Setup, config: Config, first_key: int) -> Iterator[int]:
    """
    Serve the shop until every worker has answered, and yield its port.
    """
    environment = {**os.environ, CONFIG: config.to_text()}
    for trial in range(START_TRIALS):
        port = free_port()
        command = [sys.executable, "-m", *setup.command(port)]
        process = subprocess.Popen(command, env=environment, process_group=0)
        try:
            if _answers(process, port, setup.workers, first_key + trial * KEYS_OF_TRIAL):
                yield port
                return
        finally:
            _end(process)
    raise RuntimeError(f"{setup} ended {START_TRIALS} times before all its workers had answered")


def _answers(server: subprocess.Popen[bytes], port: int, workers: int, first_key: int) -> bool:
    """Wait until every worker has answered; False if the server ends, as when its port is taken."""
    deadline = time.monotonic() + START_SECONDS
    pids: set[int] = set()
    while len(pids) < workers:
        if server.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(pids)} of {workers} workers answered in {START_SECONDS:g} s")
        try:
            visits = asyncio.run(visit(port, first_key, sessions=2 * workers, seconds=0.2))
            pids |= visits.pids
        except OSError:
            time.sleep(0.05)
        first_key += 2 * workers
    return True


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(START_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def memory(pids: Iterable[int]) -> dict[str, float]:
    """
    Return the resident and the proportional memory of a process in MiB, the median of several.
    """
    found: dict[str, list[float]] = {"Rss": [], "Pss": []}
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name].append(int(value.split()[0]) / 1024)
    return {name: statistics.median(values) for name, values in found.items()}


class Probes:
    """
    Count the probes that replicas get, by their own statistics.
    """

    def __init__(self, watching: Mapping[str, psycopg.Connection[Any]]) -> None:
        self._watching = watching

    def count(self) -> int:
        """
        Return how many probes the busiest replica has got since the last reset.
        """
        return max(self._value(conn, _PROBES) for conn in self._watching.values())

    def reset(self) -> None:
        """
        Begin to count anew.
        """
        for conn in self._watching.values():
            conn.execute("SELECT pg_stat_statements_reset()")

    def in_flight(self) -> int:
        """
        Return how many probes the busiest replica is answering at this moment.
        """
        return max(self._value(conn, _IN_FLIGHT) for conn in self._watching.values())

    @staticmethod
    def _value(conn: psycopg.Connection[Any], statement: str) -> int:
        row = conn.execute(statement.encode()).fetchone()
        assert row is not None
        return int(row[0])
