"""
A router without a database, and the harness of the ASGI tests.

Its "primary" is a counter: each commit moves it on, and `capture` and `read` put it into the
current session as the real routers do. What the tests ask about is HTTP only.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Scope, Send

from lsn_consistency._settings import Settings
from lsn_consistency.events import Event, TokenNotSent, TokenRejected
from lsn_consistency.lsn import Position
from lsn_consistency.middleware import ConsistencyMiddleware
from lsn_consistency.session import current_session
from lsn_consistency.tokens import Token, TokenCodec

SECRET = "a key that only these tests know, 32 bytes or more"
SYSTEM = 7_412_345_678_901_234_567
HEADER = "X-Consistency-Token"

_E = TypeVar("_E")


def token_at(lsn: int, *, system: int = SYSTEM, pin_until: float | None = None) -> Token:
    return Token([Position.of(system, 1, lsn)], pin_until)


def signed(lsn: int, *, system: int = SYSTEM, key: str = SECRET) -> str:
    return TokenCodec(key).encode(token_at(lsn, system=system))


def lsn_of(text: str, *, system: int = SYSTEM) -> int:
    position = TokenCodec(SECRET).decode(text).get(system)
    assert position is not None
    return int(position.lsn)


class FakeRouter:
    """Stand in for an `AsyncRouter`: a coroutine `capture`, events kept in a list."""

    def __init__(self, *, lsn: int = 1000, **options: Any) -> None:
        self.settings = Settings.of(options)
        self.events: list[Event] = []
        self.captures = 0
        self.lsn = lsn

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def events_of(self, kind: type[_E]) -> list[_E]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def rejected(self) -> list[TokenRejected]:
        return self.events_of(TokenRejected)

    @property
    def not_sent(self) -> list[TokenNotSent]:
        return self.events_of(TokenNotSent)

    def commit(self) -> int:
        """Commit with an engine of the application's own, which no session learns of."""
        self.lsn += 1
        return self.lsn

    def write(self) -> int:
        """Commit as `router.write()` does: the session advances."""
        lsn = self.commit()
        session = current_session()
        session.wrote = True
        session.advance(token_at(lsn))
        return lsn

    def read(self, *, causal: bool = False) -> Token:
        """Read as `router.read()` does; at CAUSAL the session advances."""
        session = current_session()
        session.accessed = True
        required = session.token
        if causal:
            session.advance(token_at(self.lsn))
        return required

    async def capture(self) -> None:
        await asyncio.sleep(0)
        self.captures += 1
        current_session().advance(token_at(self.lsn))


class BlockingFakeRouter:
    """Stand in for a `Router`: `capture` blocks, and remembers its thread."""

    def __init__(self) -> None:
        self.settings = Settings.of({})
        self.threads: list[int] = []
        self.lsn = 1000

    def emit(self, event: Event) -> None:
        raise AssertionError(f"unexpected {event!r}")

    def capture(self) -> None:
        self.threads.append(threading.get_ident())
        current_session().advance(token_at(self.lsn))


def wrap(app: ASGIApp, router: Any, **options: Any) -> ConsistencyMiddleware:
    return ConsistencyMiddleware(app, router=router, **{"secret_key": SECRET, **options})


def client(app: ASGIApp, *, base_url: str = "http://shop.test") -> httpx.AsyncClient:
    """Return a client that keeps cookies as a browser does."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=base_url)


async def request(
    app: ASGIApp,
    method: str = "GET",
    path: str = "/",
    *,
    headers: dict[str, str] | None = None,
    base_url: str = "http://shop.test",
) -> httpx.Response:
    """Send one request with no cookies but those in ``headers``."""
    async with client(app, base_url=base_url) as http:
        return await http.request(method, path, headers=headers)


def fetch(app: ASGIApp, method: str = "GET", path: str = "/", **options: Any) -> httpx.Response:
    return asyncio.run(request(app, method, path, **options))


def cookie_header(*texts: str) -> dict[str, str]:
    """Return a Cookie header with one token cookie for each text, among others."""
    named = [f"consistency_token-{number:08}={text}" for number, text in enumerate(texts)]
    return {"cookie": "; ".join(["theme=dark", *named, "session=abc"])}


def stored(response: httpx.Response) -> list[str]:
    """Return the Set-Cookie lines that store a token."""
    lines = response.headers.get_list("set-cookie")
    return [line for line in lines if "; Max-Age=0;" not in line]


def deleted(response: httpx.Response) -> list[str]:
    """Return the names of the cookies that a response deletes."""
    lines = response.headers.get_list("set-cookie")
    return [line.partition("=")[0] for line in lines if "; Max-Age=0;" in line]


def stored_text(response: httpx.Response) -> str:
    """Return the token text of the one cookie that a response stores."""
    (line,) = stored(response)
    return line.partition("=")[2].partition(";")[0]


@dataclass
class Exchange:
    """Call an ASGI application without a client in between, and keep all that it sends."""

    app: ASGIApp
    sent: list[Message] = field(default_factory=list)

    async def __call__(
        self,
        kind: str = "http",
        *,
        headers: Sequence[tuple[bytes, bytes]] = (),
        incoming: Sequence[Message] = (),
        **scope_items: Any,
    ) -> list[Message]:
        waiting = list(incoming)

        async def receive() -> Message:
            return waiting.pop(0) if waiting else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self.sent.append(message)

        scope: Scope = {"type": kind, "path": "/", "headers": list(headers), **scope_items}
        if kind == "http":
            scope.setdefault("method", "GET")
        await self.app(scope, receive, send)
        return self.sent


def shop(router: FakeRouter) -> Starlette:
    """Return an application that writes at POST and reads at GET."""

    async def order(request: Request) -> Response:
        return PlainTextResponse(str(router.write()))

    async def orders(request: Request) -> Response:
        return PlainTextResponse(
            position_text(router.read(causal="causal" in request.query_params))
        )

    async def about(request: Request) -> Response:
        return PlainTextResponse("a shop")

    return Starlette(
        routes=[
            Route("/order", order, methods=["POST"]),
            Route("/orders", orders),
            Route("/about", about),
        ]
    )


def position_text(token: Token, *, system: int = SYSTEM) -> str:
    """Return the position that a read had to reach, as text; "0" for none."""
    position = token.get(system)
    return "0" if position is None else str(int(position.lsn))


async def plain(send: Send, status: int = 200) -> None:
    """Send a small response."""
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})
