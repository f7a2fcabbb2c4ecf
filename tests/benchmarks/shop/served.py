"""
The shop for servers that import their application and start several processes of it.

``uvicorn tests.benchmarks.shop.served:asgi --factory`` serves the application of the workload;
``gunicorn tests.benchmarks.shop.served:wsgi`` a blocking one, which uses `Router` and passes the
token in the header by hand. The environment says how (`CONFIG`), and answers name their process.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from threading import Lock
from typing import Any, Final

from psycopg_pool import ConnectionPool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.benchmarks.shop.application import READ, WRITE, Config, make_app

CONFIG: Final = "SHOP_CONFIG"
PROCESS_HEADER: Final = "x-process"
TOKEN_HEADER: Final = "x-consistency-token"
ANY_REPLICA: Final = "random replica"

StartResponse = Callable[[str, list[tuple[str, str]]], Any]


def asgi() -> ASGIApp:
    """
    Return the ASGI application.
    """
    app = make_app(Config.of(os.environ[CONFIG]))
    process = (PROCESS_HEADER.encode(), str(os.getpid()).encode())

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], process]
            await send(message)

        await app(scope, receive, send_named)

    return named


class PlainShop:
    """
    The WSGI application with a pool for each server, which reads from any replica.

    Pools of psycopg_pool do not survive a fork, so each worker makes its own when it needs them.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._pools: dict[str, ConnectionPool] = {}
        self._lock = Lock()

    def __call__(self, environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        _, _, key, *number = environ["PATH_INFO"].split("/")
        sent = environ.get("HTTP_X_CONSISTENCY_TOKEN")
        text, headers = self.answer(sent, int(key), int(number[0]) if number else None)
        body = text.encode()
        headers |= {PROCESS_HEADER: str(os.getpid()), "content-length": str(len(body))}
        start("200 OK", list(headers.items()))
        return [body]

    def answer(self, token: str | None, key: int, number: int | None) -> tuple[str, dict[str, str]]:
        """
        Return the body and the headers of the answer to a request with a token.
        """
        return self.ask(key, number), {}

    def ask(self, key: int, number: int | None) -> str:
        """
        Add a number to a key, or return what is in it.
        """
        if number is not None:
            with self.write() as conn:
                conn.execute(WRITE, [key, number])
            return "added"
        with self.read() as conn:
            row = conn.execute(READ, [key, self.config.read_seconds]).fetchone()
        return f"{'replica' if row[0] else 'primary'} {row[1]}"

    def read(self) -> AbstractContextManager[Any]:
        """
        Return a block with a connection for a read.
        """
        return self._pool(random.choice(list(self.config.replicas))).connection()

    def write(self) -> AbstractContextManager[Any]:
        """
        Return a block with a connection for a write.
        """
        return self._pool("primary").connection()

    def _pool(self, name: str) -> ConnectionPool:
        with self._lock:
            if name not in self._pools:
                conninfo = {"primary": self.config.primary, **self.config.replicas}[name]
                size = self.config.connections
                self._pools[name] = ConnectionPool(
                    conninfo, min_size=size, max_size=size, open=True
                )
            return self._pools[name]


def __getattr__(name: str) -> Any:
    # Gunicorn looks the application up by its name, and uvicorn must not make it.
    if name == "wsgi":
        config = Config.of(os.environ[CONFIG])
        globals()["wsgi"] = PlainShop(config) if config.strategy == ANY_REPLICA else _routed(config)
        return globals()["wsgi"]
    raise AttributeError(name)


def _routed(config: Config) -> PlainShop:
    # Who does without the library shall not hold it.
    from tests.benchmarks.shop.blocking import RoutedShop

    return RoutedShop(config)
