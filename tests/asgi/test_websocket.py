"""Websockets: the token of the handshake, and the positions that follow it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import WebSocketRoute
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from lsn_consistency.events import TokenNotSent
from lsn_consistency.exceptions import FallbackLimitError
from lsn_consistency.session import current_session
from lsn_consistency.tokens import Token
from tests.asgi.fake_router import (
    HEADER,
    Exchange,
    FakeRouter,
    cookie_header,
    lsn_of,
    position_text,
    signed,
    token_at,
    wrap,
)

CONNECT: Message = {"type": "websocket.connect"}
HELLO: Message = {"type": "websocket.receive", "text": "hello"}
DENIAL = {"websocket.http.response": dict[str, Any]()}


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


def handshake(
    app: Any,
    *,
    headers: list[tuple[bytes, bytes]] | None = None,
    incoming: tuple[Message, ...] = (CONNECT, HELLO),
    **scope_items: Any,
) -> list[Message]:
    """Connect, send one message, and return what the application sent."""
    scope = {"scheme": "ws", "query_string": b"", "extensions": DENIAL, **scope_items}
    call = Exchange(app)("websocket", headers=headers or [], incoming=incoming, **scope)
    return asyncio.run(call)


def values(message: Message, name: bytes) -> list[str]:
    return [value.decode() for key, value in message["headers"] if key == name]


@pytest.mark.parametrize("carrier", ["header", "cookie"])
def test_the_token_of_the_handshake_is_read(router: FakeRouter, carrier: str) -> None:
    """A websocket's session starts with the token of its handshake."""

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(position_text(router.read()))

    brought = {HEADER: signed(1500)} if carrier == "header" else cookie_header(signed(1500))
    headers = [(name.lower().encode(), value.encode()) for name, value in brought.items()]
    app = wrap(Starlette(routes=[WebSocketRoute("/", endpoint)]), router)
    accept, text = handshake(app, headers=headers)
    assert (accept["type"], text["text"]) == ("websocket.accept", "1500")
    assert values(accept, b"x-consistency-token") == []


@pytest.mark.parametrize(("scheme", "secure"), [("ws", False), ("wss", True)])
def test_a_position_reached_before_the_accept_goes_with_it(
    router: FakeRouter, scheme: str, secure: bool
) -> None:
    """The accept carries the advanced token in both carriers, and keeps its own headers."""

    async def endpoint(websocket: WebSocket) -> None:
        router.write()
        await websocket.accept(subprotocol="chat", headers=[(b"x-other", b"1")])

    app = wrap(Starlette(routes=[WebSocketRoute("/", endpoint)]), router)
    (accept,) = handshake(app, scheme=scheme)
    (text,) = values(accept, b"x-consistency-token")
    (cookie,) = values(accept, b"set-cookie")
    assert lsn_of(text) == router.lsn
    assert f"={text}; " in cookie
    assert cookie.endswith("; Secure") == secure
    assert (accept["subprotocol"], values(accept, b"x-other")) == ("chat", ["1"])
    assert values(accept, b"vary") == []


def test_later_positions_are_in_the_session_and_not_reported(router: FakeRouter) -> None:
    """After the accept the application sends positions itself, so they are not called lost."""
    seen: list[Token] = []

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()
        router.write()
        seen.append(current_session().token)

    app = wrap(Starlette(routes=[WebSocketRoute("/", endpoint)]), router)
    (accept,) = handshake(app)
    assert accept["type"] == "websocket.accept"
    assert seen == [token_at(1001)]
    assert router.events == []


def test_a_denial_response_carries_the_token(router: FakeRouter) -> None:
    """A handshake that is answered with an HTTP response gets the token there."""

    async def endpoint(websocket: WebSocket) -> None:
        router.write()
        await websocket.send_denial_response(PlainTextResponse("no", status_code=403))

    app = wrap(Starlette(routes=[WebSocketRoute("/", endpoint)]), router)
    start, _ = handshake(app)
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 403)
    assert [lsn_of(text) for text in values(start, b"x-consistency-token")] == [router.lsn]
    assert values(start, b"vary") == [f"Cookie, {HEADER}"]


def test_a_write_before_a_plain_refusal_is_reported(router: FakeRouter) -> None:
    """A close before the accept has no headers, so the position is lost to the client."""

    async def endpoint(websocket: WebSocket) -> None:
        router.write()
        await websocket.close()

    app = wrap(Starlette(routes=[WebSocketRoute("/", endpoint)]), router)
    assert [message["type"] for message in handshake(app)] == ["websocket.close"]
    assert router.not_sent == [TokenNotSent(token_at(1001))]


def test_an_accept_without_headers_is_completed(router: FakeRouter) -> None:
    """ASGI lets the headers of an accept be left out."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        router.write()
        await send({"type": "websocket.accept"})

    (accept,) = handshake(wrap(app, router))
    assert [lsn_of(text) for text in values(accept, b"x-consistency-token")] == [router.lsn]


def test_a_websocket_is_never_captured(router: FakeRouter) -> None:
    """A handshake is no write method."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})

    handshake(wrap(app, router, write_methods={"GET", "POST"}))
    assert router.captures == 0


def test_the_fallback_limit_propagates(router: FakeRouter) -> None:
    """A websocket has no status line for a 503; the server sees the error."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise FallbackLimitError(4, 1.0)

    with pytest.raises(FallbackLimitError):
        handshake(wrap(app, router))
