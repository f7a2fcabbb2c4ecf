"""
The shop: a request reads a key's numbers or adds one, and a strategy says which server is asked.

    python -m tests.benchmarks.shop.application CONFIG

is a process of its own that serves on a socket which it is given open.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from tests.benchmarks.shop.strategies import Strategy, make_strategy

SCHEMA: Final = """
    CREATE TABLE entries (key int NOT NULL, number int NOT NULL, PRIMARY KEY (key, number));
    CREATE EXTENSION pg_stat_statements
"""

# A statement that takes a fixed time and no CPU stands for one that is bound by I/O: with a pool
# of fixed size it gives each server a capacity of its own, although all share one machine. What is
# read is as of the statement's start.
READ: Final = (
    "SELECT pg_is_in_recovery(), array_to_string(array("
    "SELECT number FROM entries WHERE key = %s), ','), pg_sleep(%s)"
)
WRITE: Final = "INSERT INTO entries (key, number) VALUES (%s, %s)"


@dataclass(frozen=True, slots=True)
class Config:
    """
    Say how a shop is served: ``listener`` is the number of an open socket, if there is one.
    """

    strategy: str
    primary: str
    replicas: dict[str, str]
    connections: int
    read_seconds: float
    listener: int = -1

    def to_text(self) -> str:
        """
        Return what the process is given on its command line.
        """
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Config:
        """
        Return what `to_text` was made of.
        """
        return cls(**json.loads(text))


def make_app(config: Config) -> Any:
    """
    Return the application.
    """
    strategy = make_strategy(
        config.strategy, config.primary, config.replicas, connections=config.connections
    )

    async def show(request: Request) -> Response:
        async with strategy.read(request) as conn:
            cursor = await conn.execute(
                READ, [int(request.path_params["key"]), config.read_seconds]
            )
            row = await cursor.fetchone()
        return PlainTextResponse(f"{'replica' if row[0] else 'primary'} {row[1]}")

    async def add(request: Request) -> Response:
        path = request.path_params
        async with strategy.write(request) as conn:
            await conn.execute(WRITE, [int(path["key"]), int(path["number"])])
        response = PlainTextResponse("added")
        strategy.wrote(response)
        return response

    app = Starlette(
        routes=[
            Route("/keys/{key}", show),
            Route("/keys/{key}/{number}", add, methods=["POST"]),
        ],
        lifespan=_lifespan(strategy),
    )
    return strategy.wrap(app)


def _lifespan(strategy: Strategy) -> Any:
    @asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        await strategy.open()
        try:
            yield
        finally:
            await strategy.close()

    return lifespan


def main() -> None:
    # That replicas with a delay are not known to be well at first is no news.
    logging.getLogger("lsn_consistency").setLevel(logging.ERROR)
    config = Config.of(sys.argv[1])
    listener = socket.socket(fileno=config.listener)
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(config),
            lifespan="on",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=2,
        )
    )
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
