"""
What a decision says: the node that serves a read, and the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Role = Literal["primary", "replica"]


class Reason(StrEnum):
    """
    Why a read went where it went.
    """

    CAUGHT_UP = "caught_up"
    """A replica has replayed every position that the token asks of it, within the lag bound."""
    WITHIN_LAG = "within_lag"
    """No token for this system; the replica's lag is within the bound."""
    FORCED = "forced"
    """``node=`` named it; no promise was checked."""
    PRIMARY_REQUIRED = "primary_required"
    """The level, a write, or a pin asks for the primary."""
    NOT_CAUGHT_UP = "not_caught_up"
    """No replica reached the token within ``wait_seconds``."""
    LAG_EXCEEDED = "lag_exceeded"
    """Every healthy replica lags for more than the bound."""
    TIMELINE_CHANGED = "timeline_changed"
    """The token's timeline is not the primary's, and its position is not proven to be on it."""
    NO_REPLICA = "no_replica"
    """No replica is configured, healthy, or known yet."""
    PRIMARY_DOWN = "primary_down"
    """The primary is unreachable and a replica satisfies the token; its lag is not bounded."""


@dataclass(frozen=True, slots=True)
class Route:
    """
    Tell which node serves a read, and why.

    ``waited_seconds`` is the time spent waiting for a replica to reach the token, and
    ``lag_seconds`` the upper bound of the replica's lag at the decision: 0.0 for the primary,
    None where it is not known. ``stale`` is True only where ``on_fallback_limit="stale"`` let a
    replica serve that had not satisfied the read.
    """

    name: str
    role: Role
    reason: Reason
    waited_seconds: float = 0.0
    lag_seconds: float | None = None
    stale: bool = False

    @property
    def is_primary(self) -> bool:
        """
        Tell whether the primary serves the read.
        """
        return self.role == "primary"
