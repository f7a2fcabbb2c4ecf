"""Applications that write with an engine of their own, of which the router knows nothing."""

from __future__ import annotations

import asyncio
import time

import psycopg
import pytest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lsn_consistency import Consistency, Reason, consistency
from lsn_consistency.events import PositionUnknown
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.harness import CALL_SECONDS, Kind, wait_until
from tests.cluster.web import (
    HEADER,
    PATIENT,
    Browser,
    Look,
    MakeApp,
    Store,
    Web,
    looked,
    open_web,
    sent_token,
    shop,
)

CLIENTS = 10
ROUNDS = 10
DOWN = (Reason.WITHIN_LAG, Reason.PRIMARY_DOWN)


def own_engine(pg: EmbeddedCluster, synchronous_commit: str = "on") -> MakeApp:
    """
    Return a shop that writes through connections of its own, at POST and, badly, at GET.
    """
    conninfo = pg.primary.conninfo_for(options=f"-c synchronous_commit={synchronous_commit}")
    insert = "INSERT INTO items (id) VALUES (%s)"

    def add_blocking(number: int) -> None:
        with psycopg.connect(conninfo) as conn:
            conn.execute(insert, [number])

    async def add(store: Store, request: Request) -> None:
        number = request.path_params["number"]
        if store.kind == "blocking":
            await run_in_threadpool(add_blocking, number)
            return
        async with await psycopg.AsyncConnection.connect(conninfo) as conn:
            await conn.execute(insert, [number])

    def make_app(store: Store) -> Starlette:
        async def at_post(request: Request) -> Response:
            await add(store, request)
            return JSONResponse({})

        async def at_get(request: Request) -> Response:
            await add(store, request)
            if "capture" in request.query_params:
                await store.capture()
            return JSONResponse({})

        async def anywhere(request: Request) -> Response:
            with consistency(Consistency.EVENTUAL):
                return JSONResponse(await store.look())

        return shop(
            store,
            Route("/own/{number:int}", at_post, methods=["POST"]),
            Route("/own/{number:int}", at_get),
            Route("/anywhere", anywhere),
        )

    return make_app


def pause(pg: EmbeddedCluster) -> None:
    for replica in pg.replicas.values():
        replica.pause_replay()


@pytest.mark.parametrize("synchronous_commit", ["on", "off"])
def test_reads_after_own_writes_are_never_stale(
    kind: Kind, pg: EmbeddedCluster, table: str, synchronous_commit: str
) -> None:
    """A POST's position is taken without router.write(): no GET after it misses its row."""
    pg.replicas["replica_1"].apply_delay(0.02)
    pg.replicas["replica_2"].apply_delay(0.3)

    async def rounds(client: Browser, first: int) -> list[tuple[int, Look, Look]]:
        looks = []
        for number in range(first, first + ROUNDS):
            (await client.send("POST", f"/own/{number}")).raise_for_status()
            anywhere = looked(await client.send("GET", "/anywhere"))
            looks.append((number, anywhere, looked(await client.send("GET", "/items"))))
        return looks

    async def everything(web: Web) -> list[list[tuple[int, Look, Look]]]:
        each = (rounds(web.browser(), number * ROUNDS) for number in range(CLIENTS))
        return await asyncio.gather(*each)

    # An asynchronous commit reaches a replica only when the walwriter has flushed it, every 200 ms.
    with open_web(kind, pg, own_engine(pg, synchronous_commit), wait_seconds=0.25) as web:
        looks = [look for some in web.call(everything(web)) for look in some]
    assert CLIENTS * ROUNDS == len(looks)
    assert [] == [number for number, _, look in looks if number not in look.ids]
    assert any(number not in anywhere.ids for number, anywhere, _ in looks)
    assert any(look.reason == Reason.CAUGHT_UP for _, _, look in looks)


@pytest.mark.parametrize("capture", [True, False])
def test_a_get_that_writes_calls_capture(
    kind: Kind, pg: EmbeddedCluster, table: str, capture: bool
) -> None:
    """router.capture() sends the position of a write in a GET, which nothing else can know of."""
    with open_web(kind, pg, own_engine(pg), **PATIENT) as web:
        client = web.browser()
        pause(pg)
        response = client.get("/own/1" + ("?capture" if capture else ""))
        look = client.look()
    assert (200, capture) == (response.status_code, HEADER in response.headers)
    if capture:
        assert Look([1], pg.primary.port, Reason.NOT_CAUGHT_UP) == look
    else:
        assert ([], Reason.WITHIN_LAG) == (look.ids, look.reason)


def test_only_write_methods_take_a_position(kind: Kind, pg: EmbeddedCluster, table: str) -> None:
    """write_methods says which requests do; others leave the client's token as it is."""
    options = {"write_methods": {"PUT"}}
    with open_web(kind, pg, own_engine(pg), middleware=options) as web:
        response = web.browser().post("/own/1")
    assert (200, None) == (response.status_code, sent_token(response))


def test_sticky_pins_after_a_write_of_its_own(kind: Kind, pg: EmbeddedCluster, table: str) -> None:
    """At sticky() a POST sends its client to the primary for that long, and no position."""
    level = Consistency.sticky(60)
    with open_web(kind, pg, own_engine(pg), consistency=level, **PATIENT) as web:
        client = web.browser()
        pause(pg)
        now = time.time()
        token = sent_token(client.post("/own/1"))
        look = client.look()
    assert token is not None
    assert token.pin_until is not None
    assert ({}, True) == (dict(token.positions), now + 60 <= token.pin_until < now + 70)
    assert Look([1], pg.primary.port, Reason.PRIMARY_REQUIRED) == look


def test_a_primary_that_is_down_pins_the_client(
    kind: Kind, pg: EmbeddedCluster, table: str
) -> None:
    """A position that cannot be taken is no error: the client reads from the primary meanwhile."""
    replicas = {node.port for node in pg.replicas.values()}
    with open_web(kind, pg, probe_timeout=0.3, connect_timeout=0.5, **PATIENT) as web:
        client, stranger = web.browser(header=True), web.browser()
        pg.primary.stop()
        now = time.time()
        response = client.post("/ping")
        unknown = web.events_of(PositionUnknown)
        refused, served = client.get("/items"), stranger.look()
        pg.primary.start()
        wait_until(lambda: web.router.snapshot()["primary"]["healthy"], CALL_SECONDS)
        look = client.look()
    token = sent_token(response)
    assert (200, 500, 1) == (response.status_code, refused.status_code, len(unknown))
    assert token is not None
    assert token.pin_until == unknown[0].pin_until
    assert now + 60 <= unknown[0].pin_until < now + 65
    assert (True, True) == (served.port in replicas, served.reason in DOWN)
    assert Look([], pg.primary.port, Reason.PRIMARY_REQUIRED) == look
