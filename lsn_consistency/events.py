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
    | LagExceeded
    | NodeFailed
    | NodeRecovered
    | RoleChanged
    | FallbackLimited
)

EventHook = Callable[[Event], None]
"""A plain callable that takes one event and does not block."""
