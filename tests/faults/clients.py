"""
The clients of a nemesis run: what they do, from a seed, and what they record of it.

A client holds one session after the other, and in each writes and reads sets that only grow. The
keys are of generations: writes go to the present one, reads ask for the present one and the one
before, so two generations hold all that is needed to judge the later one, and older ones can be
forgotten. Every choice comes from the client's own random numbers; only times differ from run to
run.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Final, Literal, NamedTuple

import psycopg

from lsn_consistency import AsyncRouter, Consistency, Position, Session, TokenCodec
from lsn_consistency.exceptions import LsnConsistencyError
from lsn_consistency.testing.checker import CAUSAL, Guarantee, Operation
from tests.faults.stage import TABLE

KEYS: Final = 12
"""Keys of one generation."""

DEADLINE_SECONDS: Final = 6.0
"""How long an operation may take, as the clients' own limit; above every limit of the router."""

_CODEC: Final = TokenCodec("the key of a nemesis run", max_age=3600)

BACK_OFF_SECONDS: Final = (0.25, 2.0)
"""What a client waits after an error before it goes on, twice as long after each that follows."""

REQUESTS_OF_SESSION: Final = (5, 30)
OPERATIONS_OF_REQUEST: Final = (1, 3)
WRITE_SHARE: Final = 0.3
PARALLEL_SHARE: Final = 0.1
"""Share of the reads that come as two at once in one session."""

CANCEL_SECONDS: Final = (0.0, 0.02)
"""When an operation that the client gives up is cancelled; most are under way then."""

_READ: Final = f"""
    SELECT server.node, server.standby, entry.key, entry.value
    FROM (SELECT current_setting('cluster_name') AS node, pg_is_in_recovery() AS standby) AS server
    LEFT JOIN {TABLE} AS entry ON entry.key = ANY(%s)
"""
_WRITE: Final = f"""
    INSERT INTO {TABLE} (value, key) SELECT * FROM unnest(%s::bigint[], %s::bigint[])
    RETURNING current_setting('cluster_name')
"""
_ERRORS: Final = (psycopg.Error, LsnConsistencyError, TimeoutError, OSError)

# A snapshot of a standby is a prefix of the primary's log, so whatever a read promises, it shows
# no write without what came before it.
_PREFIX: Final[frozenset[Guarantee]] = frozenset({"writes_follow_reads", "monotonic_writes"})


Role = Literal["primary", "replica"]


class Profile(NamedTuple):
    """
    What one client is like: its level, how it commits, and how often it gives up.
    """

    name: str
    level: Consistency
    promised: frozenset[Guarantee] = CAUSAL
    asynchronous: bool = False
    cancel_share: float = 0.0


PROFILES: Final = (
    Profile("causal", Consistency.CAUSAL),
    Profile("causal, asynchronous commits", Consistency.CAUSAL, asynchronous=True),
    Profile("causal, gives up", Consistency.CAUSAL, cancel_share=0.05),
    Profile("causal", Consistency.CAUSAL),
    Profile("read your writes", Consistency.READ_YOUR_WRITES, _PREFIX | {"read_your_writes"}),
    Profile("bounded", Consistency.bounded(1.5), _PREFIX),
)


class Sample(NamedTuple):
    """
    What is counted of one operation beside what is judged.

    ``pinned`` tells that the session was pinned to the primary when the operation began, and
    ``position`` is where the session was then.
    """

    operation: Operation
    profile: Profile
    generation: int
    error: BaseException | None
    cancelled: bool
    pinned: bool
    position: Position | None
    waited_seconds: float
    from_replica: bool
    """The same session had read one of the keys on a replica before."""


@dataclass(slots=True)
class Settings:
    """
    Hold what all clients of a run share.

    ``generation`` gives the present one; ``note`` takes each sample, ``stopping`` ends them.
    """

    router: AsyncRouter
    seed: int
    generation: Callable[[], int]
    note: Callable[[Sample], object]
    stopping: asyncio.Event
    pause_seconds: float = 0.05
    hedge_after: float | None = 0.25
    values: Any = field(default_factory=lambda: count(1))
    in_flight: dict[int, int] = field(default_factory=dict)

    def run_read(self, *args: Any, consistency: Consistency) -> Any:
        options: dict[str, Any] = {"consistency": consistency}
        if _HEDGES:
            options["hedge_after"] = self.hedge_after
        return self.router.run_read(*args, **options)


_HEDGES: Final = "hedge_after" in inspect.signature(AsyncRouter.run_read).parameters


class _Outcome:
    """
    Take down how an operation ended: what came of it, and by which error.
    """

    def __init__(self, cancel_after: float | None) -> None:
        self._cancel_after = cancel_after
        self._limit = asyncio.timeout(DEADLINE_SECONDS if cancel_after is None else cancel_after)
        self.result: Literal["ok", "failed", "unknown"] = "failed"
        self.error: BaseException | None = None

    @property
    def cancelled(self) -> bool:
        return self._cancel_after is not None and self._limit.expired()

    async def __aenter__(self) -> _Outcome:
        await self._limit.__aenter__()
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError as late:
            self.error = late
            return True
        if isinstance(error, _ERRORS):
            self.error = error
            return True
        if error is None:
            self.result = "ok"
        return False


