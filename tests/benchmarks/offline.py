"""
Routers whose cluster is known without a server: what decides needs no I/O.

All observations are made here, of a primary that was busy for some time and of replicas that have
everything. The clocks are real, so lags are computed; the lag bound is too wide to matter in a run.
"""

from __future__ import annotations

import time
from typing import Any, Final, TypeVar

from lsn_consistency import AsyncRouter, Position, Router, Token
from lsn_consistency._core import Core
from lsn_consistency._observation import Observation, Server
from lsn_consistency.lsn import Lsn

SYSTEM: Final = 7_412_345_678_901_234_567
TIMELINE: Final = 3
LAG_LIMIT_SECONDS: Final = 3600.0
SAMPLES: Final = 256
FIRST_LSN: Final = 0x5_0000_0000
LAST_LSN: Final = FIRST_LSN + SAMPLES * 1000

_AnyRouter = TypeVar("_AnyRouter", Router, AsyncRouter)


def blocking_router(replicas: int, **options: Any) -> Router:
    """
    Return an open router whose replicas have replayed everything up to `LAST_LSN`.
    """
    return _opened(Router, replicas, options)


def async_router(replicas: int, **options: Any) -> AsyncRouter:
    """
    Return the same for asyncio.
    """
    return _opened(AsyncRouter, replicas, options)


def core_of(router: Router | AsyncRouter) -> Core:
    """
    Return the state of a router that was made here.
    """
    core = router._core
    assert core is not None
    return core


def token_at(lsn: int) -> Token:
    """
    Return the token of one position of the cluster.
    """
    return Token([position_at(lsn)])


def position_at(lsn: int) -> Position:
    """
    Return a position of the cluster.
    """
    return Position(SYSTEM, TIMELINE, Lsn(lsn))


def replica_names(replicas: int) -> list[str]:
    """
    Return the names of the replicas.
    """
    return [f"replica_{number}" for number in range(1, replicas + 1)]


def seen_at(lsn: int, *, replica: int = 0, sent_at: float | None = None) -> Observation:
    """
    Return an observation, by default of this moment; number 0 is the primary.
    """
    sent_at = time.monotonic() if sent_at is None else sent_at
    return Observation(
        server=Server(SYSTEM, f"10.0.0.{replica + 1}", 5432, "2026-01-01 00:00:00+00"),
        in_recovery=replica > 0,
        timeline=TIMELINE,
        lsn=Lsn(lsn),
        sent_at=sent_at,
        received_at=sent_at + 0.0002,
        bound=Lsn(lsn),
        flush_lsn=None if replica else Lsn(lsn),
        flush_delay_seconds=0.6,
        streaming=replica > 0,
    )


def _opened(kind: type[_AnyRouter], replicas: int, options: dict[str, Any]) -> _AnyRouter:
    wide = {"max_lag_seconds": LAG_LIMIT_SECONDS, "pin_seconds": LAG_LIMIT_SECONDS}
    sources = {name: f"host={name}" for name in replica_names(replicas)}
    router = kind(primary="host=primary", replicas=sources, **{**wide, **options})
    core = router._new_core(lambda name: None)
    _fill(core, replicas)
    router._core = core
    return router


def _fill(core: Core, replicas: int) -> None:
    # As the monitor of a busy primary has seen it.
    spacing = core.settings.poll_interval
    began = time.monotonic() - (SAMPLES + 1) * spacing
    for number in range(1, SAMPLES + 1):
        seen = seen_at(FIRST_LSN + number * 1000, sent_at=began + number * spacing)
        core.observed("primary", seen, sample=True)
    for replica, name in enumerate(replica_names(replicas), start=1):
        core.observed(name, seen_at(LAST_LSN, replica=replica), sample=True)
