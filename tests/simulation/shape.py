"""
The shape of a run: what a seed decides before anything happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any, Final

PIN_SECONDS: Final = 1.3

RARE: Final = {"full token": 0.08, "same timeline": 0.2, "revoke": 0.2, "restore": 0.25}
FAULTS: Final = (
    "cancel",
    "crash",
    "cut replication",
    "delay",
    "failover",
    "follow",
    "freeze",
    "full pool",
    "full token",
    "hand over",
    "hold",
    "kill connection",
    "lag",
    "partition",
    "pause",
    "restartpoint",
    "restore",
    "revoke",
    "same timeline",
    "slow link",
    "stop",
    "zombie",
)


@dataclass(frozen=True)
class Shape:
    """
    Say what a world consists of and which faults it knows.

    Each run enables some kinds of faults and leaves the others out, so that rare combinations are
    not drowned by frequent ones (swarm testing, Groce et al., 2012).
    """

    replicas: int
    processes: int
    clients: int
    privilege: str
    hidden: bool
    pooled: bool
    stranger: bool
    given: bool
    autocommit: bool
    silent: bool
    applying: float
    asynchronous: float
    commit_seconds: float
    think_seconds: float
    tick_seconds: float
    fault_seconds: float
    max_lag_seconds: float
    wait_seconds: float
    poll_interval: float
    max_fallback_reads: int | None
    on_fallback_limit: str
    faults: frozenset[str]

    @classmethod
    def draw(cls, chance: Random, fixed: Mapping[str, Any]) -> Shape:
        """Draw a shape; what is ``fixed`` stays as it is said, and changes nothing else."""
        unknown = set(fixed) - {each.name for each in fields(cls)}
        if unknown:
            raise ValueError(f"a shape has no {', '.join(sorted(unknown))}")
        drawn = cls(
            replicas=chance.choice((2, 3, 3)),
            processes=chance.choice((1, 2, 2, 3)),
            clients=chance.choice((2, 3, 4)),
            privilege=chance.choice(("plain", "stats", "stats", "replication")),
            hidden=chance.random() < 0.2,
            pooled=chance.random() < 0.15,
            stranger=chance.random() < 0.1,
            given=chance.random() < 0.2,
            autocommit=chance.random() < 0.5,
            silent=chance.random() < 0.3,
            applying=chance.choice((0.0, 0.5, 1.0)),
            asynchronous=chance.choice((0.0, 0.0, 0.3)),
            commit_seconds=chance.choice((0.002, 0.002, 0.03, 0.3)),
            think_seconds=chance.choice((0.04, 0.1, 0.2)),
            tick_seconds=chance.choice((0.01, 0.03, 0.06)),
            fault_seconds=chance.choice((0.06, 0.12, 0.3)),
            max_lag_seconds=chance.choice((0.4, 1.2)),
            wait_seconds=chance.choice((0.1, 0.1, 0.0, 0.4)),
            poll_interval=chance.choice((0.5, 0.2)),
            max_fallback_reads=chance.choice((None, None, None, 1)),
            on_fallback_limit=chance.choice(("wait", "stale", "error")),
            faults=frozenset(each for each in FAULTS if chance.random() < RARE.get(each, 0.45)),
        )
        return replace(drawn, **fixed)

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the routers."""
        return {
            "max_lag_seconds": self.max_lag_seconds,
            "pin_seconds": PIN_SECONDS,
            "wait_seconds": self.wait_seconds,
            "poll_interval": self.poll_interval,
            "probe_timeout": 0.6,
            "connect_timeout": 1.0,
            "fallback_wait_seconds": 0.5,
            "max_fallback_reads": self.max_fallback_reads,
            "on_fallback_limit": self.on_fallback_limit,
        }
