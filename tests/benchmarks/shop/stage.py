"""
The servers of the workload, and one run of a trace against a shop in a process of its own.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import psycopg

from lsn_consistency.testing import EmbeddedCluster
from tests.benchmarks.shop import application, load
from tests.benchmarks.shop.judge import Load, Outcome, judge
from tests.benchmarks.shop.load import Loop, Sample
from tests.benchmarks.shop.strategies import PINS
from tests.benchmarks.shop.trace import Shape

CONNECTIONS: Final = 4
READ_SECONDS: Final = 0.02
"""With `CONNECTIONS` this gives each server at most 200 reads a second, whatever the machine."""

KEYS_OF_RUN: Final = 100_000
BACKLOG: Final = 1024
END_SECONDS: Final = 60.0
HEARTBEATS: Final = 10
HEARTBEAT_SECONDS: Final = 0.02

_SETTINGS: Final = {"shared_preload_libraries": "pg_stat_statements"}
_LOAD: Final = """
    SELECT coalesce(sum(calls), 0)::bigint, coalesce(sum(total_exec_time), 0)::float8 / 1000,
           coalesce(sum(calls) FILTER (WHERE query LIKE '%FROM entries%'), 0)::bigint,
           coalesce(sum(calls) FILTER (WHERE query LIKE '%INTO entries%'), 0)::bigint
    FROM pg_stat_statements WHERE query NOT LIKE '%pg_stat_statements%'
"""


class Stage:
    """
    Run traces against a cluster, one after the other.
    """

    def __init__(
        self, pg: EmbeddedCluster, watching: Mapping[str, psycopg.Connection[Any]]
    ) -> None:
        self._pg = pg
        self._watching = watching
        self._runs = 0

    def delay(self, seconds: Mapping[str, float]) -> None:
        """
        Set the apply delay of replicas by their names.
        """
        for name, delay in seconds.items():
            self._pg.replicas[name].apply_delay(delay)

    def play(self, strategy: str, shape: Shape, loop: Loop) -> Outcome:
        """
        Serve the shop by a strategy, play a trace against it, and judge what its clients saw.
        """
        self._runs += 1
        with _listening() as listener, ExitStack() as stack:
            self._serve(stack, strategy, listener)
            self._beat()
            config = load.Config(
                port=listener.getsockname()[1],
                shape=shape,
                loop=loop,
                first_key=self._runs * KEYS_OF_RUN,
                pin_seconds=PINS.get(strategy, 0.0),
            )
            player = _started(stack, load.__name__, config.to_text(), stdout=subprocess.PIPE)
            assert player.stdout is not None
            _expect(player, b"measuring")
            for conn in self._watching.values():
                conn.execute("SELECT pg_stat_statements_reset()")
            _expect(player, b"over")
            loads = self._loads()
            recorded = json.loads(player.stdout.readline() or "{}")
        if not recorded:
            raise RuntimeError(f"the load of {strategy!r} ended without a record")
        samples = [Sample(*each) for each in recorded["samples"]]
        share = recorded["cpu_seconds"] / shape.seconds
        return judge(strategy, samples, shape.seconds, share, loads)

    def _serve(self, stack: ExitStack, strategy: str, listener: socket.socket) -> None:
        replicas = {name: node.conninfo_for("app") for name, node in self._pg.replicas.items()}
        config = application.Config(
            strategy=strategy,
            primary=self._pg.primary.conninfo_for("app"),
            replicas=replicas,
            listener=listener.fileno(),
            connections=CONNECTIONS,
            read_seconds=READ_SECONDS,
        )
        _started(stack, application.__name__, config.to_text(), pass_fds=[listener.fileno()])

    def _beat(self) -> None:
        # On an idle primary the rule of `lag only` takes the time since the last commit for lag.
        for number in range(HEARTBEATS):
            self._watching["primary"].execute(
                "INSERT INTO entries (key, number) VALUES (%s, %s)", [-self._runs, number]
            )
            time.sleep(HEARTBEAT_SECONDS)

    def _loads(self) -> dict[str, Load]:
        found = {}
        for name, conn in self._watching.items():
            row = conn.execute(_LOAD).fetchone()
            assert row is not None
            found[name] = Load(*row)
        return found


@contextmanager
def open_stage() -> Iterator[Stage]:
    """
    Start a primary and two replicas that count their statements, for the time of the block.
    """
    with ExitStack() as stack:
        pg = stack.enter_context(EmbeddedCluster(replicas=2, settings=_SETTINGS))
        pg.primary.execute(application.SCHEMA)
        pg.primary.execute("GRANT ALL ON entries TO app")
        pg.wait_caught_up()
        watching = {name: stack.enter_context(node.connect()) for name, node in pg.nodes.items()}
        yield Stage(pg, watching)


@contextmanager
def _listening() -> Iterator[socket.socket]:
    # Open before the shop runs: who connects early waits, and nobody has to guess a port.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(BACKLOG)
        yield listener


def _started(stack: ExitStack, module: str, config: str, **options: Any) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-m", module, config], **options)
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _expect(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdout is not None
    found = process.stdout.readline().strip()
    if found != line:
        raise RuntimeError(f"the load said {found!r} instead of {line!r}")
