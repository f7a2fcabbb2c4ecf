"""
The shop as an ASGI application, and the page's view behind the scenes.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import psycopg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from lsn_consistency.consistency import Consistency
from lsn_consistency.demo import MAX_APPLY_DELAY_SECONDS, shop
from lsn_consistency.demo.journal import Journal, first_line
from lsn_consistency.demo.stage import ACTIONS, ImpossibleError, Stage
from lsn_consistency.demo.twin import Twin
from lsn_consistency.exceptions import LsnConsistencyError
from lsn_consistency.middleware import ConsistencyMiddleware
from lsn_consistency.router_async import AsyncRouter
from lsn_consistency.session import current_session
from lsn_consistency.tokens import Token

PAGE: Final = Path(__file__).with_name("page")
CUSTOMER_COOKIE: Final = "shop_customer"
MAX_BODY_BYTES: Final = 1024
MAX_BURST: Final = 50
MAX_QUANTITY: Final = 9

LEVELS: Final[Mapping[str, Consistency]] = {
    "causal": Consistency.CAUSAL,
    "read_your_writes": Consistency.READ_YOUR_WRITES,
    "bounded": Consistency.bounded(2.0),
    "eventual": Consistency.EVENTUAL,
    "strong": Consistency.STRONG,
}

_CUSTOMER = re.compile(r"[0-9a-f]{8}")
_NOT_STORED = {"Cache-Control": "no-store"}
# The page needs nothing from anywhere else, so it is not allowed to.
_PAGE_HEADERS = {**_NOT_STORED, "Content-Security-Policy": "default-src 'self'"}

OnReady = Callable[[], None]


def make_app(stage: Stage, secret_key: str, on_ready: OnReady | None = None) -> ASGIApp:
    """
    Return the application; ``on_ready`` is called when it is about to serve.

    Raises `ConfigurationError` for a key that is empty.
    """
    journal = Journal()
    router = AsyncRouter(primary=stage.primary, replicas=stage.replicas, on_event=journal.on_event)
    api = Api(stage, router, Twin(stage.replicas), journal)
    app = Starlette(
        routes=[
            Route("/", page),
            Route("/api/orders", api.read),
            Route("/api/orders", api.order, methods=["POST"]),
            Route("/api/burst", api.burst, methods=["POST"]),
            Route("/api/restock", api.restock, methods=["POST"]),
            Route("/api/state", api.state),
            Route("/api/nodes/{name}/{action}", api.act, methods=["POST"]),
            Mount("/page", StaticFiles(directory=PAGE)),
        ],
        # A page of another site must not reach the controls through a host name of its own.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
        exception_handlers={
            psycopg.Error: _unavailable,
            LsnConsistencyError: _unavailable,
            HTTPException: _refused,
        },
        lifespan=api.lifespan(on_ready),
    )
    # Outermost, so that also an answer to an unhandled error carries the token of its commit.
    return ConsistencyMiddleware(app, router=router, secret_key=secret_key)


async def page(request: Request) -> Response:
    """
    Return the page, and give the browser a customer of its own.
    """
    response = FileResponse(PAGE / "index.html", headers=_PAGE_HEADERS)
    return _known(request, response)


class Api:
    """
    Answer the page's requests.
    """

    def __init__(self, stage: Stage, router: AsyncRouter, twin: Twin, journal: Journal) -> None:
        self._stage = stage
        self._router = router
        self._twin = twin
        self._journal = journal

    def lifespan(self, on_ready: OnReady | None) -> Callable[[Starlette], Any]:
        """
        Return the lifespan that opens the router and the twin.
        """

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            async with self._router, self._twin:
                if on_ready is not None:
                    on_ready()
                yield

        return lifespan

    async def read(self, request: Request) -> Response:
        """
        Return the customer's orders as the router and as the twin show them at this moment.
        """
        level = LEVELS.get(request.query_params.get("level", "causal"))
        if level is None:
            raise HTTPException(400, f"level is one of {', '.join(LEVELS)}")
        who = _customer(request)
        routed, twin = await asyncio.gather(
            self._answer(self._routed(who, level)), self._answer(self._twin.read(who))
        )
        route = current_session().last_route
        if "error" not in routed and route is not None:
            routed |= {
                "route": route.name,
                "reason": route.reason,
                "waited_ms": route.waited_seconds * 1000,
            }
        payload = {"level": str(level), "read": routed, "twin": twin, "token": _token()}
        return _reply(request, payload, 503 if "error" in routed else 200)

    async def _routed(self, customer: str, level: Consistency) -> shop.View:
        async with self._router.read(consistency=level) as conn:
            return await shop.read_view(conn, customer)

    async def _answer(self, reading: Awaitable[shop.View]) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            view = await reading
        except (psycopg.Error, LsnConsistencyError) as error:
            return {"error": first_line(error)}
        return {
            "node": self._stage.name_of(view.port),
            "port": view.port,
            "took_ms": (time.perf_counter() - started) * 1000,
            "total": view.total,
            "orders": view.orders,
            "products": view.products,
        }

    async def order(self, request: Request) -> Response:
        """
        Place one order, and return its number.
        """
        body = await _body(request)
        product = _whole(body, "product_id", 1, 2**31 - 1)
        quantity = _whole({"quantity": 1, **body}, "quantity", 1, MAX_QUANTITY)
        number = await self._place(_customer(request), product, quantity)
        self._journal.add("Order", f"order {number} placed")
        return _reply(request, {"ids": [number], "token": _token()}, 201)

    async def burst(self, request: Request) -> Response:
        """
        Place several orders, each in a transaction of its own, and return their numbers.
        """
        body = await _body(request)
        product = _whole(body, "product_id", 1, 2**31 - 1)
        count = _whole(body, "count", 1, MAX_BURST)
        customer = _customer(request)
        numbers = [await self._place(customer, product, 1) for _ in range(count)]
        self._journal.add("Order", f"orders {numbers[0]} to {numbers[-1]} placed")
        return _reply(request, {"ids": numbers, "token": _token()}, 201)

    async def _place(self, customer: str, product: int, quantity: int) -> int:
        try:
            async with self._router.write() as conn:
                return await shop.place_order(conn, customer, product, quantity)
        except shop.SoldOutError as error:
            raise HTTPException(409, str(error)) from None

    async def restock(self, request: Request) -> Response:
        """
        Fill the stock of every product.
        """
        await _body(request)
        async with self._router.write() as conn:
            await shop.restock(conn)
        self._journal.add("Order", "every product restocked")
        return _reply(request, {"token": _token()})

    async def state(self, request: Request) -> Response:
        """
        Return every node, the client's token, and the entries of the journal after ``after``.
        """
        after = request.query_params.get("after", "0")
        if not (after.isascii() and after.isdigit() and len(after) <= 15):
            raise HTTPException(400, "after is the number of an entry")
        snapshot = self._router.snapshot()
        nodes = [self._node(name, seen, snapshot) for name, seen in snapshot.items()]
        entries = self._journal.since(int(after))
        settings = self._router.settings
        limits = {
            "wait_seconds": settings.wait_seconds,
            "max_lag_seconds": settings.max_lag_seconds,
        }
        payload = {"nodes": nodes, "token": _token(), "entries": entries, "settings": limits}
        return _reply(request, payload)

    def _node(
        self, name: str, seen: Mapping[str, Any], snapshot: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        lsn, newest = seen["replay_lsn"], snapshot["primary"]["replay_lsn"]
        position = current_session().token.get(seen["system_id"] or 0)
        known = lsn is not None
        return {
            "name": name,
            **self._stage.describe(name),
            **{key: seen[key] for key in _SHOWN},
            "replay_lsn": str(lsn) if known else None,
            "behind_bytes": max(0, newest - lsn) if known and newest is not None else None,
            # How many bytes of the log this node still has to replay for this client.
            "missing_bytes": max(0, position.lsn - lsn) if known and position else None,
        }

    async def act(self, request: Request) -> Response:
        """
        Pause, resume, delay, stop or start a server.
        """
        body = await _body(request)
        name, action = request.path_params["name"], request.path_params["action"]
        if name not in self._router.snapshot() or action not in ACTIONS:
            raise HTTPException(404, "no such node or action")
        seconds = body.get("seconds", 0)
        if type(seconds) not in (int, float) or not 0 <= seconds <= MAX_APPLY_DELAY_SECONDS:
            raise HTTPException(400, f"seconds is from 0 to {MAX_APPLY_DELAY_SECONDS:g}")
        try:
            done = await self._stage.act(name, action, seconds)
        except ImpossibleError as error:
            raise HTTPException(409, str(error)) from None
        self._journal.add("Fault", done)
        return _reply(request, self._stage.describe(name))


_SHOWN = (
    "role",
    "healthy",
    "lag_seconds",
    "timeline",
    "breaker",
    "consecutive_failures",
    "last_error",
    "reads_in_flight",
)


def _token() -> dict[str, Any]:
    """Return the client's token, decoded; a system identifier is too great for JavaScript."""
    token: Token = current_session().token
    return {
        "positions": [
            {"system_id": str(each.system_id), "timeline": each.timeline, "lsn": str(each.lsn)}
            for each in token.positions.values()
        ],
        "pin_until": token.pin_until,
    }


