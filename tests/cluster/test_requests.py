"""Requests of one client through the middleware, over a real cluster, with both kinds of router."""

from __future__ import annotations

import asyncio
import random
import string
import threading
import time
from concurrent.futures import Future
from typing import Any

import httpx
import itsdangerous
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lsn_consistency import (
    Consistency,
    Lsn,
    Position,
    Reason,
    Token,
    TokenCodec,
    consistency,
)
from lsn_consistency.events import PositionUnknown, TokenNotSent, TokenRejected
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.harness import CALL_SECONDS, Kind, ports
from tests.cluster.web import (
    HEADER,
    PATIENT,
    SECRET,
    Browser,
    Look,
    Store,
    Web,
    looked,
    looker,
    open_web,
    sent_token,
    shop,
)

CLIENTS = 100
FORGERIES = 800
AT_ONCE = 25
STALL_SECONDS = 1.0
"""Far below what the waits of these tests take, and far above a request that waits for nothing."""


def pause(pg: EmbeddedCluster) -> None:
    for replica in pg.replicas.values():
        replica.pause_replay()


@pytest.mark.parametrize(
    ("cookies", "header"),
    [(True, False), (False, True), (True, True)],
    ids=["cookie", "header", "both"],
)
def test_a_get_after_a_post_sees_its_row(
    kind: Kind, pg: EmbeddedCluster, table: str, cookies: bool, header: bool
) -> None:
    """The row is read at the primary while both replicas lag, and at a replica that has it."""
    with open_web(kind, pg, **PATIENT) as web:
        client, stranger = web.browser(cookies=cookies, header=header), web.browser()
        pause(pg)
        client.add(1)
        mine, others = client.look(), stranger.look()
        pg.replicas["replica_2"].resume_replay()
        pg.wait_caught_up()
        later = client.look()
    assert Look([1], pg.primary.port, Reason.NOT_CAUGHT_UP) == mine
    assert ([], True) == (others.ids, others.port != pg.primary.port)
    assert Look([1], pg.replicas["replica_2"].port, Reason.CAUGHT_UP) == later


def test_overlapping_posts_lose_no_position(kind: Kind, pg: EmbeddedCluster, table: str) -> None:
    """Two POSTs overlap and the earlier is answered last: the next GET sees both, by cookies."""
    written = threading.Event()
    release = asyncio.Event()

    def make_app(store: Store) -> Starlette:
        async def slow(request: Request) -> Response:
            await store.add(1)
            written.set()
            await release.wait()
            return JSONResponse({})

        return shop(store, Route("/slow", slow, methods=["POST"]))

    with open_web(kind, pg, make_app, middleware={"header_name": None}, **PATIENT) as web:
        client, only_first = web.browser(), web.browser()
        client.add(0)
        first = client.start("POST", "/slow")
        assert written.wait(CALL_SECONDS)
        pg.wait_caught_up()
        pause(pg)
        client.add(2)
        web.loop.call_soon_threadsafe(release.set)
        only_first.keep(first.result(CALL_SECONDS))
        lagging, control = client.look(), only_first.look()
        pg.replicas["replica_1"].resume_replay()
        pg.wait_caught_up()
        caught_up = client.look()
    assert Look([0, 1, 2], pg.primary.port, Reason.NOT_CAUGHT_UP) == lagging
    assert ([0, 1], Reason.CAUGHT_UP) == (control.ids, control.reason)
    assert Look([0, 1, 2], pg.replicas["replica_1"].port, Reason.CAUGHT_UP) == caught_up


def broken_shop(store: Store) -> Starlette:
    async def broken(request: Request) -> Response:
        await store.add(1)
        raise RuntimeError("after the commit")

    return shop(store, Route("/broken", broken, methods=["POST"]))


