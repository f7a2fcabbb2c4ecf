"""
The router without tokens that the demo is compared with: a random replica serves.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Final, Self

import psycopg
from psycopg_pool import AsyncConnectionPool

from lsn_consistency.demo.shop import View, read_view

MAX_CONNECTIONS: Final = 8
TIMEOUT_SECONDS: Final = 1.0


class Twin:
    """
    Read from a random replica over pools of its own; a replica that is down is passed over.
    """

    def __init__(self, replicas: Mapping[str, str]) -> None:
        self._pools = [
            AsyncConnectionPool[psycopg.AsyncConnection[Any]](
                conninfo,
                name=f"twin {name}",
                min_size=1,
                max_size=MAX_CONNECTIONS,
                timeout=TIMEOUT_SECONDS,
                kwargs={"autocommit": True, "connect_timeout": 2},
                check=AsyncConnectionPool.check_connection,
                open=False,
            )
            for name, conninfo in replicas.items()
        ]

    async def __aenter__(self) -> Self:
        for pool in self._pools:
            await pool.open(wait=False)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for pool in self._pools:
            await pool.close()

    async def read(self, customer: str) -> View:
        """
        Return what a random replica shows.

        Raises `psycopg.OperationalError` when no replica answers.
        """
        failure: psycopg.Error | None = None
        for pool in random.sample(self._pools, len(self._pools)):
            try:
                async with pool.connection() as conn:
                    return await read_view(conn, customer)
            except psycopg.Error as error:
                failure = error
        raise psycopg.OperationalError("no replica answers") from failure
