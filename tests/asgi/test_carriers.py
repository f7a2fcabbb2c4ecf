"""Where tokens travel: the header, the cookies, and what caches are told."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lsn_consistency.exceptions import MalformedTokenError
from lsn_consistency.lsn import Position
from lsn_consistency.middleware import COMPACT_AT, MAX_TOKENS
from lsn_consistency.session import current_session
from lsn_consistency.tokens import Token, TokenCodec
from tests.asgi.fake_router import (
    HEADER,
    SECRET,
    SYSTEM,
    Exchange,
    FakeRouter,
    client,
    cookie_header,
    deleted,
    fetch,
    lsn_of,
    plain,
    position_text,
    request,
    shop,
    signed,
    stored,
    stored_text,
    token_at,
    wrap,
)

COOKIE_NAME = re.compile(r"consistency_token-[A-Za-z0-9_-]{12}")


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


def seen_by(router: FakeRouter, headers: list[tuple[bytes, bytes]], **options: Any) -> Token:
    """Return the session's token inside an application that got these raw headers."""
    seen: list[Token] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(current_session().token)
        await plain(send)

    asyncio.run(Exchange(wrap(app, router, **options))(headers=headers))
    return seen[0]


def test_a_write_reaches_the_client_in_both_carriers(router: FakeRouter) -> None:
    """A response whose handler wrote carries the same token as header and as cookie."""
    response = fetch(wrap(shop(router), router), "POST", "/order")
    assert lsn_of(response.headers[HEADER]) == int(response.text)
    assert stored_text(response) == response.headers[HEADER]


def test_cookie_name_none_uses_the_header_alone(router: FakeRouter) -> None:
    """Without a cookie name no cookie is written, read, or named in Vary."""
    app = wrap(shop(router), router, cookie_name=None)
    response = fetch(app, "POST", "/order", headers=cookie_header(signed(5000)))
    assert lsn_of(response.headers[HEADER]) == int(response.text)
    assert response.headers.get_list("set-cookie") == []
    assert response.headers["vary"] == HEADER


def test_header_name_none_uses_the_cookie_alone(router: FakeRouter) -> None:
    """Without a header name no header is written, read, or named in Vary."""
    app = wrap(shop(router), router, header_name=None)
    response = fetch(app, "POST", "/order", headers={HEADER: signed(5000)})
    assert lsn_of(stored_text(response)) == int(response.text)
    assert HEADER not in response.headers
    assert response.headers["vary"] == "Cookie"


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([(b"x-consistency-token", b"%a")], id="header"),
        pytest.param([(b"cookie", b"consistency_token=%a")], id="cookie of the plain name"),
        pytest.param([(b"cookie", b"a=b; consistency_token-Ab_-1234=%a; c=d")], id="cookie"),
        pytest.param([(b"cookie", b"a=b;consistency_token-Ab_-1234=%a")], id="cookie, no space"),
        pytest.param([(b"cookie", b"a=b; \t consistency_token=\t%a \t; c=d")], id="cookie, blanks"),
    ],
)
def test_a_token_of_each_carrier_is_read(
    router: FakeRouter, headers: list[tuple[bytes, bytes]]
) -> None:
    """The session starts with the token of the header or the cookie."""
    raw = [(name, value.replace(b"%a", signed(1500).encode())) for name, value in headers]
    assert seen_by(router, raw) == token_at(1500)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([(b"x-consistency-token", b"%a, %b,,%c")], id="one header line"),
        pytest.param(
            [(b"x-consistency-token", b"%a"), (b"x-consistency-token", b"%b,%c")], id="header lines"
        ),
        pytest.param(
            [(b"cookie", b"consistency_token-a=%a; consistency_token=%b; consistency_token-c=%c")],
            id="cookies",
        ),
        pytest.param(
            [
                (b"cookie", b"consistency_token-a=%a"),
                (b"cookie", b"consistency_token-b=%b; consistency_token-c=%c"),
            ],
            id="cookie lines",
        ),
        pytest.param(
            [
                (b"cookie", b"consistency_token=%a; consistency_token=%b"),
                (b"x-consistency-token", b"%c"),
            ],
            id="both carriers, one name twice",
        ),
    ],
)
def test_all_tokens_of_a_request_are_merged(
    router: FakeRouter, headers: list[tuple[bytes, bytes]]
) -> None:
    """No valid token is dropped, however a request brings them."""
    texts = {b"%a": signed(1500), b"%b": signed(1400), b"%c": signed(7, system=9)}
    raw = []
    for name, value in headers:
        for mark, text in texts.items():
            value = value.replace(mark, text.encode())
        raw.append((name, value))
    assert seen_by(router, raw) == token_at(1500).merge(token_at(7, system=9))
    assert router.events == []


