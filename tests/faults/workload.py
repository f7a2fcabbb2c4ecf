"""
Clients that write and read sets that only grow, over anything that can reach the database.

`Workload` makes the choices, from a seed, and records what each client saw as a history for
`lsn_consistency.testing.check`. How statements reach a server is the matter of an `Access`: the
library's is `Library`, those of the negative controls are in `tests.faults.controls`. So the same
clients can judge all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any, Final, Literal, Protocol

import psycopg

from lsn_consistency import AsyncRouter, Reason, Session, Token
from lsn_consistency.exceptions import LsnConsistencyError
from lsn_consistency.testing import Node, Operation

TABLE: Final = "grown"
SCHEMA: Final = f"""
    DROP TABLE IF EXISTS {TABLE};
    CREATE TABLE {TABLE} (value bigint NOT NULL, key text NOT NULL);
    CREATE INDEX ON {TABLE} (key, value);
    GRANT ALL ON {TABLE} TO app
"""
READ: Final = f"""
    SELECT host(inet_server_addr()), inet_server_port(), pg_is_in_recovery(),
           asked.key, ARRAY(SELECT value FROM {TABLE} WHERE key = asked.key)
    FROM unnest(%s::text[]) AS asked (key)
"""
WRITE: Final = f"""
    INSERT INTO {TABLE} (key, value) SELECT * FROM unnest(%s::text[], %s::bigint[])
    RETURNING host(inet_server_addr()), inet_server_port(), pg_is_in_recovery()