def test_a_handler_that_commits_and_raises_sends_its_token(
    kind: Kind, pg: EmbeddedCluster, table: str
) -> None:
    """Wrapped outermost, the 500 carries the token: the row that was committed is seen."""
    with open_web(kind, pg, broken_shop, **PATIENT) as web:
        client = web.browser()
        pause(pg)
        status = client.post("/broken").status_code
        look = client.look()
    assert (500, Look([1], pg.primary.port, Reason.NOT_CAUGHT_UP)) == (status, look)


def test_a_token_that_a_500_cannot_carry_is_reported(
    kind: Kind, pg: EmbeddedCluster, table: str
) -> None:
    """Added inside, the framework answers 500 beyond the middleware: never in silence."""
    with open_web(kind, pg, broken_shop, outermost=False) as web:
        response = web.browser().post("/broken")
        reported = web.events_of(TokenNotSent)
    assert (500, None) == (response.status_code, sent_token(response))
    assert [1] == [len(event.token.positions) for event in reported]


def test_monotonic_reads_over_requests(kind: Kind, pg: EmbeddedCluster, table: str) -> None:
    """CAUSAL: who has seen a row sees it in every later request, over replicas that differ."""
    behind = pg.replicas["replica_2"]
    with open_web(kind, pg, **PATIENT) as web:
        behind.pause_replay()
        web.browser().add(1)
        pg.wait_caught_up()
        reader = web.browser()
        before = until_row_is_seen(reader)
        after = [reader.look() for _ in range(20)]
    assert [[1]] * 20 == [look.ids for look in after]
    assert behind.port not in {look.port for look in after}
    assert all(look.port == behind.port for look in before)


def until_row_is_seen(reader: Browser) -> list[Look]:
    """Return the looks that saw nothing, before the one that saw a row."""
    empty: list[Look] = []
    while not (look := reader.look()).ids:
        empty.append(look)
        assert len(empty) < 100
    return empty


def test_read_your_writes_leaves_gets_alone(kind: Kind, pg: EmbeddedCluster, table: str) -> None:
    """READ_YOUR_WRITES: a GET sends no token, so a reader may see a row and miss it again."""
    options: dict[str, Any] = {**PATIENT, "consistency": Consistency.READ_YOUR_WRITES}
    with open_web(kind, pg, **options) as web:
        pg.replicas["replica_2"].pause_replay()
        web.browser().add(1)
        pg.wait_caught_up()
        reader = web.browser()
        responses = [reader.get("/items") for _ in range(40)]
    looks = [looked(response) for response in responses]
    assert {(1,), ()} == {tuple(look.ids) for look in looks}
    sent = [name for each in responses for name in (HEADER, "set-cookie") if name in each.headers]
    assert ([], {}) == (sent, reader.cookies)


def test_routes_set_their_own_level(kind: Kind, pg: EmbeddedCluster, table: str) -> None:
    """A decorated endpoint and a block decide for their reads, whatever the router's level is."""

    def make_app(store: Store) -> Starlette:
        async def eventual(request: Request) -> Response:
            with consistency(Consistency.EVENTUAL):
                return JSONResponse(await store.look())

        strong = consistency(Consistency.STRONG)(looker(store))
        return shop(store, Route("/strong", strong), Route("/eventual", eventual))

    with open_web(kind, pg, make_app, **PATIENT) as web:
        client = web.browser()
        before = client.look("/strong")
        pause(pg)
        client.add(1)
        looks = [client.look(path) for path in ("/strong", "/items", "/eventual")]
    primary = pg.primary.port
    assert Look([], primary, Reason.PRIMARY_REQUIRED) == before
    assert Look([1], primary, Reason.PRIMARY_REQUIRED) == looks[0]
    assert Look([1], primary, Reason.NOT_CAUGHT_UP) == looks[1]
    assert ([], Reason.WITHIN_LAG) == (looks[2].ids, looks[2].reason)
    assert looks[2].port != primary


