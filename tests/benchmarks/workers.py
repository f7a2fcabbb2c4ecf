"""
Many processes: uvicorn and gunicorn with several workers, what they promise, ask and hold.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from lsn_consistency._settings import Settings
from lsn_consistency.testing import EmbeddedCluster
from tests.benchmarks.findings import Bench
from tests.benchmarks.shop.application import SCHEMA, Config
from tests.benchmarks.shop.processes import Probes, Setup, memory, serving
from tests.benchmarks.shop.served import ANY_REPLICA
from tests.benchmarks.shop.visitors import Visits, visit

SETUPS: Final = (
    Setup("uvicorn", 1),
    Setup("uvicorn", 2),
    Setup("uvicorn", 4),
    Setup("gunicorn", 4),
    Setup("gunicorn", 4, preload=True),
    Setup("uvicorn", 4, router=False),
    Setup("gunicorn", 4, router=False),
)
QUICK_SETUPS: Final = (Setup("uvicorn", 2), Setup("gunicorn", 4, preload=True))

CONNECTIONS: Final = 4
READ_SECONDS: Final = 0.002
LATE_SECONDS: Final = 0.05
SESSIONS: Final = 16
KEYS_OF_SETUP: Final = 100_000

SETTLE_SECONDS: Final = 1.0
SECONDS: Final = 4.0
LOOK_SECONDS: Final = 0.002


@dataclass(frozen=True, slots=True)
class Found:
    """
    Hold what one setup gave: probes are those of the busiest replica.
    """

    setup: Setup
    visits: Visits
    seconds: float
    stale: int
    backward: int
    idle_probes: float
    busy_probes: float
    most_in_flight: int
    memory: dict[str, float]


def run(bench: Bench) -> None:
    """
    Run the suite.
    """
    with ExitStack() as stack:
        settings = {"shared_preload_libraries": "pg_stat_statements"}
        pg = stack.enter_context(EmbeddedCluster(replicas=2, settings=settings))
        pg.primary.execute(SCHEMA)
        pg.primary.execute("GRANT ALL ON entries TO app")
        pg.replicas["replica_2"].apply_delay(LATE_SECONDS)
        watching = {n: stack.enter_context(r.connect()) for n, r in pg.replicas.items()}
        found = [
            _measure(bench, pg, Probes(watching), setup, number * KEYS_OF_SETUP)
            for number, setup in enumerate(QUICK_SETUPS if bench.quick else SETUPS, 1)
        ]
    _report(bench, found)


def _measure(
    bench: Bench, pg: EmbeddedCluster, probes: Probes, setup: Setup, first_key: int
) -> Found:
    config = Config(
        strategy="CAUSAL" if setup.router else ANY_REPLICA,
        primary=pg.primary.conninfo_for("app"),
        replicas={name: node.conninfo_for("app") for name, node in pg.replicas.items()},
        connections=CONNECTIONS,
        read_seconds=READ_SECONDS,
    )
    seconds = 2.0 if bench.quick else SECONDS
    with serving(setup, config, first_key) as port:
        time.sleep(SETTLE_SECONDS)
        idle = _idle(probes, seconds) if setup.router else 0.0
        probes.reset()
        with _Watch(probes) as watch:
            began = time.monotonic()
            busy_key = first_key + KEYS_OF_SETUP // 2
            visits = asyncio.run(visit(port, busy_key, sessions=SESSIONS, seconds=seconds))
            taken = time.monotonic() - began
        busy = probes.count() / taken
        held = memory(visits.pids)
    report = visits.judge()
    found = Found(
        setup=setup,
        visits=visits,
        seconds=taken,
        stale=report.count("read_your_writes"),
        backward=report.count("monotonic_reads"),
        idle_probes=idle / setup.routers,
        busy_probes=busy / setup.workers,
        most_in_flight=watch.most,
        memory=held,
    )
    bench.say(
        f"{setup}: {found.stale} of {visits.reads} reads stale, {visits.failed} failed, "
        f"{visits.moved:.0%} of the requests on another process than the last; "
        f"{found.idle_probes:.1f} probes a second and process idle, {found.busy_probes:.0f} busy"
    )
    return found


def _idle(probes: Probes, seconds: float) -> float:
    probes.reset()
    began = time.monotonic()
    time.sleep(seconds)
    return probes.count() / (time.monotonic() - began)


class _Watch:
    """Look again and again how many probes are in flight, in a thread."""

    def __init__(self, probes: Probes) -> None:
        self._probes = probes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.most = 0

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.most = max(self.most, self._probes.in_flight())


def _report(bench: Bench, found: list[Found]) -> None:
    bench.table(
        "One shop in several processes",
        (
            "server",
            "stale reads",
            "requests/s",
            "moved to another process",
            "probes/s and process, idle",
            "probes/s and process, busy",
            "memory of a worker: RSS",
            "PSS",
        ),
        [_row(each) for each in found],
        f"{SESSIONS} sessions, each request on a connection of its own, a write and "
        "5 reads of it in turn; one of two replicas is "
        f"{LATE_SECONDS * 1000:.0f} ms late. Probes are those of the busiest replica, by its "
        f"pg_stat_statements. {CONNECTIONS} connections a server and process. Without router: any "
        "replica.",
    )
    _bars(bench, [each for each in found if each.setup.router])
    plain = [each for each in found if not each.setup.router]
    if plain:
        bench.find(
            "workers.control",
            "stale reads without the router, which the judge has to find",
            min(each.stale for each in plain),
            "reads",
            at_least=1,
        )
    _memory(bench, found)


def _bars(bench: Bench, routed: list[Found]) -> None:
    counts = {
        "stale": ("stale reads, all servers", sum(each.stale for each in routed), "reads"),
        "backward": (
            "non-monotonic reads, all servers",
            sum(each.backward for each in routed),
            "reads",
        ),
        "failed": (
            "failed requests, all servers",
            sum(each.visits.failed for each in routed),
            "requests",
        ),
    }
    for key, (title, count, unit) in counts.items():
        bench.find(f"workers.{key}", title, count, unit, at_most=0)
    bench.find(
        "workers.idle_probes",
        "probes a replica gets from an idle process with a router, the most of all servers",
        max(each.idle_probes for each in routed),
        "/s",
        at_most=1.5 / Settings().poll_interval,
    )
    bench.find(
        "workers.probes_in_flight",
        "probes in flight at once on a replica over the number of processes, the most of all",
        max(each.most_in_flight / each.setup.workers for each in routed),
        "",
        at_most=1,
    )


def _memory(bench: Bench, found: list[Found]) -> None:
    plain = {each.setup.server: each.memory for each in found if not each.setup.router}
    for each in found:
        setup = each.setup
        if setup.router and setup.workers == 4 and not setup.preload and setup.server in plain:
            bench.find(
                f"workers.memory.{setup.server}",
                f"what the router adds to a worker's proportional memory, {setup.server}",
                each.memory["Pss"] - plain[setup.server]["Pss"],
                "MiB",
            )


def _row(found: Found) -> list[str]:
    reads = found.visits.reads
    routed = found.setup.router
    return [
        str(found.setup),
        f"{found.stale} of {reads}",
        f"{len(found.visits.operations) / found.seconds:.0f}",
        f"{found.visits.moved:.0%}",
        f"{found.idle_probes:.1f}" if routed else "",
        f"{found.busy_probes:.0f}" if routed else "",
        f"{found.memory['Rss']:.1f} MiB",
        f"{found.memory['Pss']:.1f} MiB",
    ]