@pytest.mark.parametrize(
    "cookie",
    [
        "consistency_tokens=%s",
        "my-consistency_token=%s",
        "Consistency_Token=%s",
        "other=consistency_token=%s",
        "consistency_token-<script>=%s",
        "consistency_token-=%s",
        "consistency_token =%s",
        "consistency_token-no_value; other=%s",
        "consistency_token-" + "x" * 65 + "=%s",
    ],
)
def test_cookies_of_other_names_are_neither_read_nor_deleted(
    router: FakeRouter, cookie: str
) -> None:
    """Only cookies of our names are ours; a name that is not safe to repeat is none of them."""
    headers = {"cookie": cookie % signed(5000)}
    response = fetch(wrap(shop(router), router), "POST", "/order", headers=headers)
    assert lsn_of(stored_text(response)) == int(response.text)
    assert deleted(response) == []
    assert router.events == []


def test_own_names_are_used(router: FakeRouter) -> None:
    """Both carriers can be renamed; header names are found without regard to case."""
    app = wrap(shop(router), router, cookie_name="pos", header_name="X-Pos")
    response = fetch(app, "POST", "/order", headers={"cookie": f"pos-a={signed(500)}"})
    assert stored(response)[0].startswith("pos-")
    assert deleted(response) == ["pos-a"]
    again = fetch(app, path="/orders", headers={"x-pOS": response.headers["x-pos"]})
    assert again.text == response.text


def test_a_response_without_advance_carries_no_token(router: FakeRouter) -> None:
    """A read that does not advance the session sets nothing, whatever the request brought."""
    headers = {HEADER: signed(1400), **cookie_header(signed(1500))}
    response = fetch(wrap(shop(router), router), path="/orders", headers=headers)
    assert response.text == "1500"
    assert HEADER not in response.headers
    assert response.headers.get_list("set-cookie") == []


def test_positions_already_held_are_no_advance(router: FakeRouter) -> None:
    """A causal read at or below the token's position sets nothing."""
    app = wrap(shop(router), router)
    response = fetch(app, path="/orders?causal", headers={HEADER: signed(router.lsn)})
    assert HEADER not in response.headers
    assert stored(response) == []


def test_a_causal_read_that_advances_is_sent(router: FakeRouter) -> None:
    """What a read saw reaches the client too: monotonic reads."""
    response = fetch(wrap(shop(router), router), path="/orders?causal")
    assert lsn_of(response.headers[HEADER]) == router.lsn
    assert stored_text(response) == response.headers[HEADER]


def test_what_came_in_is_part_of_what_goes_out(router: FakeRouter) -> None:
    """The token of a response holds the positions of all systems that the request brought."""
    headers = {HEADER: signed(7, system=9)}
    response = fetch(wrap(shop(router), router), "POST", "/order", headers=headers)
    assert lsn_of(response.headers[HEADER], system=9) == 7
    assert lsn_of(response.headers[HEADER]) == int(response.text)


def test_each_position_has_a_cookie_of_its_own(router: FakeRouter) -> None:
    """Responses with different tokens never write the same cookie."""
    app = wrap(shop(router), router)
    names = {stored(fetch(app, "POST", "/order"))[0].partition("=")[0] for _ in range(20)}
    assert len(names) == 20
    assert all(COOKIE_NAME.fullmatch(name) for name in names)


def test_equal_tokens_share_a_cookie(router: FakeRouter) -> None:
    """Parallel reads that saw the same position take one place in the browser's jar."""
    app = wrap(shop(router), router)
    names = {stored(fetch(app, path="/orders?causal"))[0].partition("=")[0] for _ in range(20)}
    assert len(names) == 1


def test_a_token_that_is_merged_into_itself_is_not_deleted(router: FakeRouter) -> None:
    """A compaction whose result equals one of the tokens that came in keeps that cookie."""
    app = wrap(shop(router), router)
    name = stored(fetch(app, path="/orders?causal"))[0].partition("=")[0]
    older = "; ".join(f"consistency_token-{n}={signed(n)}" for n in range(1, 4))
    cookie = f"{name}={signed(router.lsn)}; {older}"
    response = fetch(app, path="/about", headers={"cookie": cookie})
    assert stored(response)[0].partition("=")[0] == name
    assert name not in deleted(response)
    assert len(deleted(response)) == 3


