"""
The clients of a nemesis run: what they do, from a seed.

A client holds one session after the other, and in each writes and reads sets that only grow. The
keys are of generations: writes go to the present one, reads ask for the present one and the one
before, so two generations hold all that is needed to judge the later one, and older ones can be
forgotten. Every choice comes from the client's own random numbers; only times differ from run to
run.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Final, Literal, NamedTuple

from lsn_consistency import AsyncRouter, Consistency, Session, TokenCodec
from tests.faults.attempts import Attempt, Sample
from tests.faults.stage import TABLE

KEYS: Final = 12
"""Keys of one generation."""

BACK_OFF_SECONDS: Final = (0.25, 2.0)
"""What a client waits after an error before it goes on, twice as long after each that follows."""

REQUESTS_OF_SESSION: Final = (5, 30)
OPERATIONS_OF_REQUEST: Final = (1, 3)
WRITE_SHARE: Final = 0.3
PARALLEL_SHARE: Final = 0.1
"""Share of the reads that come as two at once in one session."""

CANCEL_SECONDS: Final = (0.0, 0.02)
"""When an operation that the client gives up is cancelled; most are under way then."""

_CODEC: Final = TokenCodec("the key of a nemesis run", max_age=3600)

_READ: Final = f"""
    SELECT server.node, server.standby, entry.key, entry.value
    FROM (SELECT current_setting('cluster_name') AS node, pg_is_in_recovery() AS standby) AS server
    LEFT JOIN {TABLE} AS entry ON entry.key = ANY(%s)
"""
_WRITE: Final = f"""
    INSERT INTO {TABLE} (value, key) SELECT * FROM unnest(%s::bigint[], %s::bigint[])
    RETURNING current_setting('cluster_name')
"""


class Profile(NamedTuple):
    """
    What one client is like: its level, how it commits, how often it asks for more or gives up.
    """

    level: Consistency
    strong_share: float = 0.0
    asynchronous: bool = False
    cancel_share: float = 0.0


PROFILES: Final = (
    Profile(Consistency.CAUSAL),
    Profile(Consistency.CAUSAL, asynchronous=True),
    Profile(Consistency.CAUSAL, cancel_share=0.05),
    Profile(Consistency.CAUSAL, strong_share=0.05),
    Profile(Consistency.READ_YOUR_WRITES),
    Profile(Consistency.bounded(1.5)),
)


@dataclass(slots=True)
class Settings:
    """
    Hold what all clients of a run share.

    ``generation`` gives the present one; ``note`` takes each sample, ``stopping`` ends them.
    ``in_flight`` counts the operations under way by the generation in which they began.
    """

    router: AsyncRouter
    seed: int
    generation: Callable[[], int]
    note: Callable[[Sample], object]
    stopping: asyncio.Event
    hedge_after: float | None
    pause_seconds: float = 0.05
    values: Any = field(default_factory=lambda: count(1))
    in_flight: dict[int, int] = field(default_factory=dict)

    def bound(self, level: Consistency) -> float:
        """
        Return the greatest lag in seconds that a level allows.
        """
        return level.lag_limit(self.router.settings.max_lag_seconds)


class Client:
    """
    One client: runs sessions until told to stop.
    """

    def __init__(self, number: int, settings: Settings) -> None:
        self.number = number
        self.profile = PROFILES[number % len(PROFILES)]
        self.sessions = 0
        self._settings = settings
        self._chance = random.Random(f"client {settings.seed} {number}")
        self._seen_on_replica: set[int] = set()
        self._errors = 0

    async def run(self) -> None:
        """
        Hold one session after the other.
        """
        while not self._settings.stopping.is_set():
            self.sessions += 1
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
        generation = self._settings.generation()
        numbers = self._chance.sample(range(KEYS), self._chance.randint(1, 2))
        added = {generation * KEYS + number: next(self._settings.values) for number in numbers}
        attempt = self._attempt(session, "write", self.profile.level, generation, cancel_after)
        attempt.values = {key: frozenset({value}) for key, value in added.items()}
        attempt.role = "primary"
        async with attempt, self._settings.router.write() as conn:
            if self.profile.asynchronous:
                await conn.execute("SET LOCAL synchronous_commit = off")
            cursor = await conn.execute(_WRITE, [list(added.values()), list(added)])
            row = await cursor.fetchone()
            attempt.node = row[0] if row else None
            attempt.committing = True
        return self._note(attempt, generation)

    async def _read(self, session: Session, cancel_after: float | None) -> bool:
        generation = self._settings.generation()
        pick = partial(self._chance.randrange, KEYS)
        earlier = max(generation - 1, 0)
        keys = sorted(
            {generation * KEYS + pick(), generation * KEYS + pick(), earlier * KEYS + pick()}
        )
        strong = self._chance.random() < self.profile.strong_share
        level = Consistency.STRONG if strong else self.profile.level
        attempt = self._attempt(session, "read", level, generation, cancel_after)
        async with attempt:
            rows = await self._settings.router.run_read(
                _look, keys, consistency=level, hedge_after=self._settings.hedge_after
            )
            attempt.node = rows[0][0]
            attempt.role = "replica" if rows[0][1] else "primary"
            attempt.values = {
                key: frozenset(row[3] for row in rows if row[2] == key) for key in keys
            }
        return self._note(attempt, generation)

    def _attempt(
        self,
        session: Session,
        kind: Literal["read", "write"],
        level: Consistency,
        generation: int,
        cancel_after: float | None,
    ) -> Attempt:
        flying = self._settings.in_flight
        flying[generation] = flying.get(generation, 0) + 1
        name = f"{self.number}.{self.sessions}"
        return Attempt(name, session, kind, level, generation, cancel_after)

    def _note(self, attempt: Attempt, generation: int) -> bool:
        sample = attempt.sample(
            self._seen_on_replica, self._settings.bound, self.profile.asynchronous
        )
        operation = sample.operation
        if operation.kind == "read" and operation.role == "replica":
            self._seen_on_replica.update(attempt.values)
        self._settings.in_flight[generation] -= 1
        self._settings.note(sample)
        return attempt.satisfied


async def _look(conn: Any, keys: list[int]) -> list[Any]:
    cursor = await conn.execute(_READ, [keys])
    rows: list[Any] = await cursor.fetchall()
    return rows
