"""
The shop with this library: the router and the middleware as the README has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from lsn_consistency import AsyncRouter, Consistency, ConsistencyMiddleware
from tests.benchmarks.shop.strategies import Block, Strategy


class Ours(Strategy):
    """
    Read from a replica that has replayed the position in the client's cookie: this library.
    """

    def __init__(
        self, primary: str, replicas: Mapping[str, str], connections: int, level: str
    ) -> None:
        self._router = AsyncRouter(
            primary=primary,
            replicas=replicas,
            consistency=getattr(Consistency, level),
            pool_options={"min_size": connections, "max_size": connections},
        )

    async def open(self) -> None:
        await self._router.open()

    async def close(self) -> None:
        await self._router.close()

    def read(self, request: Request) -> Block:
        return self._router.read()

    def write(self, request: Request) -> Block:
        return self._router.write()

    def wrap(self, app: Any) -> Any:
        return ConsistencyMiddleware(app, router=self._router, secret_key="the key of the workload")
