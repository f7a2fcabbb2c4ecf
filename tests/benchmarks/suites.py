"""
The suites by name, in the order in which they run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from tests.benchmarks.findings import Bench


@dataclass(frozen=True, slots=True)
class Suite:
    """
    Name a module with ``run(bench)``; ``quick`` ones are part of what CI runs.
    """

    name: str
    about: str
    quick: bool

    def load(self) -> Callable[[Bench], None]:
        """
        Import the suite, with the peers that it needs.
        """
        run: Callable[[Bench], None] = import_module(f"tests.benchmarks.{self.name}").run
        return run


SUITES = (
    Suite("decision", "choose() against the routers of others, and against the floor", True),
    Suite("middleware", "what a request costs in the middleware", True),
    Suite("reads", "read() against psycopg_pool and hasql", True),
    Suite("round_trips", "the round trips of a read and a write, counted", True),
    Suite("writes", "write() against the same INSERT without a position", True),
    Suite("probes", "how often a replica is asked, whatever the rate of requests", False),
    Suite("waiters", "10 000 reads that wait for one position", True),
    Suite("memory", "what a waiting read holds, and what a million tokens leave behind", False),
    Suite("workload", "strategies on one trace over HTTP: stale reads, offload, latency", False),
    Suite("workers", "uvicorn and gunicorn with several processes", False),
)
