"""
One operation of a client under faults: what was tried, how it ended, and what to count of it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, Literal, NamedTuple, Self

import psycopg

from lsn_consistency import Consistency, Position, Route, Session
from lsn_consistency.exceptions import LsnConsistencyError
from lsn_consistency.testing.checker import CAUSAL, Guarantee, Operation

DEADLINE_SECONDS: Final = 10.0
"""How long an operation may take, as the clients' own limit; above every limit of the router."""

_ERRORS: Final = (psycopg.Error, LsnConsistencyError, TimeoutError, OSError)

# A snapshot of a standby is a prefix of the primary's log, so whatever a read promises, it shows
# no write without what came before it.
_PREFIX: Final[frozenset[Guarantee]] = frozenset({"writes_follow_reads", "monotonic_writes"})
_PROMISES: Final[Mapping[str, frozenset[Guarantee]]] = {
    "read_your_writes": _PREFIX | {"read_your_writes"},
    "bounded": _PREFIX,
}

Role = Literal["primary", "replica"]


class Sample(NamedTuple):
    """
    What is counted of one operation beside what is judged.

    ``position`` is where the session was when the operation began, and ``pinned_until`` when its
    pin to the primary ends, on the clock of the operation. ``from_replica`` tells that the
    primary answered, and that the same session had read one of the keys on a replica before.
    """

    operation: Operation
    level: str
    asynchronous: bool
    generation: int
    error: BaseException | None
    cancelled: bool
    pinned_until: float
    position: Position | None
    from_replica: bool


class Attempt:
    """
    Carry out one operation in an ``async with`` block, and make a `Sample` of it.

    The block sets ``values``, ``node`` and ``role`` as it learns of them, and ``committing`` when
    its COMMIT may have been sent. Errors of servers and router end here, as does the time-out:
    after ``cancel_after`` seconds the client gives up, else after its limit.
    """

    def __init__(
        self,
        client: str,
        session: Session,
        kind: Literal["read", "write"],
        level: Consistency,
        generation: int,
        cancel_after: float | None,
    ) -> None:
        self.values: Mapping[int, frozenset[int]] = {}
        self.node: str | None = None
        self.role: Role | None = None
        self.committing = False
        self._client = client
        self._session = session
        self._kind = kind
        self._level = level
        self._generation = generation
        self._limit = asyncio.timeout(DEADLINE_SECONDS if cancel_after is None else cancel_after)
        self._gives_up = cancel_after is not None
        self._ok = False
        self._error: BaseException | None = None
        self._began = time.monotonic()
        self._position, self._pinned_until = _state(session)

    async def __aenter__(self) -> Self:
        await self._limit.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError as late:
            error = late
        self._ok = error is None
        self._error = error
        return isinstance(error, _ERRORS)

    @property
    def satisfied(self) -> bool:
        """
        Tell whether the client goes on as if nothing had happened.
        """
        return self._ok or self._cancelled

    @property
    def _cancelled(self) -> bool:
        return self._gives_up and self._limit.expired()

    @property
    def _outcome(self) -> Literal["ok", "failed", "unknown"]:
        if self._ok:
            return "ok"
        return "unknown" if self.committing else "failed"

    def sample(
        self, seen_on_replica: set[int], bound: Callable[[Consistency], float], asynchronous: bool
    ) -> Sample:
        """
        Return what to record; ``seen_on_replica`` are the keys that the session read there.
        """
        route = self._route()
        reads = self._kind == "read"
        operation = Operation(
            client=self._client,
            kind=self._kind,
            began=self._began,
            ended=time.monotonic(),
            values=self.values,
            outcome=self._outcome,
            node=self.node,
            role=self.role,
            token_in=str(self._position),
            token_out=str(_state(self._session)[0]),
            staleness_seconds=self._bound(route, bound) if reads else None,
            promised=_PROMISES.get(self._level.name, CAUSAL),
            reason=route.reason.value if route else None,
        )
        return Sample(
            operation,
            str(self._level),
            asynchronous,
            self._generation,
            self._error,
            self._cancelled,
            self._pinned_until,
            self._position,
            reads and self.role == "primary" and not seen_on_replica.isdisjoint(self.values),
        )

    def _route(self) -> Route | None:
        route = self._session.last_route if self._kind == "read" and self._ok else None
        # It may be that of another read of the session, or of the slower half of a hedged one.
        return route if route and route.role == self.role else None

    def _bound(self, route: Route | None, bound: Callable[[Consistency], float]) -> float | None:
        if self._level == Consistency.STRONG:
            return 0.0
        # A replica that serves because the primary is down is not bounded in its lag.
        if route is None or route.reason == "primary_down":
            return None
        return bound(self._level)


def _state(session: Session) -> tuple[Position | None, float]:
    token = session.token
    position = next(iter(token.positions.values()), None)
    if token.pin_until is None:
        return position, -math.inf
    return position, token.pin_until - time.time() + time.monotonic()
