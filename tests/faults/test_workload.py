"""
The workload itself, over a store in memory: what it asks for, and what it writes down.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import psycopg
import pytest

from lsn_consistency.testing import Operation, check
from tests.faults.workload import WRITE, Answer, Client, NotCommittedError, Workload


class Store:
    """
    Keep rows in memory; every read of a session shows what there was ``age`` writes before.
    """

    def __init__(self, age: int = 0) -> None:
        self.rows: list[tuple[str, int]] = []
        self.age = age
        self.sessions = 0

    def session(self) -> Client:
        self.sessions += 1
        return self

    async def write(self, statement: str, parameters: Sequence[Any]) -> Answer:
        assert statement == WRITE
        await asyncio.sleep(0)
        self.rows.extend(zip(*parameters, strict=True))
        return Answer([("here", 1, False)], token_out=str(len(self.rows)))

    async def read(self, statement: str, parameters: Sequence[Any]) -> Answer:
        await asyncio.sleep(0)
        seen = defaultdict(list)
        for key, value in self.rows[: max(0, len(self.rows) - self.age)]:
            seen[key].append(value)
        rows = [("there", 2, True, key, seen[key]) for key in parameters[0]]
        return Answer(rows, reason="because", staleness_seconds=9.0)


class Hanging(Store):
    """Never answer a read."""

    async def read(self, statement: str, parameters: Sequence[Any]) -> Answer:
        await asyncio.Event().wait()
        raise AssertionError


class Failing(Store):
    """Fail every write."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def write(self, statement: str, parameters: Sequence[Any]) -> Answer:
        raise self.error


def run(store: Store, operations: int = 300, **choices: Any) -> Workload:
    """Run a workload until it has recorded so many operations."""
    workload = Workload(store, **{"clients": 3, "think_seconds": 1e-4, **choices})

    async def running() -> None:
        async with asyncio.timeout(30), workload.running():
            while len(workload.history) < operations:
                await asyncio.sleep(0.001)

    asyncio.run(running())
    return workload


def by_client(history: list[Operation]) -> dict[str, list[Operation]]:
    found = defaultdict(list)
    for operation in history:
        found[operation.client].append(operation)
    return found


def test_a_store_that_shows_everything_breaks_no_rule() -> None:
    """What is recorded of a correct store is correct."""
    workload = run(Store())
    report = check(workload.history)
    assert report.ok, str(report)
    assert report.reads > 100
    assert not workload.errors


def test_a_store_that_is_behind_breaks_rules() -> None:
    """Reads that miss the last writes are caught."""
    report = check(run(Store(age=6)).history)
    assert {"read_your_writes"} <= {violation.rule for violation in report.violations}


def test_what_the_server_and_the_access_say_is_recorded() -> None:
    """Server and role are those of the answer; so are token, reason and bound."""
    history = run(Store()).history
    reads = [op for op in history if op.kind == "read"]
    writes = [op for op in history if op.kind == "write"]
    assert {("there:2", "replica", "because", 9.0)} == {
        (op.node, op.role, op.reason, op.staleness_seconds) for op in reads
    }
    assert {("here:1", "primary", None)} == {(op.node, op.role, op.reason) for op in writes}
    assert all(op.token_out for op in writes)


def test_the_seed_decides_what_each_client_does() -> None:
    """The same seed gives every client the same sessions and choices, another seed does not."""

    def choices(seed: int) -> list[list[tuple[str, int]]]:
        # Which generation of keys it is depends on all clients, which key of it does not.
        history = run(Store(), seed=seed, clients=1, overlap_share=0.0).history[:300]
        return [
            [(op.kind, len(op.values)) for op in session] for session in by_client(history).values()
        ]

    assert choices(1) == choices(1)
    assert choices(1) != choices(2)


def test_sessions_are_short_and_each_is_a_client() -> None:
    """A session ends after some operations; the next one is a client that knows nothing."""
    store = Store()
    sessions = by_client(run(store, session_length=4, overlap_share=0.0).history)
    assert max(len(operations) for operations in sessions.values()) <= 4
    assert len(sessions) <= store.sessions
    assert len(sessions) > 300 / 4


def test_keys_are_retired() -> None:
    """No key gets many more values than asked for, and nobody asks for old ones in the end."""
    store = Store()
    workload = run(store, operations=600, keys=2, values_per_key=5)
    sizes = [len(values) for op in workload.history for values in op.values.values()]
    # The keys of a generation get ten values together, and those of writes under way.
    assert max(sizes) <= 10 + 2 * workload.clients
    assert len({key for key, _ in store.rows}) > 20


def test_operations_of_a_session_overlap() -> None:
    """Some things are done two at once."""
    sessions = by_client(run(Store(), overlap_share=0.5).history)
    overlapping = [
        (one, other)
        for operations in sessions.values()
        for one, other in pairwise(operations)
        if other.began < one.ended
    ]
    assert len(overlapping) > 10


def test_clients_that_are_held_do_nothing() -> None:
    """While they are held nothing is under way, and afterwards they go on."""
    workload = Workload(Store(), clients=3, think_seconds=1e-4)

    async def running() -> None:
        async with asyncio.timeout(30), workload.running():
            for _ in range(20):
                async with workload.held():
                    before = len(workload.history)
                    await asyncio.sleep(0.005)
                    assert before == len(workload.history)
                while len(workload.history) == before:
                    await asyncio.sleep(0.001)

    asyncio.run(running())


def test_a_read_that_is_not_answered_in_time_is_a_failed_one() -> None:
    """The clients' own limit ends it, and it is counted."""
    began = time.monotonic()
    workload = run(Hanging(), operations=30, read_seconds=0.01)
    reads = [op for op in workload.history if op.kind == "read"]
    assert {"failed"} == {op.outcome for op in reads}
    assert len(reads) == workload.unanswered == workload.errors["TimeoutError"]
    assert 0.0 == workload.latency()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (NotCommittedError("no"), "failed"),
        (psycopg.OperationalError("gone"), "unknown"),
        (TimeoutError(), "unknown"),
    ],
)
def test_a_write_is_failed_only_if_it_cannot_have_happened(error: Exception, outcome: str) -> None:
    """Whatever else goes wrong leaves open whether it was committed."""
    workload = run(Failing(error), operations=30)
    assert {outcome} == {op.outcome for op in workload.history if op.kind == "write"}
    assert workload.errors


def test_latencies_are_of_the_answered_reads() -> None:
    """The share of reads that were answered within the latency is as asked for."""
    workload = run(Store())
    seconds = sorted(op.ended - op.began for op in workload.history if op.kind == "read")
    assert workload.latency(0.0) == seconds[0]
    assert workload.latency(1.0) == seconds[-1]
    assert len(seconds) == workload.served_by("replica")