def test_the_cookies_that_came_in_are_deleted(router: FakeRouter) -> None:
    """The response that carries a merge deletes what it merged, and what was rejected."""
    cookie = (
        f"consistency_token={signed(1)}; consistency_token-a={signed(2)}; consistency_token-b=bad"
    )
    app = wrap(shop(router), router)
    response = fetch(app, "POST", "/order", headers={"cookie": cookie})
    assert deleted(response) == ["consistency_token", "consistency_token-a", "consistency_token-b"]
    assert len(stored(response)) == 1


def test_a_name_that_came_in_twice_is_deleted_once(router: FakeRouter) -> None:
    """Cookies of one name, as two paths can leave them, cost one line."""
    headers = {"cookie": f"consistency_token={signed(1)}; consistency_token={signed(2)}"}
    response = fetch(wrap(shop(router), router), "POST", "/order", headers=headers)
    assert deleted(response) == ["consistency_token"]


def test_an_empty_cookie_is_no_token(router: FakeRouter) -> None:
    """A cookie without a value is not reported as a bad token, and is cleared away."""
    app = wrap(shop(router), router)
    headers = {"cookie": "consistency_token-a="}
    response = fetch(app, "POST", "/order", headers=headers)
    assert router.events == []
    assert deleted(response) == ["consistency_token-a"]


def test_overlapping_writes_lose_no_position(router: FakeRouter) -> None:
    """Two POSTs overlap and the earlier is answered last: the next GET asks for both writes."""
    answer_first, second_answered = asyncio.Event(), asyncio.Event()
    started = asyncio.Event()

    async def order(request: Request) -> Response:
        system = int(request.query_params["system"])
        current_session().advance(token_at(router.commit(), system=system))
        current_session().wrote = True
        if system == 1:
            started.set()
            await answer_first.wait()
        return PlainTextResponse(str(router.lsn))

    async def orders(request: Request) -> Response:
        token = current_session().token
        return PlainTextResponse(
            f"{position_text(token, system=1)} {position_text(token, system=2)}"
        )

    routes = [Route("/", order, methods=["POST"]), Route("/", orders)]
    app = wrap(Starlette(routes=routes), router, header_name=None)

    async def browser() -> tuple[str, int, str, int]:
        async with client(app) as http:
            await http.post("/?system=3")
            first = asyncio.create_task(http.post("/?system=1"))
            await started.wait()
            await http.post("/?system=2")
            second_answered.set()
            answer_first.set()
            await first
            overlapping = len(http.cookies)
            seen = (await http.get("/")).text
            await http.post("/?system=3")
            merged = (await http.get("/")).text
            return seen, overlapping, merged, len(http.cookies)

    # The first POST committed 1001, so the two that overlap committed 1002 and 1003.
    assert asyncio.run(browser()) == ("1002 1003", 2, "1002 1003", 1)


def test_one_position_after_another_keeps_one_cookie(router: FakeRouter) -> None:
    """Requests that do not overlap never gather cookies in the jar, and see their own writes."""
    app = wrap(shop(router), router, header_name=None)

    async def browser() -> list[tuple[bool, int]]:
        steps = []
        async with client(app) as http:
            for _ in range(10):
                written = (await http.post("/order")).text
                seen = (await http.get("/orders?causal")).text
                steps.append((written == seen, len(http.cookies)))
        return steps

    assert asyncio.run(browser()) == [(True, 1)] * 10


@pytest.mark.parametrize("count", [COMPACT_AT - 1, COMPACT_AT])
def test_many_cookies_become_one(router: FakeRouter, count: int) -> None:
    """From the fourth cookie on a response stores their merge, even without an advance."""
    headers = cookie_header(*(signed(7, system=number) for number in range(1, count + 1)))
    response = fetch(wrap(shop(router), router), path="/about", headers=headers)
    if count < COMPACT_AT:
        assert response.headers.get_list("set-cookie") == []
    else:
        assert len(deleted(response)) == count
        text = stored_text(response)
        assert [lsn_of(text, system=number) for number in range(1, count + 1)] == [7] * count
        assert response.headers["vary"] == f"Cookie, {HEADER}"


