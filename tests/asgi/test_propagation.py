"""The token in and out of mappings: headers of calls, jobs and messages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from lsn_consistency.exceptions import (
    BadSignatureError,
    ConfigurationError,
    MalformedTokenError,
    TokenError,
)
from lsn_consistency.propagation import extract, inject
from lsn_consistency.session import Session, current_session
from lsn_consistency.tokens import Token, TokenCodec
from tests.asgi.fake_router import (
    HEADER,
    SECRET,
    FakeRouter,
    client,
    fetch,
    lsn_of,
    position_text,
    shop,
    signed,
    token_at,
    wrap,
)

CODEC = TokenCodec(SECRET)


@pytest.mark.parametrize("carrier", [{}, MutableHeaders(), httpx.Headers()])
def test_a_token_goes_through_any_mapping(carrier: Any) -> None:
    """What one session injects, another extracts, returns, and advances by."""
    with Session(token_at(1500), codec=CODEC):
        inject(carrier)
    with Session(token_at(7, system=9), codec=CODEC) as session:
        assert extract(carrier) == token_at(1500)
        assert session.token == token_at(1500).merge(token_at(7, system=9))


def test_pins_travel_too() -> None:
    """A pin to the primary holds for the job that the request starts."""
    carrier: dict[str, str] = {}
    with Session(codec=CODEC) as session:
        session.pin(4_000_000_000.0)
        inject(carrier)
    with Session(codec=CODEC):
        assert extract(carrier).pin_until == 4_000_000_000.0


def test_an_empty_token_puts_nothing() -> None:
    """A session without a token leaves the carrier as it is, and an old entry in it alone."""
    carrier = {"other": "1"}
    with Session(codec=CODEC):
        inject(carrier)
    assert carrier == {"other": "1"}


def test_inject_replaces_an_older_token() -> None:
    """Carriers that are used again hold one token, the current one."""
    carrier: dict[str, str] = {}
    with Session(token_at(1), codec=CODEC) as session:
        inject(carrier)
        session.advance(token_at(2))
        inject(carrier)
    assert (list(carrier), lsn_of(carrier[HEADER])) == ([HEADER], 2)


@pytest.mark.parametrize(
    "carrier",
    [
        {"x-consistency-token": signed(1500)},
        {"X-CONSISTENCY-TOKEN": signed(1500)},
        {HEADER: signed(1500).encode()},
        {"x-consistency-token": signed(1500).encode()},
        {1: "a", None: "b", "x-Consistency-Token": signed(1500)},
        Headers({HEADER: signed(1500)}),
    ],
)
def test_names_of_any_case_and_bytes_are_understood(carrier: Mapping[str, Any]) -> None:
    """Whatever a transport makes of a header's name and value, its token is found."""
    with Session(codec=CODEC):
        assert extract(carrier) == token_at(1500)


def test_job_headers_among_others() -> None:
    """The headers of a job keep what else they hold, and a worker's session gets the token."""
    headers: dict[str, Any] = {"id": 7, "retries": 0, "eta": None}
    with Session(token_at(1500), codec=CODEC):
        inject(headers)

    def worker() -> Token:
        with Session(codec=CODEC):
            extract(headers)
            return current_session().token

    assert worker() == token_at(1500)
    assert {name: headers[name] for name in ("id", "retries", "eta")} == {
        "id": 7,
        "retries": 0,
        "eta": None,
    }


@pytest.mark.parametrize("carrier", [{}, {HEADER: None}, {"other": signed(1500)}])
def test_a_carrier_without_a_token_gives_the_empty_token(carrier: dict[str, Any]) -> None:
    """Nothing found is no error and no advance."""
    with Session(token_at(5), codec=CODEC) as session:
        assert extract(carrier, on_error=_unexpected) == Token()
        assert session.token == token_at(5)


def _unexpected(error: TokenError) -> None:
    raise AssertionError(error)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (signed(1500, key="another key"), BadSignatureError),
        (signed(1500)[:-1], MalformedTokenError),
        ("", MalformedTokenError),
        ("Größe", MalformedTokenError),
        (b"\xff\xfe", MalformedTokenError),
        (1500, MalformedTokenError),
        ([signed(1500)], MalformedTokenError),
    ],
    ids=["another key", "cut", "empty", "not ASCII", "bytes", "number", "list"],
)
def test_a_forged_token_is_handed_to_on_error(value: Any, error: type[TokenError]) -> None:
    """A bad job header cannot stop a worker: it gives the empty token and one call of on_error."""
    errors: list[TokenError] = []
    with Session(token_at(5), codec=CODEC) as session:
        assert extract({HEADER: value}, on_error=errors.append) == Token()
        assert extract({HEADER: value}) == Token()
        assert session.token == token_at(5)
    assert [type(each) for each in errors] == [error]


def test_arguments_take_the_place_of_the_sessions() -> None:
    """A codec and a name given to the call are used instead of the session's."""
    other = TokenCodec("another key")
    carrier: dict[str, str] = {}
    with Session(token_at(1500), codec=CODEC):
        inject(carrier, codec=other, header_name="position")
        assert list(carrier) == ["position"]
        assert other.decode(carrier["position"]) == token_at(1500)
        assert extract(carrier, codec=other, header_name="Position") == token_at(1500)
        assert extract(carrier, header_name="position") == Token()


def test_a_session_names_its_header() -> None:
    """A session's own header name is used by both functions."""
    carrier: dict[str, str] = {}
    with Session(token_at(1500), codec=CODEC, header_name="X-Pos"):
        inject(carrier)
        assert list(carrier) == ["X-Pos"]
        assert extract(carrier) == token_at(1500)


@pytest.mark.parametrize("token", [None, token_at(1500)])
def test_a_missing_codec_is_a_configuration_error(token: Token | None) -> None:
    """Without a codec both functions say what to pass, whether or not there is a token yet."""
    with Session(token), pytest.raises(ConfigurationError, match="codec=TokenCodec"):
        inject({})
    for carrier in ({}, {HEADER: signed(1500)}):
        with Session(token), pytest.raises(ConfigurationError, match="codec=TokenCodec"):
            extract(carrier)


def test_a_call_to_another_service_takes_the_token_along_and_back() -> None:
    """A write of a called service is in the token that the calling service sends to its client."""
    inner_router, outer_router = FakeRouter(lsn=5000), FakeRouter()
    inner = wrap(shop(inner_router), inner_router)

    async def endpoint(request: Request) -> Response:
        headers: dict[str, str] = {}
        inject(headers)
        async with client(inner) as http:
            seen = await http.get("/orders", headers=headers)
            written = await http.post("/order", headers=headers)
        extract(written.headers)
        return PlainTextResponse(seen.text)

    outer = wrap(Starlette(routes=[Route("/", endpoint)]), outer_router)
    response = fetch(outer, headers={HEADER: signed(4000)})
    assert response.text == "4000"
    assert lsn_of(response.headers[HEADER]) == 5001


def test_tasks_of_a_request_inject_its_token() -> None:
    """A child task of a request uses the codec, the name and the token of the request."""
    router = FakeRouter()
    carrier: dict[str, str] = {}

    async def child() -> None:
        inject(carrier)

    async def endpoint(request: Request) -> Response:
        router.write()
        await asyncio.create_task(child())
        return PlainTextResponse(position_text(current_session().token))

    app = wrap(Starlette(routes=[Route("/", endpoint)]), router, header_name="X-Pos")
    response = fetch(app)
    assert str(lsn_of(carrier["X-Pos"])) == response.text
