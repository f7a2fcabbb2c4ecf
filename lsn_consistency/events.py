"""
What happened, as frozen records for logs, metrics and tests.

A router calls its ``on_event`` hook with one record per event. The hook is a plain callable; it
runs inside the read or in the monitor, so it must not block. What it raises is logged and goes
no further.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from lsn_consistency.exceptions import TokenError
from lsn_consistency.lsn import Lsn, Position
from lsn_consistency.route import Role, Route
from lsn_consistency.tokens import Token


@dataclass(frozen=True, slots=True)
class ReadRouted:
    """
    A read was given a connection, or ``choose`` gave an answer.
    """

    route: Route


@dataclass(frozen=True, slots=True)
class TokenRejected:
    """
    A token that came in did not verify; it was left out.

    ``carrier`` says where it was found: ``"header"``, ``"cookie"`` or ``"carrier"``.
    """

    error: TokenError
    carrier: Literal["header", "cookie", "carrier"]


@dataclass(frozen=True, slots=True)
class TokenNotSent:
    """
    The session advanced after the response had started, so the client does not get ``token``.
    """

    token: Token


@dataclass(frozen=True, slots=True)
class PositionUnknown:
    """
    The position of a write or a read could not be taken; the session is pinned to the primary.

    ``pin_until`` is the Unix time at which the pin ends.
    """

    error: str
    pin_until: float


@dataclass(frozen=True, slots=True)
class LostWrite:
    """
    A token asks for a position that the primary's log does not have: its write may be lost.

    A failover dropped it, the primary crashed before it had flushed an asynchronous commit, or an
    older backup was restored; or the position covered no more than unused log. ``timeline`` is the
    primary's, ``switch_point`` the LSN at which its log left the timeline of ``position``, or ends
    itself where that is the same one; None where it never was on it.
    """

    position: Position
    timeline: int
    switch_point: Lsn | None


@dataclass(frozen=True, slots=True)
class LagExceeded:
    """
    Every healthy replica lags for more than the bound, so the primary serves.

    ``lag_seconds`` maps each healthy replica to its lag; None where it is not known.
    """

    limit_seconds: float
    lag_seconds: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class NodeFailed:
    """
    A probe or a connection of a node failed; it serves nothing until it is observed again.
    """

    name: str
    error: str
    consecutive_failures: int


@dataclass(frozen=True, slots=True)
class NodeRecovered:
    """
    A node that had failed was observed again.
    """

    name: str


@dataclass(frozen=True, slots=True)
class RoleChanged:
    """
    A node was observed in another role than before; ``before`` is None at the first observation.
    """

    name: str
    before: Role | None
    after: Role


@dataclass(frozen=True, slots=True)
class ReadRetried:
    """
    A run of ``run_read`` failed by the fault of node ``name``, and its function runs elsewhere.

    ``state`` is the SQLSTATE of the failure, None for a lost connection.
    """

    name: str
    state: str | None
    error: str


@dataclass(frozen=True, slots=True)
class ReadHedged:
    """
    A read on ``name`` was slow, so ``other`` was given the same; ``won`` if its answer was taken.
    """

    name: str
    other: str
    won: bool


@dataclass(frozen=True, slots=True)
class FallbackLimited:
    """
    A read found ``max_fallback_reads`` reads on the primary already.

    ``action`` is what ``on_fallback_limit`` asked for.
    """

    limit: int
    action: Literal["wait", "stale", "error"]


Event = (
    ReadRouted
    | TokenRejected
    | TokenNotSent
    | PositionUnknown
    | LostWrite
    | LagExceeded
    | NodeFailed
    | NodeRecovered
    | RoleChanged
    | ReadRetried
    | ReadHedged
    | FallbackLimited
)

EventHook = Callable[[Event], None]
"""A plain callable that takes one event and does not block."""