def test_a_burst_of_cookies_shrinks_to_one(router: FakeRouter) -> None:
    """Twenty overlapping writes leave twenty cookies; the next response leaves one."""
    app = wrap(shop(router), router, header_name=None)

    async def browser() -> tuple[int, int, str]:
        async with client(app) as http:
            responses = await asyncio.gather(*(request(app, "POST", "/order") for _ in range(20)))
            for response in responses:
                http.cookies.extract_cookies(response)
            before = len(http.cookies)
            await http.get("/about")
            return before, len(http.cookies), (await http.get("/orders")).text

    assert asyncio.run(browser()) == (20, 1, "1020")


def test_many_rejected_cookies_are_deleted_without_a_token(router: FakeRouter) -> None:
    """Cookies of which none verifies are cleared away, and nothing is signed for them."""
    headers = cookie_header(*["bad"] * COMPACT_AT)
    response = fetch(wrap(shop(router), router), path="/about", headers=headers)
    assert len(deleted(response)) == COMPACT_AT
    assert stored(response) == []
    assert HEADER not in response.headers


def test_tokens_beyond_the_bound_stay_for_the_next_request(router: FakeRouter) -> None:
    """Of too many cookies the first are merged and deleted; the next request merges the rest."""
    systems = [1 + number % 7 for number in range(MAX_TOKENS + 8)]
    texts = [signed(100 + number, system=system) for number, system in enumerate(systems)]
    app = wrap(shop(router), router, header_name=None)

    async def browser() -> tuple[int, int, Token]:
        async with client(app) as http:
            for number, text in enumerate(texts):
                http.cookies.set(f"consistency_token-{number:08}", text, domain="shop.test")
            first = await http.get("/about")
            second = await http.get("/about")
            token = TokenCodec(SECRET).decode(stored_text(second))
            return len(deleted(first)), len(deleted(second)), token

    newest = {system: 100 + number for number, system in enumerate(systems)}
    expected = Token(Position.of(system, 1, lsn) for system, lsn in newest.items())
    assert asyncio.run(browser()) == (MAX_TOKENS, 9, expected)
    assert [(type(each.error), each.carrier) for each in router.rejected] == [
        (MalformedTokenError, "cookie")
    ]


@pytest.mark.parametrize("carrier", ["header", "cookie"])
@pytest.mark.parametrize("on_bad_token", ["ignore", "primary"])
def test_more_tokens_than_the_bound_pin_the_request(
    router: FakeRouter, carrier: str, on_bad_token: str
) -> None:
    """A valid token may be among those not looked at, so the request reads from the primary."""

    def pin_with(count: int) -> float | None:
        texts = [signed(5)] * count
        value = ",".join(texts) if carrier == "header" else cookie_header(*texts)["cookie"]
        name = b"x-consistency-token" if carrier == "header" else b"cookie"
        return seen_by(router, [(name, value.encode())], on_bad_token=on_bad_token).pin_until

    assert pin_with(MAX_TOKENS) is None
    now = time.time()
    until = pin_with(MAX_TOKENS + 1)
    assert until is not None
    assert now + router.settings.pin_seconds <= until <= time.time() + router.settings.pin_seconds
    assert [each.carrier for each in router.rejected] == [carrier]


@pytest.mark.parametrize(
    ("options", "scheme", "expected"),
    [
        ({}, "http", "Path=/; HttpOnly; SameSite=lax"),
        ({}, "https", "Path=/; HttpOnly; SameSite=lax; Secure"),
        ({"https_only": True}, "http", "Path=/; HttpOnly; SameSite=lax; Secure"),
        ({"https_only": False}, "https", "Path=/; HttpOnly; SameSite=lax"),
        ({"same_site": "strict"}, "http", "Path=/; HttpOnly; SameSite=strict"),
        ({"same_site": "none"}, "http", "Path=/; HttpOnly; SameSite=none; Secure"),
        (
            {"same_site": "none", "https_only": True},
            "https",
            "Path=/; HttpOnly; SameSite=none; Secure",
        ),
        (
            {"path": "/shop", "domain": "shop.test"},
            "http",
            "Path=/shop; Domain=shop.test; HttpOnly; SameSite=lax",
        ),
    ],
)
def test_cookie_attributes(
    router: FakeRouter, options: dict[str, Any], scheme: str, expected: str
) -> None:
    """A cookie is stored and deleted with the same attributes, as the options say."""
    app = wrap(shop(router), router, max_age=59.5, **options)
    headers = {"cookie": "consistency_token-a=bad"}
    response = fetch(app, "POST", "/order", headers=headers, base_url=f"{scheme}://shop.test")
    assert stored(response)[0].partition("; ")[2] == f"Max-Age=60; {expected}"
    assert response.headers.get_list("set-cookie")[0] == (
        f"consistency_token-a=; Max-Age=0; {expected}"
    )


