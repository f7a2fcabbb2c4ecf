"""
The shop as an ASGI application.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import psycopg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from lsn_consistency.demo import web
from lsn_consistency.demo.api import Api
from lsn_consistency.demo.journal import Journal
from lsn_consistency.demo.shop import SoldOutError
from lsn_consistency.demo.stage import ImpossibleError, Stage
from lsn_consistency.demo.twin import Twin
from lsn_consistency.exceptions import LsnConsistencyError
from lsn_consistency.middleware import ConsistencyMiddleware
from lsn_consistency.router_async import AsyncRouter

PAGE: Final = Path(__file__).with_name("page")

# The page needs nothing from anywhere else, so it is not allowed to.
_PAGE_HEADERS = {**web.NOT_STORED, "Content-Security-Policy": "default-src 'self'"}


def make_app(stage: Stage, secret_key: str, on_ready: Callable[[], None]) -> ASGIApp:
    """
    Return the application; ``on_ready`` is called when it begins to serve.

    Raises `ConfigurationError` for a key that is empty.
    """
    journal = Journal()
    router = AsyncRouter(primary=stage.primary, replicas=stage.replicas, on_event=journal.on_event)
    twin = Twin(stage.replicas)
    api = Api(stage, router, twin, journal)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with router, twin:
            on_ready()
            yield

    app = Starlette(
        routes=[
            Route("/", page),
            Mount("/page", StaticFiles(directory=PAGE)),
            Route("/api/orders", api.read),
            Route("/api/orders", api.order, methods=["POST"]),
            Route("/api/burst", api.burst, methods=["POST"]),
            Route("/api/restock", api.restock, methods=["POST"]),
            Route("/api/state", api.state),
            Route("/api/nodes/{name}/{action}", api.act, methods=["POST"]),
        ],
        # A page of another site must not reach the controls through a host name of its own.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
        exception_handlers={
            psycopg.Error: web.unavailable,
            LsnConsistencyError: web.unavailable,
            SoldOutError: web.conflict,
            ImpossibleError: web.conflict,
            HTTPException: web.refused,
        },
        lifespan=lifespan,
    )
    # Outermost, so that also an answer to an unhandled error carries the token of its commit. The
    # shop writes through the router only, so no method has to be taken for a write: the controls
    # would move a visitor's token, and stopping the primary would pin it.
    return ConsistencyMiddleware(app, router=router, secret_key=secret_key, write_methods=())


async def page(request: Request) -> Response:
    """
    Return the page, and give the browser a customer of its own.
    """
    response = FileResponse(PAGE / "index.html", headers=_PAGE_HEADERS)
    return web.with_customer(request, response)