class Client:
    """
    One client: runs sessions until told to stop.
    """

    def __init__(self, number: int, settings: Settings) -> None:
        self.number = number
        self.profile = PROFILES[number % len(PROFILES)]
        self._settings = settings
        self._chance = random.Random(f"client {settings.seed} {number}")
        self._name = ""
        self._seen_on_replica: set[int] = set()
        self.sessions = 0
        self._errors = 0

    async def run(self) -> None:
        """
        Hold one session after the other.
        """
        for number in count(1):
            self._name, self.sessions = f"{self.number}.{number}", number
            self._seen_on_replica = set()
            text = ""
            for _ in range(self._chance.randint(*REQUESTS_OF_SESSION)):
                # What a client keeps from request to request is the text of its token.
                with Session(_CODEC.decode(text) if text else None) as session:
                    for _ in range(self._chance.randint(*OPERATIONS_OF_REQUEST)):
                        if self._settings.stopping.is_set():
                            return
                        await self._step(session)
                    text = _CODEC.encode(session.token)

    async def _step(self, session: Session) -> None:
        chance = self._chance
        await asyncio.sleep(chance.expovariate(1 / self._settings.pause_seconds))
        write = chance.random() < WRITE_SHARE
        gives_up = chance.random() < self.profile.cancel_share
        after = chance.uniform(*CANCEL_SECONDS)
        cancel_after = after if gives_up else None
        if write:
            steps = [self._write(session, cancel_after)]
        else:
            together = 2 if chance.random() < PARALLEL_SHARE else 1
            steps = [self._read(session, cancel_after) for _ in range(together)]
        if all(await asyncio.gather(*steps)):
            self._errors = 0
        else:
            shortest, longest = BACK_OFF_SECONDS
            await asyncio.sleep(min(shortest * 2.0**self._errors, longest))
            self._errors += 1

    async def _write(self, session: Session, cancel_after: float | None) -> bool:
        generation, began = self._begin()
        numbers = self._chance.sample(range(KEYS), self._chance.randint(1, 2))
        added = {generation * KEYS + number: next(self._settings.values) for number in numbers}
        node: str | None = None
        committing = False
        before = _state(session)
        async with _Outcome(cancel_after) as outcome, self._settings.router.write() as conn:
            if self.profile.asynchronous:
                await conn.execute("SET LOCAL synchronous_commit = off")
            cursor = await conn.execute(_WRITE, [list(added.values()), list(added)])
            node = (await cursor.fetchone() or (None,))[0]
            # What happens from here on may happen after the commit.
            committing = True
        if committing and outcome.result == "failed":
            outcome.result = "unknown"
        values = {key: frozenset({value}) for key, value in added.items()}
        return self._end(
            session, before, generation, outcome, "write", began, values, node, "primary"
        )

    async def _read(self, session: Session, cancel_after: float | None) -> bool:
        generation, began = self._begin()
        pick = partial(self._chance.randrange, KEYS)
        keys = {generation * KEYS + pick(), generation * KEYS + pick()}
        if generation:
            keys.add((generation - 1) * KEYS + pick())
        values: dict[int, frozenset[int]] = {}
        rows: list[Any] = []
        before = _state(session)
        async with _Outcome(cancel_after) as outcome:
            rows = await self._settings.run_read(
                _look, sorted(keys), consistency=self.profile.level
            )
        if rows:
            values = {
                key: frozenset(row[3] for row in rows if row[2] == key) for key in sorted(keys)
            }
        node = rows[0][0] if rows else None
        role: Role | None = None
        if rows:
            role = "replica" if rows[0][1] else "primary"
        return self._end(session, before, generation, outcome, "read", began, values, node, role)

    def _begin(self) -> tuple[int, float]:
        generation = self._settings.generation()
        flying = self._settings.in_flight
        flying[generation] = flying.get(generation, 0) + 1
        return generation, time.monotonic()

    def _end(
        self,
        session: Session,
        before: _State,
        generation: int,
        outcome: _Outcome,
        kind: Literal["read", "write"],
        began: float,
        values: Mapping[int, frozenset[int]],
        node: str | None,
        role: Role | None,
    ) -> bool:
        route = session.last_route if kind == "read" and outcome.result == "ok" else None
        if route is not None and route.role != role:
            # Another read of the session was routed meanwhile.
            route = None
        operation = Operation(
            client=self._name,
            kind=kind,
            began=began,
            ended=time.monotonic(),
            values=values,
            outcome=outcome.result,
            node=node,
            role=role,
            token_in=str(before.position),
            token_out=str(_state(session).position),
            staleness_seconds=self._bound(route) if kind == "read" else None,
            promised=self.profile.promised,
            reason=route.reason.value if route else None,
        )
        seen = not self._seen_on_replica.isdisjoint(values)
        if role == "replica" and kind == "read":
            self._seen_on_replica.update(values)
        self._settings.in_flight[generation] -= 1
        self._settings.note(
            Sample(
                operation,
                self.profile,
                generation,
                outcome.error,
                outcome.cancelled,
                before.pinned,
                before.position,
                route.waited_seconds if route else 0.0,
                seen and role == "primary" and kind == "read",
            )
        )
        return outcome.result == "ok" or outcome.cancelled

    def _bound(self, route: Any) -> float | None:
        # A replica that serves because the primary is down is not bounded in its lag.
        if route is None or route.reason == "primary_down":
            return None
        return self.profile.level.lag_limit(self._settings.router.settings.max_lag_seconds)


class _State(NamedTuple):
    position: Position | None
    pinned: bool


def _state(session: Session) -> _State:
    token = session.token
    position = next(iter(token.positions.values()), None)
    return _State(position, token.pin_until is not None and token.pin_until > time.time())


async def _look(conn: Any, keys: list[int]) -> list[Any]:
    cursor = await conn.execute(_READ, [keys])
    rows: list[Any] = await cursor.fetchall()
    return rows