def varied(router: FakeRouter, path: str, vary: list[str], **options: Any) -> list[str]:
    """Return the Vary lines of a response to which the application gave the lines ``vary``."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/write":
            router.write()
        elif scope["path"] == "/read":
            router.read()
        headers = [(b"Vary", line.encode()) for line in vary]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    response = fetch(wrap(app, router, **options), path=path)
    lines: list[str] = response.headers.get_list("vary")
    return lines


@pytest.mark.parametrize("path", ["/read", "/write"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], ["Cookie, X-Consistency-Token"]),
        (["Accept-Encoding"], ["Accept-Encoding, Cookie, X-Consistency-Token"]),
        (
            ["Origin", "accept, Accept-Language"],
            ["Origin, accept, Accept-Language, Cookie, X-Consistency-Token"],
        ),
        (["cookie"], ["cookie, X-Consistency-Token"]),
        (["x-consistency-token,COOKIE"], ["x-consistency-token,COOKIE"]),
        (["*"], ["*"]),
        (["Origin, *"], ["Origin, *"]),
    ],
)
def test_vary_names_the_carriers_once(
    router: FakeRouter, path: str, before: list[str], after: list[str]
) -> None:
    """A response that the token had a part in tells caches so, and keeps what Vary held."""
    assert varied(router, path, before) == after


def test_untouched_responses_do_not_vary(router: FakeRouter) -> None:
    """A response whose handler neither read nor wrote stays as it was."""
    assert varied(router, "/", []) == []
    assert varied(router, "/", ["Origin"]) == ["Origin"]


def test_the_token_header_is_set_once(router: FakeRouter) -> None:
    """A token that the application put into its response itself is replaced, not doubled."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"X-Consistency-Token", b"of the application"), (b"x-other", b"1")]
        router.write()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    response = fetch(wrap(app, router))
    assert [lsn_of(text) for text in response.headers.get_list(HEADER)] == [router.lsn]
    assert response.headers["x-other"] == "1"


@pytest.mark.parametrize("header_name", [HEADER, None])
def test_a_response_object_that_is_used_again_leaks_no_token(
    router: FakeRouter, header_name: str | None
) -> None:
    """The headers of the application's own response object stay as they are."""
    response = PlainTextResponse("made once")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            router.write()
        await response(scope, receive, send)

    wrapped = wrap(app, router, header_name=header_name)
    assert stored(fetch(wrapped, "POST")) != []
    second = fetch(wrapped)
    assert stored(second) == []
    assert HEADER not in second.headers
    assert second.text == "made once"


def test_response_headers_are_lower_case_bytes(router: FakeRouter) -> None:
    """What goes to the server is what ASGI asks for: pairs of bytes, names in lower case."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        router.write()
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    start, body = asyncio.run(Exchange(wrap(app, router))())
    assert [name for name, _ in start["headers"]] == [
        b"x-consistency-token",
        b"set-cookie",
        b"vary",
    ]
    assert all(isinstance(value, bytes) for _, value in start["headers"])
    assert body == {"type": "http.response.body"}


def test_a_browser_stores_and_returns_the_cookie(router: FakeRouter) -> None:
    """The cookie works with a jar that follows path, domain and Secure."""
    app: ASGIApp = wrap(shop(router), router, header_name=None, domain="shop.test", path="/")

    async def browser() -> tuple[str, str]:
        async with client(app, base_url="https://www.shop.test") as http:
            written: httpx.Response = await http.post("/order")
            return written.text, (await http.get("/orders")).text

    written, seen = asyncio.run(browser())
    assert seen == written


def test_token_texts_need_no_quoting(router: FakeRouter) -> None:
    """A cookie's value consists of characters that RFC 6265 allows as they stand."""
    response = fetch(wrap(shop(router), router), "POST", "/order")
    assert re.fullmatch(r"[A-Za-z0-9._-]+", stored_text(response))
    assert lsn_of(stored_text(response), system=SYSTEM) == router.lsn