"""
BACK_OFF_SECONDS: Final = 0.01
"""What a client waits after an error, so that one that fails at once does not spin."""

_ERRORS: Final = (psycopg.Error, LsnConsistencyError, OSError, TimeoutError)


@dataclass(frozen=True, slots=True)
class Answer:
    """
    Hold the rows of a statement, and what the access tells of how it came to them.
    """

    rows: Sequence[tuple[Any, ...]]
    token_in: str | None = None
    token_out: str | None = None
    reason: str | None = None
    staleness_seconds: float | None = None


class NotCommittedError(Exception):
    """
    Tell that a write failed before its COMMIT was sent; any other error leaves that open.
    """


class Client(Protocol):
    """
    One session: what it writes and reads must be causal. Its operations may overlap.
    """

    async def write(self, statement: str, parameters: Sequence[Any]) -> Answer:
        """
        Run a statement in a transaction of its own on the primary, and return after COMMIT.
        """

    async def read(self, statement: str, parameters: Sequence[Any]) -> Answer:
        """
        Run one statement that only reads, wherever the access thinks it may be read.
        """


class Access(Protocol):
    """
    A way to reach the database: gives every session a `Client`.
    """

    def session(self) -> Client:
        """
        Begin a session that has seen and written nothing.
        """


class Library:
    """
    Reach the database by the library: each operation is a request that carries the token.
    """

    def __init__(self, router: AsyncRouter) -> None:
        self.router = router

    def session(self) -> Client:
        return _LibraryClient(self.router)


class _LibraryClient:
    """
    Hold the token between the requests of one client, as its cookie would.
    """

    def __init__(self, router: AsyncRouter) -> None:
        self._router = router
        self._token = Token()

    async def write(self, statement: str, parameters: Sequence[Any]) -> Answer:
        with Session(self._token) as session:
            before = session.token
            committing = False
            try:
                async with self._router.write() as conn:
                    rows = await fetch(conn, statement, parameters)
                    committing = True
            except _ERRORS as error:
                if committing:
                    raise
                raise NotCommittedError(str(error)) from error
            finally:
                self._token = self._token.merge(session.token)
            return Answer(rows, _text(before), _text(session.token))

    async def read(self, statement: str, parameters: Sequence[Any]) -> Answer:
        with Session(self._token) as session:
            before = session.token
            try:
                rows = await self._router.run_read(fetch, statement, parameters)
            finally:
                self._token = self._token.merge(session.token)
            route = session.last_route
            reason = route.reason if route else None
            # A replica that serves because the primary is down is not bounded in its lag.
            bound = self._router.settings.max_lag_seconds
            return Answer(
                rows,
                _text(before),
                _text(session.token),
                reason,
                None if reason is Reason.PRIMARY_DOWN else bound,
            )


async def fetch(conn: Any, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """
    Run a statement and return its rows.
    """
    cursor = await conn.execute(statement, parameters)
    rows: list[tuple[Any, ...]] = await cursor.fetchall()
    return rows


def _text(token: Token) -> str:
    return " ".join(f"{held.timeline}:{held.lsn}" for held in token.positions.values())


@dataclass
class Workload:
    """
    Run clients, each with one session after the other, and record what they see.

    Keys are of generations: when ``values_per_key`` have been written for each of ``keys`` keys,
    all clients go on to new ones. The choices of each client follow from ``seed``; how they
    interleave does not. Several workloads can share the table if their ``name`` differs.
    ``read_seconds`` is the clients' own time limit: a read that takes longer
    is cancelled and unanswered, which the history has as "failed".
    """

    access: Access
    name: str = "library"
    clients: int = 6
    seed: int = 0
    keys: int = 5
    values_per_key: int = 40
    keys_per_read: int = 3
    write_share: float = 0.3
    session_length: int = 12
    overlap_share: float = 0.1
    think_seconds: float = 0.002
    read_seconds: float = 5.0
    write_seconds: float = 10.0
    history: list[Operation] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    _gate: asyncio.Event = field(default_factory=asyncio.Event)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _under_way: int = 0
    _values: count[int] = field(default_factory=lambda: count(1))
    _written: int = 0
    _known: dict[frozenset[Hashable], frozenset[Hashable]] = field(default_factory=dict)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """
        Run the clients for the time of the block; operations under way at its end are finished.
        """
        ending = asyncio.Event()
        self._gate.set()
        self._idle.set()
        async with asyncio.TaskGroup() as group:
            for number in range(self.clients):
                group.create_task(self._client(number, ending), name=f"client {number}")
            try:
                yield
            finally:
                ending.set()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """
        Let no client do anything for the time of the block, as if all of them were thinking.
        """
        self._gate.clear()
        try:
            await self._idle.wait()
            yield
        finally:
            self._gate.set()

    @property
    def reads(self) -> int:
        """
        Return how many reads were tried.
        """
        return sum(1 for op in self.history if op.kind == "read")

    @property
    def unanswered(self) -> int:
        """
        Return how many reads were not answered.
        """
        return sum(1 for op in self.history if op.kind == "read" and op.outcome != "ok")

    def latency(self, share: float = 0.99) -> float:
        """
        Return the time in seconds within which that share of the answered reads was answered.
        """
        answered = (op for op in self.history if op.kind == "read" and op.outcome == "ok")
        seconds = sorted(op.ended - op.began for op in answered)
        return seconds[min(len(seconds) - 1, int(share * len(seconds)))] if seconds else 0.0

    def served_by(self, role: Literal["primary", "replica"]) -> int:
        """
        Return how many reads a kind of server has answered, by the servers' own word.
        """
        return sum(1 for op in self.history if op.kind == "read" and op.role == role)

    # The clients

    async def _client(self, number: int, ending: asyncio.Event) -> None:
        random = Random(f"{self.seed} {number}")
        for session in count():
            name = f"{number}.{session}"
            client = self.access.session()
            for _ in range(random.randint(1, self.session_length)):
                if ending.is_set():
                    return
                await self._step(client, name, random)

    async def _step(self, client: Client, name: str, random: Random) -> None:
        """
        Do one thing, or two at once.
        """
        await asyncio.sleep(random.expovariate(1 / self.think_seconds))
        await self._gate.wait()
        steps = []
        for _ in range(2 if random.random() < self.overlap_share else 1):
            if random.random() < self.write_share:
                keys = random.sample(range(self.keys), random.randint(1, 2))
                steps.append(self._write(client, name, keys))
            else:
                keys = random.sample(range(self.keys), min(self.keys, self.keys_per_read))
                steps.append(self._read(client, name, keys))
        self._under_way += 1
        self._idle.clear()
        try:
            done = await asyncio.gather(*steps)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
        if not all(done):
            await asyncio.sleep(BACK_OFF_SECONDS)

    async def _write(self, client: Client, name: str, numbers: Sequence[int]) -> bool:
        keys = self._names(numbers)
        added = {key: next(self._values) for key in keys}
        self._written += len(added)
        answer: Answer | None = None
        outcome: Literal["ok", "failed", "unknown"] = "ok"
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.write_seconds):
                answer = await client.write(WRITE, [list(added), list(added.values())])
        except NotCommittedError as error:
            outcome = "failed"
            self._count(error.__cause__ or error)
        except _ERRORS as error:
            outcome = "unknown"
            self._count(error)
        values = {key: frozenset({value}) for key, value in added.items()}
        self._record(name, "write", began, values, outcome, answer)
        return outcome == "ok"

    async def _read(self, client: Client, name: str, numbers: Sequence[int]) -> bool:
        keys = self._names(numbers)
        answer: Answer | None = None
        values: dict[str, frozenset[Hashable]] = {}
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.read_seconds):
                answer = await client.read(READ, [keys])
            values = {row[3]: self._same(frozenset(row[4])) for row in answer.rows}
        except _ERRORS as error:
            self._count(error)
        self._record(name, "read", began, values, "ok" if answer else "failed", answer)
        return answer is not None

    def _names(self, numbers: Sequence[int]) -> list[str]:
        generation = self._written // (self.keys * self.values_per_key)
        return [f"{self.name} {generation}.{number}" for number in numbers]

    def _same(self, values: frozenset[Hashable]) -> frozenset[Hashable]:
        """
        Return the set that was there before if there was an equal one: most reads show the same.
        """
        return self._known.setdefault(values, values)

    def _count(self, error: BaseException) -> None:
        state = getattr(error, "sqlstate", None)
        self.errors[f"{type(error).__name__} {state}" if state else type(error).__name__] += 1

    def _record(
        self,
        client: str,
        kind: Literal["write", "read"],
        began: float,
        values: Mapping[str, frozenset[Any]],
        outcome: Literal["ok", "failed", "unknown"],
        answer: Answer | None,
    ) -> None:
        node, role = _server(answer)
        given = answer or Answer(())
        self.history.append(
            Operation(
                client=client,
                kind=kind,
                began=began,
                ended=time.monotonic(),
                values=values,
                outcome=outcome,
                node=node,
                role=role,
                token_in=given.token_in,
                token_out=given.token_out,
                staleness_seconds=given.staleness_seconds,
                reason=given.reason,
            )
        )


def _server(answer: Answer | None) -> tuple[str | None, Literal["primary", "replica"] | None]:
    """
    Return which server answered, and as what, by its own word.
    """
    if answer is None or not answer.rows:
        return None, None
    address, port, in_recovery = answer.rows[0][:3]
    return f"{address}:{port}", "replica" if in_recovery else "primary"


def make_table(primary: Node) -> None:
    """
    Make the empty table of the workload on a primary.
    """
    primary.execute(SCHEMA)
