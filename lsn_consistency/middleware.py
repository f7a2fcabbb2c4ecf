"""
The ASGI middleware: tokens from headers and cookies into a session, and from the session back.

Each request and each websocket gets a session of its own, opened before the application is called
and therefore shared by everything that runs on the request's behalf: threads, child tasks, code
below another middleware. When the response starts, the client gets the session's token if it has
advanced. The middleware knows no node and no database; all that it asks of the router is in
`RouterLike`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lsn_consistency._cookies import SameSite, TokenCookies, check_name
from lsn_consistency._http import Found, Headers, listed, refusal, varying
from lsn_consistency.events import Event, TokenNotSent, TokenRejected
from lsn_consistency.exceptions import (
    ConfigurationError,
    FallbackLimitError,
    MalformedTokenError,
    TokenError,
)
from lsn_consistency.session import DEFAULT_HEADER_NAME, Session
from lsn_consistency.tokens import Token, TokenCodec

if TYPE_CHECKING:
    from lsn_consistency.tokens import SecretKey

MAX_TOKENS = 32
"""How many tokens of one request are looked at; each costs one signature."""

COMPACT_AT = 4
"""A request with this many tokens is answered with their merge, advanced or not."""

_DEFAULT_WRITE_METHODS = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_SCOPES = frozenset({"http", "websocket"})
_STARTS = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})
_EMPTY = Token()

_Finder: TypeAlias = Callable[[bytes, int], Sequence[Found]]


class SettingsLike(Protocol):
    """
    Describe what the middleware needs of a router's settings.
    """

    @property
    def max_lag_seconds(self) -> float:
        """
        Return the lag at which a replica stops serving.
        """

    @property
    def pin_seconds(self) -> float:
        """
        Return how long a session of unknown position reads from the primary.
        """


@runtime_checkable
class RouterLike(Protocol):
    """
    Describe what the middleware needs of a router; `Router` and `AsyncRouter` have it.
    """

    @property
    def settings(self) -> SettingsLike:
        """
        Return the router's validated options.
        """

    def capture(self) -> Awaitable[None] | None:
        """
        Advance the current session past everything that has committed.

        A coroutine function, or a function that blocks: that one is called in a thread.
        """

    def emit(self, event: Event) -> None:
        """
        Hand an event to whoever listens; does not raise.
        """


class ConsistencyMiddleware:
    """
    Give every request a session from its tokens, and send the session's token if it advanced.

    Tokens are read from and written to the header ``header_name`` and cookies named after
    ``cookie_name``; one of the two may be None. ``secret_key``, one key or a list of keys, and
    ``max_age`` in seconds are those of `TokenCodec`. The cookies are HttpOnly, and Secure as
    ``https_only`` says: None follows the scheme of the request.

    After a request with one of ``write_methods`` whose application did not use the router for
    writing, the primary's position is taken before the response starts, so that applications
    with an engine of their own need no change.

    A token that does not verify is reported as the event `TokenRejected`. The request goes on as
    if it had brought none (``on_bad_token="ignore"``), or reads from the primary (``"primary"``).

    Wrap it outermost, ``ConsistencyMiddleware(app, ...)``: then also the response to an unhandled
    exception carries the token of what was committed before. Added inside, it answers
    `FallbackLimitError` with status 503 and Retry-After.

    Raises `ConfigurationError` for options that cannot work.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        router: RouterLike,
        secret_key: SecretKey | Sequence[SecretKey],
        cookie_name: str | None = "consistency_token",
        header_name: str | None = DEFAULT_HEADER_NAME,
        max_age: float = 3600,
        same_site: SameSite = "lax",
        https_only: bool | None = None,
        path: str = "/",
        domain: str | None = None,
        write_methods: Iterable[str] = _DEFAULT_WRITE_METHODS,
        on_bad_token: Literal["ignore", "primary"] = "ignore",
    ) -> None:
        self.app = app
        self._router = _checked_router(router)
        self._capture = _awaitable_capture(router)
        self._codec = _codec(secret_key, max_age, router.settings.max_lag_seconds)
        if cookie_name is None and header_name is None:
            raise ConfigurationError(
                "cookie_name and header_name are both None: a token needs one of them to travel in"
            )
        self._cookies: TokenCookies | None = None
        if cookie_name is not None:
            self._cookies = TokenCookies(
                cookie_name,
                max_age=max_age,
                path=path,
                domain=domain,
                same_site=same_site,
                https_only=https_only,
            )
        self._header: bytes | None = None
        if header_name is not None:
            self._header = check_name("header_name", header_name).lower().encode("ascii")
        self._header_name = header_name or DEFAULT_HEADER_NAME
        carriers = (cookie_name and "Cookie", header_name)
        self._vary = [carrier for carrier in carriers if carrier]
        self._finders = _finders(self._header, self._cookies)
        self._write_methods = _methods(write_methods)
        if on_bad_token not in ("ignore", "primary"):
            raise ConfigurationError(
                f'on_bad_token takes "ignore" or "primary", not {on_bad_token!r}'
            )
        self._pins_bad = on_bad_token == "primary"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Serve one connection; scopes other than http and websocket pass through.
        """
        if scope["type"] not in _SCOPES:
            await self.app(scope, receive, send)
            return
        session = self._open(scope)

        def send_with_token(message: Message) -> Awaitable[None]:
            # Not a coroutine function: what goes on to the server costs one call.
            if session.started or message["type"] not in _STARTS:
                return send(message)
            session.started = True
            if scope["type"] == "http":
                if not session.wrote and scope["method"] in self._write_methods:
                    return self._capture_and_send(message, scope, session, send)
                # Set before the token is read: a thread that advances the session meanwhile may be
                # reported although its position is sent, but never the other way round.
                session.on_advance = self._not_sent
            return send(self._with_token(message, scope, session))

        try:
            with session:
                await self.app(scope, receive, send_with_token)
        except FallbackLimitError as error:
            if session.started or scope["type"] != "http":
                raise
            for message in refusal(error):
                await send_with_token(message)
        finally:
            if not session.started and session.outgoing is not session.incoming:
                self._not_sent(session.outgoing)

    def _open(self, scope: Scope) -> _RequestSession:
        """
        Return the session of a request, with every token that verifies merged into it.
        """
        session = _RequestSession(self._codec, self._header_name)
        found: list[Found] = []
        finders = self._finders
        for name, value in scope["headers"]:
            if name in finders and len(found) <= MAX_TOKENS:
                found += finders[name](value, MAX_TOKENS + 1)
        if found:
            self._admit(session, found)
        return session

    def _admit(self, session: _RequestSession, found: list[Found]) -> None:
        pinned = len(found) > MAX_TOKENS
        if pinned:
            # A valid token may be among those not looked at. For as long as the pin lasts the
            # primary serves; after it, no replica lags far enough to miss what was written before.
            self._reject(
                MalformedTokenError(f"more than {MAX_TOKENS} tokens"), found[MAX_TOKENS][0]
            )
            del found[MAX_TOKENS:]
        token = _EMPTY
        for cookie_name, text in found:
            try:
                if text:
                    decoded = self._codec.decode(text)
                    token = decoded if token is _EMPTY else token.merge(decoded)
            except TokenError as error:
                self._reject(error, cookie_name)
                pinned = pinned or self._pins_bad
        session.admit(token, found)
        if pinned:
            session.pin_unsent(time.time() + self._router.settings.pin_seconds)

    def _reject(self, error: TokenError, cookie_name: str | None) -> None:
        self._router.emit(TokenRejected(error, "header" if cookie_name is None else "cookie"))

    async def _capture_and_send(
        self, message: Message, scope: Scope, session: _RequestSession, send: Send
    ) -> None:
        # The server may be called from a task whose context is not the application's.
        with session:
            await self._capture()
        session.on_advance = self._not_sent
        await send(self._with_token(message, scope, session))

    def _with_token(self, message: Message, scope: Scope, session: _RequestSession) -> Message:
        """
        Return the message that starts the response, with the session's token if it has to be sent.
        """
        token = session.outgoing
        carried = token is not session.incoming or session.crowded
        if not (carried or session.accessed):
            return message
        # The list may belong to a response object that the application uses again for another
        # client, so it is left as it is.
        headers: Headers = list(message.get("headers", ()))
        if carried:
            text = self._codec.encode(token) if token else None
            headers = self._carrying(headers, text, scope, session)
        if message["type"] != "websocket.accept":
            headers = varying(headers, self._vary)
        return {**message, "headers": headers}

    def _carrying(
        self, headers: Headers, text: str | None, scope: Scope, session: _RequestSession
    ) -> Headers:
        """
        Put ``text`` into the carriers that are on; None only deletes the cookies that came in.
        """
        if text is not None and self._header is not None:
            headers = [line for line in headers if line[0].lower() != self._header]
            headers.append((self._header, text.encode("ascii")))
        if self._cookies is not None:
            https = scope.get("scheme") in ("https", "wss")
            replaced = [name for name, _ in session.found if name is not None]
            headers.extend(self._cookies.headers(text, replaced, https=https))
        return headers

    def _not_sent(self, token: Token) -> None:
        self._router.emit(TokenNotSent(token))


class _RequestSession(Session):
    """
    Know beside the session's token which of it came in, and which of it must not go out.
    """

    __slots__ = ("_unpinned", "crowded", "found", "incoming", "started")

    def __init__(self, codec: TokenCodec, header_name: str) -> None:
        Session.__init__(self, codec=codec, header_name=header_name)
        self._unpinned: Token | None = None
        self.incoming = self._token
        self.found: Sequence[Found] = ()
        self.crowded = False
        self.started = False

    @property
    def outgoing(self) -> Token:
        """
        Return what the client may be told.
        """
        return self._token if self._unpinned is None else self._unpinned

    def admit(self, token: Token, found: Sequence[Found]) -> None:
        """
        Start from the token that the client brought, in the texts ``found``.
        """
        self._token = self.incoming = token
        self.found = found
        self.crowded = len(found) >= COMPACT_AT

    def pin_unsent(self, until: float) -> None:
        """
        Send this request's reads to the primary without a signed trace of it.

        Whoever sends a forged token must not get a genuine one for it.
        """
        self._unpinned = self._token
        self._token = self._token.merge(Token(pin_until=until))

    def _change(self, changed: Callable[[Token], Token]) -> None:
        if self._unpinned is None:
            Session._change(self, changed)
            return
        with self._lock:
            before = self._unpinned
            token = self._unpinned = changed(before)
            self._token = changed(self._token)
        if token is not before and self.on_advance is not None:
            self.on_advance(token)


def _checked_router(router: RouterLike) -> RouterLike:
    if not isinstance(router, RouterLike):
        raise ConfigurationError(f"router takes a Router or an AsyncRouter, not {router!r}")
    return router


def _awaitable_capture(router: RouterLike) -> Callable[[], Awaitable[None]]:
    capture: Callable[[], Any] = router.capture
    if inspect.iscoroutinefunction(capture):
        return capture
    # The thread gets a copy of the context, whose session is the same object.
    return partial(run_in_threadpool, capture)


def _finders(header: bytes | None, cookies: TokenCookies | None) -> dict[bytes, _Finder]:
    """
    Return for each request header that can hold tokens what finds them in its value.
    """
    finders: dict[bytes, _Finder] = {}
    if header is not None:
        finders[header] = listed
    if cookies is not None:
        finders[b"cookie"] = cookies.find
    return finders


def _codec(
    secret_key: SecretKey | Sequence[SecretKey], max_age: float, max_lag_seconds: float
) -> TokenCodec:
    codec = TokenCodec(secret_key, max_age=max_age)
    if max_age < max_lag_seconds:
        raise ConfigurationError(
            f"max_age ({max_age:g}) is below max_lag_seconds ({max_lag_seconds:g}): a token would "
            "expire while a replica may still miss its write; raise max_age"
        )
    return codec


def _methods(methods: Iterable[str]) -> frozenset[str]:
    held = [] if isinstance(methods, str) else list(methods)
    if isinstance(methods, str) or not all(isinstance(method, str) for method in held):
        raise ConfigurationError(
            f'write_methods takes HTTP methods such as {{"POST", "PUT"}}, not {methods!r}'
        )
    return frozenset(method.upper() for method in held)
