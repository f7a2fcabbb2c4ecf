"""
The clients of a nemesis run, over a router that only takes notes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from lsn_consistency import Consistency, Session
from lsn_consistency._settings import Settings as RouterSettings
from tests.faults.attempts import Attempt, Sample
from tests.faults.clients import PROFILES, Client, Settings
from tests.faults.stage import TABLE

OPERATIONS = 400


class FakeRouter:
    """Answers every read with an empty row of a replica, and takes every write."""

    settings = RouterSettings()

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Any]:
        yield self

    async def execute(self, statement: str, parameters: Any = None) -> Any:
        assert "SET LOCAL" in statement or TABLE in statement

        async def fetchone() -> tuple[str]:
            return ("primary",)

        return SimpleNamespace(fetchone=fetchone)

    async def run_read(self, look: Any, keys: list[int], **options: Any) -> list[Any]:
        return [("replica_1", True, None, None)]


def choices(number: int, seed: int) -> list[tuple[str, str, tuple[Any, ...]]]:
    """Let one client work for a while, and return what it did."""

    async def work() -> list[Sample]:
        taken: list[Sample] = []
        stopping = asyncio.Event()

        def note(sample: Sample) -> None:
            taken.append(sample)
            if len(taken) >= OPERATIONS:
                stopping.set()

        settings = Settings(
            router=FakeRouter(),  # type: ignore[arg-type]
            seed=seed,
            generation=lambda: 3,
            note=note,
            stopping=stopping,
            hedge_after=None,
            pause_seconds=1e-9,
        )
        await Client(number, settings).run()
        assert {3: 0} == settings.in_flight
        return taken[:OPERATIONS]

    return [
        (sample.operation.client, sample.operation.kind, tuple(sample.operation.values))
        for sample in asyncio.run(work())
        # A read that is given up at once has seen nothing.
        if sample.operation.kind == "write" or sample.operation.outcome == "ok"
    ]


@pytest.mark.parametrize("number", [0, 1, 3, 4, 5])
def test_a_seed_replays_the_choices_of_a_client(number: int) -> None:
    """The same seed gives the same operations on the same keys; other seeds and clients do not."""
    once = choices(number, seed=7)

    assert OPERATIONS == len(once)
    assert once == choices(number, seed=7)
    assert once != choices(number, seed=8)
    assert [each[1:] for each in once] != [each[1:] for each in choices(number + 6, seed=7)]


def test_every_level_and_both_kinds_of_commit_are_there() -> None:
    """The profiles cover what the router promises, and clients that give up."""
    levels = {profile.level.name for profile in PROFILES}

    assert {"causal", "read_your_writes", "bounded"} == levels
    assert {True, False} == {profile.asynchronous for profile in PROFILES}
    assert any(profile.strong_share for profile in PROFILES)
    assert any(profile.cancel_share for profile in PROFILES)


def attempted(
    block: Callable[[Attempt], Any],
    level: Consistency = Consistency.CAUSAL,
    cancel_after: float | None = None,
) -> Sample:
    """Carry out one block as an attempt, and return its sample."""

    async def run() -> Sample:
        attempt = Attempt("a", Session(), "write", level, 1, cancel_after)
        async with attempt:
            await block(attempt)
        return attempt.sample(set(), lambda level: 2.0, asynchronous=False)

    return asyncio.run(run())


def test_a_write_that_fails_before_its_commit_has_failed() -> None:
    """An error before COMMIT was sent means that nothing was written."""

    async def block(attempt: Attempt) -> None:
        raise psycopg.OperationalError("the server is gone")

    sample = attempted(block)
    assert "failed" == sample.operation.outcome
    assert isinstance(sample.error, psycopg.OperationalError)
    assert not sample.cancelled


def test_a_write_that_fails_in_its_commit_is_unknown() -> None:
    """An error after COMMIT may have been sent leaves open what happened."""

    async def block(attempt: Attempt) -> None:
        attempt.committing = True
        raise psycopg.OperationalError("the server is gone")

    assert "unknown" == attempted(block).operation.outcome


def test_an_operation_that_is_given_up_says_so() -> None:
    """What the client cancelled itself is told from what nobody answered."""

    async def block(attempt: Attempt) -> None:
        await asyncio.Event().wait()

    sample = attempted(block, cancel_after=0.0)
    assert sample.cancelled
    assert "failed" == sample.operation.outcome


def test_an_error_of_the_test_itself_is_not_swallowed() -> None:
    """Only errors of servers, networks and the router end in the record."""

    async def block(attempt: Attempt) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attempted(block)


@pytest.mark.parametrize(
    ("level", "promised"),
    [
        (Consistency.CAUSAL, 4),
        (Consistency.STRONG, 4),
        (Consistency.READ_YOUR_WRITES, 3),
        (Consistency.bounded(1.0), 2),
    ],
)
def test_a_read_is_judged_by_what_its_level_promises(level: Consistency, promised: int) -> None:
    """Weaker levels promise fewer of the four session guarantees."""

    async def block(attempt: Attempt) -> None:
        return

    assert promised == len(attempted(block, level).operation.promised)
