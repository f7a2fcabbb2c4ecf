"""
Orders in Starlette: the client that placed one always sees it.

Run it against a primary and two streaming replicas::

    export PRIMARY="host=pg0 dbname=shop"
    export REPLICA_1="host=pg1 dbname=shop"
    export REPLICA_2="host=pg2 dbname=shop"
    uvicorn examples.starlette_app:app --port 8000

Then, with a cookie jar, as a browser has one::

    curl -c jar -b jar -d '{"item": "tea"}' http://127.0.0.1:8000/orders
    curl -c jar -b jar http://127.0.0.1:8000/orders

The answer of the second says which server it came from and why. Pause replay on both replicas
(``SELECT pg_wal_replay_pause()``), repeat, and the reason changes to ``not_caught_up``, and two
seconds later to ``lag_exceeded``.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lsn_consistency import AsyncRouter, ConsistencyMiddleware, FallbackLimitError, current_session

router = AsyncRouter(
    primary=os.environ["PRIMARY"],
    replicas={"replica_1": os.environ["REPLICA_1"], "replica_2": os.environ["REPLICA_2"]},
    max_fallback_reads=50,
)


async def place(request: Request) -> JSONResponse:
    item = (await request.json())["item"]
    async with router.write() as conn:
        await conn.execute("INSERT INTO starlette_orders (item) VALUES (%s)", [item])
    # The block has committed and the session holds the position: the response carries it.
    return JSONResponse({"item": item}, status_code=201)


async def show(request: Request) -> JSONResponse:
    async with router.read() as conn:
        cursor = await conn.execute("SELECT item FROM starlette_orders ORDER BY id")
        items = [item for (item,) in await cursor.fetchall()]
        cursor = await conn.execute("SELECT inet_server_port()")
        port = (await cursor.fetchone() or [None])[0]
    route = current_session().last_route
    return JSONResponse({"items": items, "port": port, "reason": route and route.reason})


async def nodes(request: Request) -> JSONResponse:
    shown = ("role", "healthy", "lag_seconds", "breaker")
    return JSONResponse(
        {name: {key: node[key] for key in shown} for name, node in router.snapshot().items()}
    )


async def busy(request: Request, error: Exception) -> JSONResponse:
    # The primary already serves as many fallback reads as it may.
    seconds = error.retry_after_seconds if isinstance(error, FallbackLimitError) else 1
    headers = {"Retry-After": f"{seconds:.0f}"}
    return JSONResponse({"error": "busy"}, status_code=503, headers=headers)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with router:
        async with router.write() as conn:
            await conn.execute(
                "CREATE TABLE IF NOT EXISTS starlette_orders"
                " (id bigint GENERATED ALWAYS AS IDENTITY, item text NOT NULL)"
            )
        yield


# Outermost, so that the response to an unhandled error still carries the token of what was
# committed before it.
app = ConsistencyMiddleware(
    Starlette(
        routes=[
            Route("/orders", place, methods=["POST"]),
            Route("/orders", show),
            Route("/nodes", nodes),
        ],
        exception_handlers={FallbackLimitError: busy},
        lifespan=lifespan,
    ),
    router=router,
    secret_key=os.environ.get("SECRET_KEY", "for-the-example-only"),
)