def test_a_full_primary_is_a_503(kind: Kind, pg: EmbeddedCluster, table: str) -> None:
    """Over max_fallback_reads a request is answered 503 with Retry-After, and later served."""
    entered, release = threading.Event(), threading.Event()

    def make_app(store: Store) -> Starlette:
        async def hold(request: Request) -> Response:
            await store.hold(entered, release)
            return JSONResponse({})

        return shop(store, Route("/hold", hold))

    limits: dict[str, Any] = {"max_fallback_reads": 1, "on_fallback_limit": "error"}
    options = {**PATIENT, "wait_seconds": 0.02, **limits}
    with open_web(kind, pg, make_app, outermost=False, **options) as web:
        client = web.browser()
        pause(pg)
        client.add(1)
        held = client.start("GET", "/hold")
        assert entered.wait(CALL_SECONDS)
        refused = client.get("/items")
        release.set()
        statuses = [held.result(CALL_SECONDS).status_code, client.get("/items").status_code]
    assert (503, "1") == (refused.status_code, refused.headers["retry-after"])
    assert [200, 200] == statuses


@pytest.mark.parametrize("level", [Consistency.CAUSAL, Consistency.READ_YOUR_WRITES], ids=str)
def test_clients_at_once_see_their_own_rows(
    kind: Kind, pg: EmbeddedCluster, table: str, level: Consistency
) -> None:
    """100 clients write and read at once over two delayed replicas: 0 stale, no token mixed."""
    pg.replicas["replica_1"].apply_delay(0.03)
    pg.replicas["replica_2"].apply_delay(0.2)

    async def write_and_read(client: Browser, number: int) -> list[Look]:
        (await client.send("POST", f"/items/{number}")).raise_for_status()
        return [looked(await client.send("GET", "/items")) for _ in range(2)]

    async def only_read(client: Browser) -> int:
        return (await client.send("GET", "/items")).status_code

    async def everything(web: Web) -> tuple[list[list[Look]], list[Browser]]:
        writers = [web.browser() for _ in range(CLIENTS)]
        readers = [web.browser(header=True) for _ in range(20)]
        looks = asyncio.gather(*(write_and_read(each, n) for n, each in enumerate(writers)))
        await asyncio.gather(*(only_read(each) for each in readers))
        return await looks, readers

    with open_web(kind, pg, consistency=level) as web:
        answers, readers = web.call(everything(web))
    stale = [n for n, looks in enumerate(answers) for look in looks if n not in look.ids]
    assert [] == stale
    served = {look.port for looks in answers for look in looks}
    assert served & {replica.port for replica in pg.replicas.values()}
    if level is Consistency.CAUSAL:
        back = [n for n, (one, two) in enumerate(answers) if not set(one.ids) <= set(two.ids)]
        assert [] == back
    else:
        assert [(None, {})] * 20 == [(each.token, each.cookies) for each in readers]


# Forged tokens


def forged(web: Web, number: int, genuine: str) -> str:
    """Return a text that was made of a genuine token, or to look like one from far ahead."""
    rng = random.Random(number)
    (position,) = sent_positions(genuine)
    ahead = Token([Position(position.system_id, position.timeline, Lsn(1 << 60))])
    others = TokenCodec("another key that is long enough too").encode(ahead)
    index = rng.randrange(len(genuine))
    payload, _, rest = others.partition(".")
    texts = (
        genuine[:index] + ("A" if genuine[index] != "A" else "B") + genuine[index + 1 :],
        genuine[:index],
        f"{payload}.{genuine.partition('.')[2]}",
        f"{genuine.partition('.')[0]}.{rest}",
        others,
        itsdangerous.TimestampSigner(SECRET).sign(payload).decode(),
        "".join(rng.choices(string.ascii_letters + string.digits + "._-", k=rng.randrange(1, 200))),
    )
    return texts[number % len(texts)] or "."


def sent_positions(text: str) -> list[Position]:
    return list(TokenCodec(SECRET).decode(text).positions.values())


