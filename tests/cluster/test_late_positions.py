"""
Where in a request a position is reached: in time for the response, in whatever thread or task, or
too late for it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Literal

import anyio.from_thread
import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lsn_consistency import Reason, Token
from lsn_consistency.events import TokenNotSent
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.harness import CALL_SECONDS, Kind
from tests.cluster.web import (
    PATIENT,
    Look,
    MakeApp,
    Store,
    Web,
    looker,
    open_web,
    sent_token,
    shop,
)

When = Literal["before", "after"]


def streaming(store: Store, when: When) -> Starlette:
    """Write before the first chunk is made, or between two chunks."""

    async def chunks(late: bool) -> AsyncIterator[str]:
        yield "first"
        if late:
            await store.add(1)
        yield "second"

    async def stream(request: Request) -> Response:
        if when == "before":
            await store.add(1)
        return StreamingResponse(chunks(when == "after"))

    return shop(store, Route("/write", stream, methods=["GET", "POST"]))


def background(store: Store, when: When) -> Starlette:
    """Write in the handler, or in the response's background task."""

    async def handler(request: Request) -> Response:
        if when == "before":
            await store.add(1)
            return JSONResponse({})
        task = store.add_blocking if store.kind == "blocking" else store.add
        return JSONResponse({}, background=BackgroundTask(task, 1))

    return shop(store, Route("/write", handler, methods=["GET", "POST"]))


def dependency(store: Store, when: When) -> FastAPI:
    """Write after the yield of a dependency that ends before, or as by default after the start."""

    async def late() -> AsyncIterator[None]:
        yield
        await store.add(1)

    def late_blocking() -> Iterator[None]:
        yield
        store.add_blocking(1)

    given: Callable[[], Any] = late_blocking if store.kind == "blocking" else late
    app = FastAPI(lifespan=store.router.lifespan)

    async def handler() -> dict[str, str]:
        return {}

    needs = [Depends(given, scope="function") if when == "before" else Depends(given)]
    app.api_route("/write", methods=["GET", "POST"], dependencies=needs)(handler)
    app.add_route("/items", looker(store))
    return app


PLACES = pytest.mark.parametrize("make", [streaming, background, dependency])
MakeAt = Callable[[Store, When], Starlette]


def write(web: Web, method: str) -> tuple[int, Token | None, list[Token]]:
    """Return the status, the token that was sent, and those that an event says were not."""
    web.events.clear()
    response = web.browser().start(method, "/write").result(CALL_SECONDS)
    not_sent = [event.token for event in web.events_of(TokenNotSent)]
    return response.status_code, sent_token(response), not_sent


@PLACES
def test_a_position_after_the_start_is_reported(
    kind: Kind, pg: EmbeddedCluster, table: str, make: MakeAt
) -> None:
    """The token of a write after the response has started was not sent, and that is an event."""
    with open_web(kind, pg, lambda store: make(store, "after")) as web:
        status, sent, not_sent = write(web, "GET")
        assert (200, None, 1) == (status, sent, len(not_sent))
        assert web.store.covers_all(not_sent[0])
        pg.primary.execute("TRUNCATE items")
        # A POST's own position is taken at the start, and does not reach the late write.
        status, sent, not_sent = write(web, "POST")
        assert (200, False, 1) == (status, sent is None, len(not_sent))
        assert (False, True) == (web.store.covers_all(sent), web.store.covers_all(not_sent[0]))


@PLACES
def test_a_position_before_the_start_is_sent(
    kind: Kind, pg: EmbeddedCluster, table: str, make: MakeAt
) -> None:
    """The same write before the response has started is sent, and is no event."""
    with open_web(kind, pg, lambda store: make(store, "before")) as web:
        for method in ("GET", "POST"):
            status, sent, not_sent = write(web, method)
            assert (200, True, []) == (status, web.store.covers_all(sent), not_sent)
            pg.primary.execute("TRUNCATE items")


def test_a_read_of_a_stream_is_reported(kind: Kind, pg: EmbeddedCluster, table: str) -> None:
    """At CAUSAL a read after the start is reported too: the client is shown what it saw."""

    def make_app(store: Store) -> Starlette:
        async def chunks() -> AsyncIterator[str]:
            yield "first"
            yield json.dumps(await store.look())

        async def stream(request: Request) -> Response:
            return StreamingResponse(chunks())

        return shop(store, Route("/stream", stream))

    with open_web(kind, pg, make_app) as web:
        response = web.browser().get("/stream")
        reported = web.events_of(TokenNotSent)
    assert (None, 1) == (sent_token(response), len(reported))


# Threads, and code below other middleware


class Timing(BaseHTTPMiddleware):
    """Run the application in a task of its own, as every BaseHTTPMiddleware does."""

    async def dispatch(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await call_next(request)
        response.headers["X-Timing"] = "1"
        return response


def add_in_a_thread(store: Store) -> None:
    """Write in a thread of the pool; an async router's write goes back to the loop from there."""
    if store.kind == "blocking":
        store.add_blocking(1)
    else:
        anyio.from_thread.run(store.add, 1)


def starlette_app(store: Store) -> Starlette:
    def handler(request: Request) -> Response:
        add_in_a_thread(store)
        return JSONResponse({})

    return shop(store, Route("/write", handler, methods=["GET"]))


def fastapi_app(store: Store) -> Starlette:
    app = FastAPI(lifespan=store.router.lifespan)

    def handler() -> dict[str, str]:
        add_in_a_thread(store)
        return {}

    app.get("/write")(handler)
    app.add_route("/items", looker(store))
    return app


@pytest.mark.parametrize("below", ["thread pool", "BaseHTTPMiddleware"])
@pytest.mark.parametrize("make_app", [starlette_app, fastapi_app])
def test_a_write_in_a_thread_or_below_another_middleware(
    kind: Kind, pg: EmbeddedCluster, table: str, make_app: MakeApp, below: str
) -> None:
    """Its token is sent from a sync endpoint in the thread pool, and below BaseHTTPMiddleware."""

    def make(store: Store) -> Starlette:
        app = make_app(store)
        if below == "BaseHTTPMiddleware":
            app.add_middleware(Timing)
        return app

    with open_web(kind, pg, make, **PATIENT) as web:
        client = web.browser()
        for replica in pg.replicas.values():
            replica.pause_replay()
        response = client.get("/write")
        look = client.look()
        sent = web.store.covers_all(sent_token(response))
    assert (200, below != "thread pool") == (response.status_code, "X-Timing" in response.headers)
    assert (True, Look([1], pg.primary.port, Reason.NOT_CAUGHT_UP)) == (sent, look)
    assert [] == web.events_of(TokenNotSent)
