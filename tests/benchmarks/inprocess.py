"""
Requests of an ASGI application in process: no server, no socket, no event loop.

The application must not wait for anything: a request is one step of its coroutine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import cycle
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message

Headers = list[tuple[bytes, bytes]]

BROWSER: Final[Headers] = [
    (b"host", b"shop.example"),
    (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
    (b"accept", b"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
    (b"accept-language", b"en-US,en;q=0.5"),
    (b"accept-encoding", b"gzip, deflate, br, zstd"),
    (b"referer", b"https://shop.example/items"),
    (b"connection", b"keep-alive"),
    (b"sec-fetch-mode", b"navigate"),
]
"""What any request brings, before cookies and tokens."""

_SCOPE: Final = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.4"},
    "http_version": "1.1",
    "method": "GET",
    "scheme": "https",
    "path": "/",
    "raw_path": b"/",
    "query_string": b"",
    "root_path": "",
    "client": ("127.0.0.1", 50000),
    "server": ("127.0.0.1", 8000),
}


def application(endpoint: Callable[[Request], Any]) -> ASGIApp:
    return Starlette(routes=[Route("/", endpoint)])


def with_cookie(name: bytes, value: bytes) -> Headers:
    return [*BROWSER, (b"cookie", b"theme=dark; %b=%b" % (name, value))]


def with_header(value: bytes) -> Headers:
    return [*BROWSER, (b"x-consistency-token", value)]


def requests(app: ASGIApp, requests: Iterable[Headers]) -> Callable[[], None]:
    """
    Return what sends one request after the other, in turn, and forgets the responses.
    """
    turns: Iterator[Headers] = cycle(requests)

    def request() -> None:
        # A server makes a new scope for each request, and the application writes into it.
        _finish(app({**_SCOPE, "headers": next(turns)}, _receive, _send))

    request()
    return request


def _finish(request: Awaitable[None]) -> None:
    try:
        next(request.__await__())
    except StopIteration:
        return
    raise AssertionError("the application waits for something")


async def _receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _send(message: Message) -> None:
    return None


def headers_of(app: ASGIApp, headers: Headers) -> Headers:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    _finish(app({**_SCOPE, "headers": headers}, _receive, send))
    assert sent[0]["status"] == 200
    found: Headers = sent[0]["headers"]
    return found
