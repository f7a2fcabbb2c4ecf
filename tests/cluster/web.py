"""
A small shop over a real router, its middleware, and clients that carry tokens as browsers do.

`open_web("async", pg)` serves the shop in this process: no socket, a loop in a thread of its own
that also runs the router's life. With ``real=True`` uvicorn serves it on the loopback address.
The blocking router has ``def`` endpoints, which Starlette runs in its thread pool, and the async
router has ``async def`` endpoints; the middleware is the same.

A response tells which server answered by the server's own ``inet_server_port()``.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from lsn_consistency import (
    AsyncRouter,
    ConsistencyMiddleware,
    Lsn,
    Router,
    Token,
    TokenCodec,
    current_session,
)
from lsn_consistency.events import Event
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.harness import CALL_SECONDS, Kind, running_loop, wait_until

SECRET = "a key that only these tests know, 32 bytes or more"
CODEC = TokenCodec(SECRET)
HEADER = "X-Consistency-Token"
PATIENT: Mapping[str, Any] = {"max_lag_seconds": 60.0, "pin_seconds": 60.0}
"""Options with which a paused replica serves reads without a token for as long as a test takes."""

INSERT = "INSERT INTO items (id) VALUES (%s) RETURNING pg_current_wal_insert_lsn()::text"
LOOK = "SELECT coalesce(array_agg(id ORDER BY id), '{}'), inet_server_port() FROM items"

Endpoint = Callable[[Request], Any]
_Result = TypeVar("_Result")
_Event = TypeVar("_Event")


@dataclass(frozen=True)
class Look:
    """
    Hold the rows that a GET saw, the port of the server that gave them, and the router's reason.
    """

    ids: list[int]
    port: int
    reason: str


class Store:
    """
    Use a router as the handlers of an application do.

    The coroutine methods run a blocking router's calls in the thread pool. ``written`` holds the
    primary's position at each row written, which is below the one of its commit.
    """

    def __init__(self, kind: Kind, router: Any) -> None:
        self.kind = kind
        self.router = router
        self.written: list[Lsn] = []

    def covers_all(self, token: Token | None) -> bool:
        """
        Tell whether a token reaches every row written so far.
        """
        lsns = [] if token is None else [each.lsn for each in token.positions.values()]
        return max(lsns, default=0) > max(self.written)

    def add_blocking(self, number: int) -> None:
        with self.router.write() as conn:
            self._note(conn.execute(INSERT, [number]).fetchone())

    def look_blocking(self) -> dict[str, Any]:
        with self.router.read() as conn:
            return _seen(conn.execute(LOOK).fetchone())

    async def add(self, number: int) -> None:
        if self.kind == "blocking":
            await run_in_threadpool(self.add_blocking, number)
            return
        async with self.router.write() as conn:
            self._note(await (await conn.execute(INSERT, [number])).fetchone())

    async def look(self) -> dict[str, Any]:
        if self.kind == "blocking":
            return await run_in_threadpool(self.look_blocking)
        async with self.router.read() as conn:
            return _seen(await (await conn.execute(LOOK)).fetchone())

    async def hold(self, entered: threading.Event, release: threading.Event) -> None:
        """
        Stay inside a read until told to leave it.
        """
        if self.kind == "blocking":
            await run_in_threadpool(self._hold_blocking, entered, release)
            return
        async with self.router.read():
            entered.set()
            await asyncio.to_thread(release.wait, CALL_SECONDS)

    def _hold_blocking(self, entered: threading.Event, release: threading.Event) -> None:
        with self.router.read():
            entered.set()
            release.wait(CALL_SECONDS)

    async def capture(self) -> None:
        if self.kind == "blocking":
            await run_in_threadpool(self.router.capture)
        else:
            await self.router.capture()

    def _note(self, row: Any) -> None:
        self.written.append(Lsn.parse(row[0]))


def _seen(row: Any) -> dict[str, Any]:
    route = current_session().last_route
    assert route is not None
    return {"ids": row[0], "port": row[1], "reason": str(route.reason)}


def routes(store: Store) -> list[BaseRoute]:
    """
    Return the shop's routes: write, read, do nothing, and answer without the database.
    """

    async def ping(request: Request) -> Response:
        return JSONResponse({})

    return [
        Route("/items/{number:int}", adder(store), methods=["POST"]),
        Route("/items", looker(store)),
        Route("/ping", ping, methods=["GET", "POST"]),
    ]


def adder(store: Store) -> Endpoint:
    """
    Return the endpoint that writes, of the router's kind.
    """

    def add_blocking(request: Request) -> Response:
        store.add_blocking(request.path_params["number"])
        return JSONResponse({})

    async def add(request: Request) -> Response:
        await store.add(request.path_params["number"])
        return JSONResponse({})

    return add_blocking if store.kind == "blocking" else add


def looker(store: Store) -> Endpoint:
    """
    Return the endpoint that reads, of the router's kind.
    """

    def look_blocking(request: Request) -> Response:
        return JSONResponse(store.look_blocking())

    async def look(request: Request) -> Response:
        return JSONResponse(await store.look())

    return look_blocking if store.kind == "blocking" else look


def shop(store: Store, *more: BaseRoute) -> Starlette:
    """
    Return the shop, with further routes.
    """
    return Starlette(routes=[*routes(store), *more], lifespan=store.router.lifespan)


class Browser:
    """
    Send requests with the tokens that came back: in cookies, in the header, or in both.
    """

    def __init__(self, web: Web, *, cookies: bool, header: bool) -> None:
        self._web = web
        self._header = header
        self.token: str | None = None
        jar = CookieJar(DefaultCookiePolicy(allowed_domains=None if cookies else []))
        self._http = httpx.AsyncClient(
            transport=web.transport,
            base_url=web.base_url,
            cookies=jar,
            timeout=CALL_SECONDS,
            trust_env=False,
        )

    @property
    def cookies(self) -> dict[str, str]:
        """
        Return the cookies that are kept.
        """
        return {cookie.name: cookie.value or "" for cookie in self._http.cookies.jar}

    def keep(self, response: httpx.Response) -> None:
        """
        Take over the cookies of a response to somebody else.
        """
        self._http.cookies.extract_cookies(response)

    async def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """
        Send a request, on the loop.
        """
        headers = dict(options.pop("headers", None) or {})
        if self._header and self.token is not None:
            headers.setdefault(HEADER, self.token)
        response = await self._http.request(method, path, headers=headers, **options)
        self.token = response.headers.get(HEADER, self.token)
        return response

    def start(self, method: str, path: str, **options: Any) -> Future[httpx.Response]:
        """
        Send a request and do not wait for its response.
        """
        return self._web.start(self.send(method, path, **options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.start("GET", path, **options).result(CALL_SECONDS)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.start("POST", path, **options).result(CALL_SECONDS)

    def add(self, number: int) -> httpx.Response:
        """
        Write a row; the response must be a success.
        """
        return self.post(f"/items/{number}").raise_for_status()

    def look(self, path: str = "/items", **options: Any) -> Look:
        """
        Read all rows; the response must be a success.
        """
        return looked(self.get(path, **options))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._web.call(self._http.aclose())


class Web:
    """
    Offer a served application to a test.
    """

    def __init__(
        self,
        store: Store,
        app: ASGIApp,
        loop: asyncio.AbstractEventLoop,
        events: list[Event],
        base_url: str | None = None,
    ) -> None:
        self.store = store
        self.router = store.router
        self.app = app
        self.loop = loop
        self.events = events
        self.base_url = base_url or "http://shop.test"
        self.transport: httpx.AsyncBaseTransport | None = None
        if base_url is None:
            self.transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)

    def browser(self, *, cookies: bool = True, header: bool = False) -> Browser:
        """
        Return a new client; close it by a ``with`` block where it keeps a connection.
        """
        return Browser(self, cookies=cookies, header=header)

    def start(self, coroutine: Coroutine[Any, Any, _Result]) -> Future[_Result]:
        """
        Start a coroutine on the loop.
        """
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        """
        Run a coroutine on the loop to its end.
        """
        return self.start(coroutine).result(CALL_SECONDS)

    def events_of(self, kind: type[_Event]) -> list[_Event]:
        """
        Return the events of one kind so far.
        """
        return [event for event in list(self.events) if isinstance(event, kind)]


MakeApp = Callable[[Store], Starlette]


@contextmanager
def open_web(
    kind: Kind,
    pg: EmbeddedCluster,
    make_app: MakeApp = shop,
    *,
    outermost: bool = True,
    real: bool = False,
    middleware: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[Web]:
    """
    Serve an application over a cluster, and see that no thread is left of it.

    ``middleware`` are options of the middleware, ``options`` those of the router. The middleware
    is wrapped around the application, or with ``outermost=False`` added to it.
    """
    events: list[Event] = []
    options.setdefault("poll_interval", 0.05)
    store = Store(kind, make_router(kind, pg, on_event=events.append, **options))
    starlette = make_app(store)
    app: ASGIApp = starlette
    given = {"router": store.router, "secret_key": SECRET, **(middleware or {})}
    if outermost:
        app = ConsistencyMiddleware(starlette, **given)
    else:
        starlette.add_middleware(ConsistencyMiddleware, **given)
    before = set(threading.enumerate())
    if real:
        with running_loop() as loop, _uvicorn(app) as base_url:
            yield _measured(Web(store, app, loop, events, base_url))
    else:
        with _running(starlette) as loop:
            yield _measured(Web(store, app, loop, events))
    wait_until(lambda: not _new_threads(before), describe=lambda: str(_new_threads(before)))


def _measured(web: Web) -> Web:
    # A replica that is paused before its lag was measured once has an unknown lag, and serves none.
    def is_measured() -> bool:
        nodes = web.router.snapshot().values()
        return all(node["role"] == "primary" or node["lag_seconds"] is not None for node in nodes)

    wait_until(is_measured, describe=lambda: str(web.router.snapshot()))
    return web


def _new_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    # The pool of another application that is still served may have grown meanwhile.
    new = set(threading.enumerate()) - before
    return [thread for thread in new if not thread.name.startswith("AnyIO")]


def make_router(kind: Kind, pg: EmbeddedCluster, **options: Any) -> Any:
    """
    Return a router of one kind over a cluster, not open yet.
    """
    nodes = {
        "primary": pg.primary.conninfo,
        "replicas": {name: node.conninfo for name, node in pg.replicas.items()},
    }
    given = {**nodes, **options}
    return Router(**given) if kind == "blocking" else AsyncRouter(**given)


def looked(response: httpx.Response) -> Look:
    """
    Return what a GET of the items gave.
    """
    return Look(**response.raise_for_status().json())


def sent_token(response: httpx.Response) -> Token | None:
    """
    Return the token of a response's header.
    """
    text = response.headers.get(HEADER)
    return None if text is None else CODEC.decode(text)


@contextmanager
def _running(app: Starlette) -> Iterator[asyncio.AbstractEventLoop]:
    # As a server does it: one coroutine that is run to its end, with the application's lifespan.
    started: Future[asyncio.AbstractEventLoop] = Future()
    ended = asyncio.Event()

    async def main() -> None:
        try:
            async with app.router.lifespan_context(app):
                started.set_result(asyncio.get_running_loop())
                await ended.wait()
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert [] == left

    outcome: Future[None] = Future()

    def run() -> None:
        try:
            outcome.set_result(asyncio.run(main()))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="application")
    thread.start()
    loop = started.result(CALL_SECONDS)
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(CALL_SECONDS)
    outcome.result(0)


@contextmanager
def _uvicorn(app: ASGIApp) -> Iterator[str]:
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="error", lifespan="on", ws="websockets-sansio"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(CALL_SECONDS)
    assert not thread.is_alive()
