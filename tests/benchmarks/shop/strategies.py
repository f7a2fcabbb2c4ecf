"""
The ways to say which server answers a read; each gives a connection, and all have pools alike.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from psycopg_pool import AsyncConnectionPool
from starlette.requests import Request
from starlette.responses import Response

from tests.benchmarks.shop.trace import PINNING_COOKIE

PRIMARY: Final = "primary"

Block = AbstractAsyncContextManager[Any]


class Strategy:
    """
    Read from the primary, and be what the others differ from.
    """

    def __init__(self, primary: str, replicas: Mapping[str, str], connections: int) -> None:
        self.replicas = list(replicas)
        self.pools = {
            name: AsyncConnectionPool(
                conninfo, min_size=connections, max_size=connections, open=False
            )
            for name, conninfo in {PRIMARY: primary, **replicas}.items()
        }

    async def open(self) -> None:
        """
        Open everything; the pools are full then.
        """
        for pool in self.pools.values():
            await pool.open(wait=True)

    async def close(self) -> None:
        for pool in self.pools.values():
            await pool.close()

    def read(self, request: Request) -> Block:
        """
        Return a block with a connection for a read.
        """
        return self.pools[self.choose(request)].connection()

    def write(self, request: Request) -> Block:
        """
        Return a block with a connection for a write.
        """
        return self.pools[PRIMARY].connection()

    def choose(self, request: Request) -> str:
        """
        Name the server for a read.
        """
        return PRIMARY

    def wrote(self, response: Response) -> None:
        """
        Leave on a response what the client has to remember of its write.
        """

    def wrap(self, app: Any) -> Any:
        """
        Put the application into its middleware.
        """
        return app


class RandomReplica(Strategy):
    """
    Read from any replica.
    """

    def choose(self, request: Request) -> str:
        return random.choice(self.replicas)


class Sticky(Strategy):
    """
    Read from the primary for some seconds after a write: the rule of django-multidb-router.

    As its `PinningRouterMiddleware` and `PinningReplicaRouter` do it: a cookie that expires, and
    replicas in turn.
    """

    def __init__(
        self, primary: str, replicas: Mapping[str, str], connections: int, seconds: int
    ) -> None:
        super().__init__(primary, replicas, connections)
        self._seconds = seconds
        self._turns = itertools.cycle(random.sample(self.replicas, len(self.replicas)))

    def choose(self, request: Request) -> str:
        return PRIMARY if PINNING_COOKIE in request.cookies else next(self._turns)

    def wrote(self, response: Response) -> None:
        response.set_cookie(PINNING_COOKIE, "y", max_age=self._seconds)


Maker = Callable[[str, Mapping[str, str], int], Strategy]


def make_strategy(
    name: str, primary: str, replicas: Mapping[str, str], *, connections: int
) -> Strategy:
    """
    Return a strategy by its name, one of `STRATEGIES`.
    """
    return _MAKERS[name](primary, replicas, connections)


def _sticky(seconds: int) -> Maker:
    return lambda primary, replicas, connections: Sticky(primary, replicas, connections, seconds)


# What is behind the others is imported by who uses it: what a process holds shall be its own.


def _lag_only(primary: str, replicas: Mapping[str, str], connections: int) -> Strategy:
    from tests.benchmarks.shop.lag_only import LagOnly

    return LagOnly(primary, replicas, connections)


def _ours(level: str) -> Maker:
    def make(primary: str, replicas: Mapping[str, str], connections: int) -> Strategy:
        from tests.benchmarks.shop.ours import Ours

        return Ours(primary, replicas, connections, level)

    return make


def _oracle(primary: str, replicas: Mapping[str, str], connections: int) -> Strategy:
    from tests.benchmarks.shop.oracle import Oracle

    return Oracle(primary, replicas, connections)


_MAKERS: Final[Mapping[str, Maker]] = {
    "always primary": Strategy,
    "random replica": RandomReplica,
    "lag only": _lag_only,
    "sticky 5 s": _sticky(5),
    "sticky 15 s": _sticky(15),
    "READ_YOUR_WRITES": _ours("READ_YOUR_WRITES"),
    "CAUSAL": _ours("CAUSAL"),
    "oracle": _oracle,
}
STRATEGIES: Final = tuple(_MAKERS)
PINS: Final[Mapping[str, float]] = {"sticky 5 s": 5.0, "sticky 15 s": 15.0}
"""The windows of the strategies that have one, in seconds."""
