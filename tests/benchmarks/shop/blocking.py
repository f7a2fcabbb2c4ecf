"""
The blocking shop with this library: `Router`, and the token in the header by hand.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lsn_consistency import Router, Session, TokenCodec, extract, inject
from tests.benchmarks.shop.application import Config
from tests.benchmarks.shop.served import TOKEN_HEADER, PlainShop


class RoutedShop(PlainShop):
    """
    The WSGI application with a router, which is opened when the application is imported.

    Where that is before the workers are forked, as with ``--preload``, the first request of each
    worker opens the router anew, by itself.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._codec = TokenCodec("the key of the workload")
        sizes = {"min_size": config.connections, "max_size": config.connections}
        self._router = Router(primary=config.primary, replicas=config.replicas, pool_options=sizes)
        self._router.open()

    def answer(self, token: str | None, key: int, number: int | None) -> tuple[str, dict[str, str]]:
        headers: dict[str, str] = {}
        with Session(codec=self._codec):
            extract({TOKEN_HEADER: token})
            text = self.ask(key, number)
            inject(headers, header_name=TOKEN_HEADER)
        return text, headers

    def read(self) -> AbstractContextManager[Any]:
        return self._router.read()

    def write(self) -> AbstractContextManager[Any]:
        return self._router.write()
