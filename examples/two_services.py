"""
Two services on one database: the token travels with the calls between them.

Run both against a primary and two streaming replicas, each in a terminal of its own::

    export PRIMARY="host=pg0 dbname=shop"
    export REPLICA_1="host=pg1 dbname=shop"
    export REPLICA_2="host=pg2 dbname=shop"
    export BILLING_URL="http://127.0.0.1:8001"
    uvicorn examples.two_services:billing --port 8001
    uvicorn examples.two_services:orders --port 8000

``POST /orders`` writes an order and calls billing, which has to find it, and which writes an
invoice. The answer goes back through orders to the client, whose token covers both: its next
``GET /invoices`` at billing, which it has never talked to, shows the invoice.

Both services have the same secret key. The token is put into the headers of calls to billing
only: what goes to third parties must not carry it.
"""

from __future__ import annotations

import os

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lsn_consistency import AsyncRouter, ConsistencyMiddleware, current_session, extract, inject

SECRET_KEY = os.environ.get("SECRET_KEY", "for-the-example-only")
BILLING_URL = os.environ.get("BILLING_URL", "http://127.0.0.1:8001")

# One router for the one service that this process runs.
router = AsyncRouter(
    primary=os.environ["PRIMARY"],
    replicas={"replica_1": os.environ["REPLICA_1"], "replica_2": os.environ["REPLICA_2"]},
)


async def place_order(request: Request) -> JSONResponse:
    async with router.write() as conn:
        await conn.execute("CREATE TABLE IF NOT EXISTS service_orders (item text)")
        item = (await request.json())["item"]
        await conn.execute("INSERT INTO service_orders VALUES (%s)", [item])
    headers: dict[str, str] = {}
    inject(headers)
    async with httpx.AsyncClient(base_url=BILLING_URL) as client:
        response = await client.post("/invoices", json={"item": item}, headers=headers)
    response.raise_for_status()
    extract(response.headers)
    return JSONResponse(response.json(), status_code=201)


async def write_invoice(request: Request) -> JSONResponse:
    item = (await request.json())["item"]
    async with router.read() as conn:
        cursor = await conn.execute("SELECT count(*) FROM service_orders WHERE item = %s", [item])
        found = (await cursor.fetchone() or [0])[0]
    read = current_session().last_route
    async with router.write() as conn:
        await conn.execute("CREATE TABLE IF NOT EXISTS service_invoices (item text)")
        await conn.execute("INSERT INTO service_invoices VALUES (%s)", [item])
    return JSONResponse({"orders_found": found, "role": read and read.role}, status_code=201)


async def show_invoices(request: Request) -> JSONResponse:
    async with router.read() as conn:
        cursor = await conn.execute("SELECT item FROM service_invoices")
        items = [item for (item,) in await cursor.fetchall()]
    route = current_session().last_route
    return JSONResponse({"items": items, "role": route and route.role})


orders = ConsistencyMiddleware(
    Starlette(routes=[Route("/orders", place_order, methods=["POST"])], lifespan=router.lifespan),
    router=router,
    secret_key=SECRET_KEY,
)
billing = ConsistencyMiddleware(
    Starlette(
        routes=[
            Route("/invoices", write_invoice, methods=["POST"]),
            Route("/invoices", show_invoices),
        ],
        lifespan=router.lifespan,
    ),
    router=router,
    secret_key=SECRET_KEY,
)
