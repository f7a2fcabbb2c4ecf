"""
The rule of djanorm: replicas whose measured lag is under a threshold, with its defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg
from dorm.contrib.lag_router import LagAwareReadRouter
from starlette.requests import Request

from tests.benchmarks.shop.strategies import PRIMARY, Strategy


class LagOnly(Strategy):
    """
    Read from a replica whose lag is under a threshold: `LagAwareReadRouter`.

    The rule is the installed one. Its query goes over a connection that stays open instead of
    through dorm's ORM, which is in its favour.
    """

    def __init__(self, primary: str, replicas: Mapping[str, str], connections: int) -> None:
        super().__init__(primary, replicas, connections)
        self._router = _LagRouter(primary=PRIMARY, replicas=list(replicas))
        self._conninfos = replicas

    async def open(self) -> None:
        await super().open()
        self._router.connections = {
            name: psycopg.connect(conninfo, autocommit=True)
            for name, conninfo in self._conninfos.items()
        }

    async def close(self) -> None:
        await super().close()
        for conn in self._router.connections.values():
            conn.close()

    def choose(self, request: Request) -> str:
        name: str = self._router.db_for_read(None)
        return name


class _LagRouter(LagAwareReadRouter):  # type: ignore[misc]
    connections: Mapping[str, psycopg.Connection[Any]] = {}

    def _measure_lag(self, alias: str) -> float:
        row = (
            self.connections[alias]
            .execute("SELECT EXTRACT(EPOCH FROM (now() - pg_last_xact_replay_timestamp())) AS lag")
            .fetchone()
        )
        return 0.0 if row is None or row[0] is None else float(row[0])
