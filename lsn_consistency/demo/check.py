"""
The scenario of ``demo --check``: clients over HTTP that know what they wrote.

A read is stale if it lacks an order that this very client had been told was placed. Half of the
clients keep their token as a browser does, in cookies, the others pass it on in the header.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, Final, Literal, NamedTuple

import httpx

from lsn_consistency.demo import shop
from lsn_consistency.demo.stage import LATE_REPLICA
from lsn_consistency.demo.tally import Sample, Tally
from lsn_consistency.demo.web import CUSTOMER_COOKIE
from lsn_consistency.session import DEFAULT_HEADER_NAME

CLIENTS: Final = 8
PHASES: Final = 5
READS_PER_ORDER: Final = 2
READS_PER_ROUND: Final = CLIENTS * PHASES * READS_PER_ORDER
REQUEST_SECONDS: Final = 30.0
SCENARIO_SECONDS: Final = 300.0
LEAST_DELAY_SECONDS: Final = 0.1

Carrier = Literal["cookie", "header"]
OnRead = Callable[[str, int], None]


class ShopError(Exception):
    """
    Say what the shop answered instead of what the scenario needs.
    """


class Step(NamedTuple):
    """
    Name a phase and the actions on servers that set its stage, each with its seconds.
    """

    title: str
    actions: tuple[tuple[str, float], ...]


def steps_of(apply_delay: float) -> tuple[Step, ...]:
    """
    Return the phases of the scenario, in their order.

    A delay that is too short to be seen is lengthened: the scenario has to prove something.
    """
    delay = max(apply_delay, LEAST_DELAY_SECONDS)
    late, other = LATE_REPLICA, "replica_1"
    return (
        Step(f"{late} {delay:g} s late", ((f"{late}/delay", delay),)),
        Step(f"and {other} paused", ((f"{other}/pause", 0),)),
        Step(f"only {other} paused", ((f"{late}/delay", 0),)),
        Step("both paused", ((f"{late}/pause", 0),)),
        Step("both resumed", ((f"{late}/resume", 0), (f"{other}/resume", 0))),
    )


class Client:
    """
    Place orders and read them back as one customer with a session of its own.

    ``tabs`` orders are placed at the same time, as by a browser with that many tabs.
    """

    def __init__(self, http: httpx.AsyncClient, number: int, carrier: Carrier, tabs: int) -> None:
        self._http = http
        self._customer = f"{number:08x}"
        self._carrier = carrier
        self._tabs = tabs
        self._header: dict[str, str] = {}
        self._placed: list[int] = []
        self._product = number % 6 + 1

    async def order(self) -> None:
        """
        Place orders, and remember them once the shop has confirmed all of them.
        """
        body = {"product_id": self._product, "quantity": 1}
        answers = await asyncio.gather(
            *(self._request("POST", "/api/orders", json=body) for _ in range(self._tabs))
        )
        confirmed = [number for answer in answers for number in answer["ids"]]
        # The shop shows the newest orders only, so older ones need not be remembered.
        self._placed = sorted([*self._placed, *confirmed])[-shop.SHOWN_ORDERS :]

    async def read(self) -> Sample:
        """
        Read the orders through the router and through the twin.
        """
        answer = await self._request("GET", "/api/orders")
        routed, twin = answer["read"], answer["twin"]
        return Sample(
            node=routed["node"],
            route=routed["route"],
            waited_ms=routed["waited_ms"],
            stale=self._lacks(routed),
            twin_stale=None if "error" in twin else self._lacks(twin),
        )

    def _lacks(self, view: dict[str, Any]) -> bool:
        return not {order["id"] for order in view["orders"]}.issuperset(self._placed)

    async def _request(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        if self._carrier == "header":
            self._http.cookies.clear()
        self._http.cookies.set(CUSTOMER_COOKIE, self._customer)
        answer = await self._http.request(method, path, headers=self._header, **options)
        if self._carrier == "header" and DEFAULT_HEADER_NAME in answer.headers:
            self._header = {DEFAULT_HEADER_NAME: answer.headers[DEFAULT_HEADER_NAME]}
        return _checked(answer)


async def play(url: str, reads: int, apply_delay: float, on_read: OnRead) -> list[Tally]:
    """
    Play the whole scenario against a running shop, about ``reads`` reads, and count.

    Raises `ShopError` or `httpx.HTTPError`, alone or in a group, and `TimeoutError`.
    """
    steps = steps_of(apply_delay)
    rounds = number_of_reads(reads) // READS_PER_ROUND
    async with asyncio.timeout(SCENARIO_SECONDS), AsyncExitStack() as stack:
        https = [await stack.enter_async_context(_http(url)) for _ in range(CLIENTS + 1)]
        clients = [_client(http, number) for number, http in enumerate(https[1:])]
        tallies = []
        for step in steps:
            on_read(step.title, 0)
            for path, seconds in step.actions:
                _checked(await https[0].post(f"/api/nodes/{path}", json={"seconds": seconds}))
            tallies.append(await _phase(step.title, clients, rounds, on_read))
    return tallies


def number_of_reads(wanted: int) -> int:
    """
    Return how many reads are made: as near to ``wanted`` as whole rounds of all clients come.
    """
    return max(1, round(wanted / READS_PER_ROUND)) * READS_PER_ROUND


async def _phase(title: str, clients: list[Client], rounds: int, on_read: OnRead) -> Tally:
    tally = Tally(title)

    async def act(client: Client) -> None:
        for _ in range(rounds):
            await client.order()
            # The second read finds a token that reading, not writing, has advanced.
            for _ in range(READS_PER_ORDER):
                tally.add(await client.read())
                on_read(title, 1)

    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(act(client))
    return tally


def _http(url: str) -> httpx.AsyncClient:
    # Proxies of the environment are not for the loopback address.
    return httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS, trust_env=False)


def _client(http: httpx.AsyncClient, number: int) -> Client:
    carrier: Carrier = "header" if number % 2 else "cookie"
    return Client(http, number, carrier, tabs=2 if number % 4 == 0 else 1)


def _checked(answer: httpx.Response) -> dict[str, Any]:
    if answer.is_error:
        request = answer.request
        raise ShopError(f"{request.method} {request.url.path}: {answer.status_code} {answer.text}")
    payload: dict[str, Any] = answer.json()
    return payload