async def present(web: Web, genuine: str, count: int) -> list[httpx.Response]:
    """Send forged tokens, by turns in the header and in a cookie, many requests at once."""

    async def some(numbers: range) -> list[httpx.Response]:
        responses = []
        for number in numbers:
            text = forged(web, number, genuine)
            name = "Cookie" if number % 2 else HEADER
            value = f"consistency_token-a={text}" if number % 2 else text
            client = web.browser(cookies=False)
            responses.append(await client.send("GET", "/items", headers={name: value}))
        return responses

    groups = await asyncio.gather(*(some(range(n, count, AT_ONCE)) for n in range(AT_ONCE)))
    return [response for group in groups for response in group]


@pytest.mark.parametrize("on_bad_token", ["ignore", "primary"])
def test_forged_tokens_are_harmless(
    kind: Kind, pg: EmbeddedCluster, table: str, on_bad_token: str
) -> None:
    """No 5xx, none accepted; by default none brings a read to the primary, or makes it wait."""
    level = Consistency.READ_YOUR_WRITES
    count = FORGERIES if on_bad_token == "ignore" else FORGERIES // 4
    options: dict[str, Any] = {
        "consistency": level,
        "middleware": {"on_bad_token": on_bad_token},
        **PATIENT,
    }
    with open_web(kind, pg, **options) as web:
        genuine = web.browser().add(1).headers[HEADER]
        pg.wait_caught_up()
        responses = web.call(present(web, genuine, count))
        rejected = web.events_of(TokenRejected)
    assert {200} == {response.status_code for response in responses}
    assert count == len(responses) == len(rejected)
    looks = [looked(response) for response in responses]
    replicas = {node.port for node in pg.replicas.values()}
    if on_bad_token == "ignore":
        assert ({Reason.WITHIN_LAG}, replicas) == (
            {look.reason for look in looks},
            {look.port for look in looks},
        )
    else:
        expected = {(ports(pg)["primary"], Reason.PRIMARY_REQUIRED)}
        assert expected == {(look.port, look.reason) for look in looks}
    assert [] == [each for each in responses if HEADER in each.headers]
    assert [] == [each for each in responses if "set-cookie" in each.headers]


# The event loop


def slowest_ping(web: Web, until: Future[httpx.Response]) -> float:
    """Return how long the slowest of many requests took that wait for nothing."""
    times: list[float] = []
    client = web.browser()
    while not until.done():
        began = time.monotonic()
        client.get("/ping")
        times.append(time.monotonic() - began)
    assert len(times) > 5
    return max(times)


def test_a_read_that_waits_holds_up_nobody(kind: Kind, pg: EmbeddedCluster, table: str) -> None:
    """While reads wait two seconds for a replica, the event loop answers other requests."""
    with open_web(kind, pg, wait_seconds=2.0, **PATIENT) as web:
        client = web.browser()
        pause(pg)
        client.add(1)
        began = time.monotonic()
        reads = [client.start("GET", "/items") for _ in range(5)]
        slowest = slowest_ping(web, reads[0])
        waited = time.monotonic() - began
        ids = [looked(each.result(CALL_SECONDS)).ids for each in reads]
    assert slowest < STALL_SECONDS
    assert 2.0 <= waited < 5.0
    assert [[1]] * 5 == ids


def test_a_capture_that_waits_holds_up_nobody(kind: Kind, pg: EmbeddedCluster, table: str) -> None:
    """A frozen primary delays the POST by one probe: it succeeds, pinned, and is alone in that."""
    with open_web(kind, pg, probe_timeout=2.0) as web:
        client = web.browser(header=True)
        client.get("/items")
        pg.primary.freeze()
        began, now = time.monotonic(), time.time()
        post = client.start("POST", "/ping")
        slowest = slowest_ping(web, post)
        waited = time.monotonic() - began
        response = post.result(CALL_SECONDS)
        unknown = web.events_of(PositionUnknown)
    token = sent_token(response)
    assert (200, 1) == (response.status_code, len(unknown))
    assert slowest < STALL_SECONDS
    assert waited < 4.5
    assert token is not None
    assert token.pin_until == unknown[0].pin_until
    assert now + 5 <= unknown[0].pin_until < now + 10