def _customer(request: Request) -> str:
    if "customer" not in request.scope:
        text = request.cookies.get(CUSTOMER_COOKIE, "")
        request.scope["customer"] = text if _CUSTOMER.fullmatch(text) else secrets.token_hex(4)
    customer: str = request.scope["customer"]
    return customer


def _known(request: Request, response: Response) -> Response:
    """Give a new customer the cookie by which it is known from then on."""
    customer = _customer(request)
    if request.cookies.get(CUSTOMER_COOKIE) != customer:
        response.set_cookie(CUSTOMER_COOKIE, customer, httponly=True, samesite="lax")
    return response


def _reply(request: Request, payload: Mapping[str, Any], status: int = 200) -> Response:
    return _known(request, JSONResponse(payload, status, headers=_NOT_STORED))


async def _body(request: Request) -> dict[str, Any]:
    """Return the JSON object that a request holds; a page of another site cannot send this type."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "send application/json")
    text = b""
    async for chunk in request.stream():
        text += chunk
        if len(text) > MAX_BODY_BYTES:
            raise HTTPException(413, f"a request holds at most {MAX_BODY_BYTES} bytes")
    try:
        body = json.loads(text or b"{}")
    except ValueError:
        raise HTTPException(400, "the request is no JSON") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "the request is no JSON object")
    return body


def _whole(body: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = body.get(name)
    if type(value) is not int or not least <= value <= most:
        raise HTTPException(400, f"{name} is a whole number from {least} to {most}")
    return value


async def _unavailable(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": first_line(error)}, 503, headers=_NOT_STORED)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=_NOT_STORED)
