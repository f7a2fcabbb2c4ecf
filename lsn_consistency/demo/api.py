"""
The answers to the page's requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from typing import Any, Final

import psycopg
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lsn_consistency.consistency import Consistency
from lsn_consistency.demo import MAX_APPLY_DELAY_SECONDS, shop
from lsn_consistency.demo.journal import Journal, first_line
from lsn_consistency.demo.stage import ACTIONS, Stage
from lsn_consistency.demo.twin import Twin
from lsn_consistency.demo.web import body_of, customer_of, reply, whole
from lsn_consistency.exceptions import LsnConsistencyError
from lsn_consistency.router_async import AsyncRouter
from lsn_consistency.session import current_session

MAX_BURST: Final = 50
MAX_QUANTITY: Final = 9
MAX_PRODUCT: Final = 2**31 - 1
MAX_ENTRY_DIGITS: Final = 15

LEVELS: Final[Mapping[str, Consistency]] = {
    "causal": Consistency.CAUSAL,
    "read_your_writes": Consistency.READ_YOUR_WRITES,
    "bounded": Consistency.bounded(2.0),
    "eventual": Consistency.EVENTUAL,
    "strong": Consistency.STRONG,
}


class Api:
    """
    Answer the page's requests.
    """

    def __init__(self, stage: Stage, router: AsyncRouter, twin: Twin, journal: Journal) -> None:
        self._stage = stage
        self._router = router
        self._twin = twin
        self._journal = journal

    async def read(self, request: Request) -> Response:
        """
        Return the customer's orders as the router and as the twin show them at this moment.
        """
        level = LEVELS.get(request.query_params.get("level", "causal"))
        if level is None:
            raise HTTPException(400, f"level is one of {', '.join(LEVELS)}")
        who = customer_of(request)
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
        return reply(request, payload, 503 if "error" in routed else 200)

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
        body = await body_of(request)
        product = whole(body, "product_id", 1, MAX_PRODUCT)
        quantity = whole({"quantity": 1, **body}, "quantity", 1, MAX_QUANTITY)
        number = await self._place(customer_of(request), product, quantity)
        self._journal.add("Order", f"order {number} placed")
        return reply(request, {"ids": [number], "token": _token()}, 201)

    async def burst(self, request: Request) -> Response:
        """
        Place several orders, each in a transaction of its own, and return their numbers.
        """
        body = await body_of(request)
        product = whole(body, "product_id", 1, MAX_PRODUCT)
        count = whole(body, "count", 1, MAX_BURST)
        customer = customer_of(request)
        numbers: list[int] = []
        for _ in range(count):
            try:
                numbers.append(await self._place(customer, product, 1))
            except shop.SoldOutError:
                if not numbers:
                    raise
                break
        self._journal.add("Order", f"{len(numbers)} orders placed, {numbers[-1]} the last")
        return reply(request, {"ids": numbers, "token": _token()}, 201)

    async def _place(self, customer: str, product: int, quantity: int) -> int:
        async with self._router.write() as conn:
            return await shop.place_order(conn, customer, product, quantity)

    async def restock(self, request: Request) -> Response:
        """
        Fill the stock of every product.
        """
        await body_of(request)
        async with self._router.write() as conn:
            await shop.restock(conn)
        self._journal.add("Order", "every product restocked")
        return reply(request, {"token": _token()})

    async def state(self, request: Request) -> Response:
        """
        Return every node, the client's token, and the entries of the journal after ``after``.
        """
        after = request.query_params.get("after", "0")
        if not (after.isascii() and after.isdigit() and len(after) <= MAX_ENTRY_DIGITS):
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
        return reply(request, payload)

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
        body = await body_of(request)
        name, action = request.path_params["name"], request.path_params["action"]
        if name not in self._router.snapshot() or action not in ACTIONS:
            raise HTTPException(404, "no such node or action")
        seconds = body.get("seconds", 0)
        if type(seconds) not in (int, float) or not 0 <= seconds <= MAX_APPLY_DELAY_SECONDS:
            raise HTTPException(400, f"seconds is from 0 to {MAX_APPLY_DELAY_SECONDS:g}")
        done = await self._stage.act(name, action, seconds)
        self._journal.add("Fault", done)
        return reply(request, self._stage.describe(name))


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
    token = current_session().token
    return {
        "positions": [
            {"system_id": str(each.system_id), "timeline": each.timeline, "lsn": str(each.lsn)}
            for each in token.positions.values()
        ],
        "pin_until": token.pin_until,
    }
