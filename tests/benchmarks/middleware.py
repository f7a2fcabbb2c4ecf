"""
What a request costs in the middleware, in process: no server, no socket, no event loop.

Every way serves the same Starlette application with one route, and what the middleware costs is
what its way takes longer than the bare application in the same round. The requests have the headers
of a browser. Nothing suspends, so a request is one step of its coroutine.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any, Final

from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from lsn_consistency import ConsistencyMiddleware, Token, TokenCodec
from lsn_consistency._settings import Settings
from lsn_consistency.events import Event
from lsn_consistency.session import current_session
from tests.benchmarks import inprocess, offline
from tests.benchmarks.findings import Bench
from tests.benchmarks.measuring import Comparison, compare, quartiles

SECRET: Final = "a key that only the benchmarks know, 32 bytes or more"
BARE: Final = "bare application"
COOKIE: Final = b"consistency_token-0123456789ab"


class NoDatabase:
    """
    Be a router as far as the middleware looks at one; no SQL is part of these numbers.
    """

    settings = Settings.of({})

    async def capture(self) -> None:
        raise AssertionError("no way here writes with an engine of its own")

    def emit(self, event: Event) -> None:
        raise AssertionError(f"unexpected {event!r}")


def run(bench: Bench) -> None:
    """
    Measure the middleware.
    """
    made = {**_bare(), **_ours(), **_sessions(), **_correlation()}
    rows = []
    for name, labels in _GROUPS.items():
        compared = _compare(bench, name, {label: made[label] for label in (BARE, *labels)})
        _judge(bench, compared)
        for label in labels:
            low, middle, high = _microseconds(compared.extras(label, BARE))
            rows.append([name, label, f"{middle:.1f}", f"{low:.1f} to {high:.1f}"])
    bench.table(
        "What a middleware adds to a request, us",
        ["request", "way", "added", "quartiles"],
        rows,
        note="Over the bare application, CPU time of one thread. SessionMiddleware verifies a "
        "cookie whenever one comes in, whether the application looks at the session or not. Its "
        "cookie here is the smallest: one number. No peer is stubbed.",
    )


def _compare(bench: Bench, name: str, ways: dict[str, Callable[[], None]]) -> Comparison:
    # Short turns: what is subtracted must have been measured at the same speed of the machine.
    rounds = bench.rounds(101, 25)
    return bench.add(compare(name, ways, rounds=rounds, seconds=0.01, clock=time.thread_time))


def _judge(bench: Bench, compared: Comparison) -> None:
    if compared.name == _WITHOUT:
        added = [seconds * 1e6 for seconds in compared.extras("no token", BARE)]
        title = "added to a request without a token"
        bench.find("middleware.none", title, added, "us", at_most=5.0)
    for group, key, subject, reference, bar in _BARS:
        if group == compared.name:
            bench.find(
                f"middleware.{key}",
                f"{subject}, over {reference}",
                compared.ratios(subject, reference, minus=BARE),
                at_most=bar,
                floor=_MORE if group == _SET else "",
            )


def _microseconds(seconds: list[float]) -> tuple[float, float, float]:
    low, high = quartiles(seconds)
    return low * 1e6, statistics.median(seconds) * 1e6, high * 1e6


_NO_COOKIE: Final = "SessionMiddleware: no cookie"
_SIGNED: Final = "SessionMiddleware: no cookie, session written"
_VERIFIED: Final = "SessionMiddleware: cookie verified"
_READ: Final = "SessionMiddleware: cookie verified, session read"
_WRITTEN: Final = "SessionMiddleware: cookie verified, session written"
_GENERATED: Final = "asgi-correlation-id: id generated"
_RECEIVED: Final = "asgi-correlation-id: id received"

_WITHOUT: Final = "without a token"
_SEEN: Final = "token seen before"
_FIRST: Final = "first sight of a token"
_SET: Final = "response that sets one"

_GROUPS: Final = {
    _WITHOUT: ("no token", _NO_COOKIE, _GENERATED, _RECEIVED),
    _SEEN: ("seen, cookie", "seen, header", "seen, cookie, read", _VERIFIED, _READ),
    _FIRST: ("first sight, cookie", "first sight, header", _VERIFIED),
    _SET: (
        "no token, one set",
        "seen, cookie, one set",
        "first sight, cookie, one set",
        _SIGNED,
        _WRITTEN,
    ),
}
"""The ways that take turns, each group beside the bare application."""

_BARS: Final = (
    (_WITHOUT, "none_over_session", "no token", _NO_COOKIE, 1.0),
    (_SEEN, "seen_cookie", "seen, cookie", _VERIFIED, 0.35),
    (_SEEN, "seen_header", "seen, header", _VERIFIED, 0.35),
    (_SEEN, "seen_read", "seen, cookie, read", _READ, None),
    (_FIRST, "first_cookie", "first sight, cookie", _VERIFIED, 1.0),
    (_FIRST, "first_header", "first sight, header", _VERIFIED, 1.0),
    (_SET, "set", "first sight, cookie, one set", _WRITTEN, 1.0),
    (_SET, "set_seen", "seen, cookie, one set", _WRITTEN, 1.0),
    (_SET, "set_only", "no token, one set", _SIGNED, None),
)

_MORE: Final = (
    "The same is verified and signed once. What is sent is more: a header beside the cookie, and "
    "a second cookie that deletes the one that came in."
)


# The ways


def _bare() -> dict[str, Callable[[], None]]:
    return {BARE: inprocess.requests(inprocess.application(_plain), [inprocess.BROWSER])}


def _ours() -> dict[str, Callable[[], None]]:
    codec = TokenCodec(SECRET)
    text = codec.encode(offline.token_at(offline.LAST_LSN)).encode()
    cookie, header = inprocess.with_cookie(COOKIE, text), inprocess.with_header(text)
    # More than any cache of verified texts keeps, so that each comes back as a stranger.
    texts = [codec.encode(token).encode() for token in _tokens(2 * _cache_size())]
    cookies = [inprocess.with_cookie(COOKIE, each) for each in texts]
    headers = [inprocess.with_header(each) for each in texts]
    ways = {
        "no token": (_plain, [inprocess.BROWSER]),
        "seen, cookie": (_plain, [cookie]),
        "seen, header": (_plain, [header]),
        "seen, cookie, read": (_reading, [cookie]),
        "first sight, cookie": (_plain, cookies),
        "first sight, header": (_plain, headers),
        "no token, one set": (_advancing(), [inprocess.BROWSER]),
        "seen, cookie, one set": (_advancing(), [cookie]),
        "first sight, cookie, one set": (_advancing(), cookies),
    }
    made: dict[str, Callable[[], None]] = {}
    for label, (endpoint, requests) in ways.items():
        app = ConsistencyMiddleware(
            inprocess.application(endpoint), router=NoDatabase(), secret_key=SECRET
        )
        _check_ours(app, requests[0], is_set="one set" in label, is_read="read" in label)
        made[label] = inprocess.requests(app, requests)
    return made


def _sessions() -> dict[str, Callable[[], None]]:
    def wrap(endpoint: Callable[[Request], Any]) -> ASGIApp:
        return SessionMiddleware(inprocess.application(endpoint), secret_key=SECRET)

    written = wrap(_session_written)
    sent = next(
        value
        for name, value in inprocess.headers_of(written, inprocess.BROWSER)
        if name == b"set-cookie"
    )
    name, _, value = sent.partition(b";")[0].partition(b"=")
    cookie = inprocess.with_cookie(name, value)
    read = wrap(_session_read)
    # A cookie that did not verify would leave the session empty, and the endpoint raise.
    assert b"vary" in dict(inprocess.headers_of(read, cookie))
    return {
        _NO_COOKIE: inprocess.requests(wrap(_plain), [inprocess.BROWSER]),
        _SIGNED: inprocess.requests(written, [inprocess.BROWSER]),
        _VERIFIED: inprocess.requests(wrap(_plain), [cookie]),
        _READ: inprocess.requests(read, [cookie]),
        _WRITTEN: inprocess.requests(written, [cookie]),
    }


def _correlation() -> dict[str, Callable[[], None]]:
    from asgi_correlation_id import CorrelationIdMiddleware

    app = CorrelationIdMiddleware(inprocess.application(_plain))
    received = [*inprocess.BROWSER, (b"x-request-id", b"0f8fad5bd9cb469fa16570867728950e")]
    return {
        _GENERATED: inprocess.requests(app, [inprocess.BROWSER]),
        _RECEIVED: inprocess.requests(app, [received]),
    }


async def _plain(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


async def _reading(request: Request) -> PlainTextResponse:
    # As a read of the router does.
    current_session().accessed = True
    return PlainTextResponse("ok")


def _advancing() -> Callable[[Request], Any]:
    tokens = cycle(_tokens(2 * _cache_size(), further=1_000_000))

    async def advancing(request: Request) -> PlainTextResponse:
        # As a write of the router does, with a position that nobody has seen yet.
        session = current_session()
        session.wrote = True
        session.advance(next(tokens))
        return PlainTextResponse("ok")

    return advancing


async def _session_read(request: Request) -> PlainTextResponse:
    assert request.session["user"] == 7
    return PlainTextResponse("ok")


async def _session_written(request: Request) -> PlainTextResponse:
    request.session["user"] = 7
    return PlainTextResponse("ok")


def _tokens(number: int, further: int = 0) -> list[Token]:
    return [offline.token_at(offline.LAST_LSN + further + 8 * each) for each in range(number)]


def _cache_size() -> int:
    size = inspect.signature(TokenCodec).parameters["cache_size"].default
    assert isinstance(size, int)
    return size


def _check_ours(app: ASGIApp, headers: inprocess.Headers, *, is_set: bool, is_read: bool) -> None:
    """Hold that the way does what its label says; a token that is refused raises in `emit`."""
    found = dict(inprocess.headers_of(app, headers))
    assert is_set is (b"set-cookie" in found) is (b"x-consistency-token" in found)
    assert (is_read or is_set) is (b"vary" in found)
