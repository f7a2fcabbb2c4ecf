"""What the middleware does around an application, whatever carries the tokens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import copy_context
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from fastapi import HTTPException as FastAPIHTTPException
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lsn_consistency.events import TokenNotSent
from lsn_consistency.exceptions import ConfigurationError, FallbackLimitError
from lsn_consistency.middleware import ConsistencyMiddleware
from lsn_consistency.session import Session, current_session
from lsn_consistency.tokens import Token, TokenCodec
from tests.asgi.fake_router import (
    HEADER,
    SECRET,
    BlockingFakeRouter,
    Exchange,
    FakeRouter,
    client,
    fetch,
    lsn_of,
    plain,
    position_text,
    request,
    shop,
    signed,
    stored_text,
    token_at,
    wrap,
)

Endpoint = Callable[[Request], Awaitable[Response]]


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


def starlette(endpoint: Any, **options: Any) -> Starlette:
    routes = [Route("/", endpoint, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])]
    return Starlette(routes=routes, **options)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cookie_name": None, "header_name": None}, "both None"),
        ({"cookie_name": "two words"}, "cookie_name takes"),
        ({"cookie_name": ""}, "cookie_name takes"),
        ({"cookie_name": "a;b"}, "cookie_name takes"),
        ({"cookie_name": "a\n"}, "cookie_name takes"),
        ({"cookie_name": 1}, "cookie_name takes"),
        ({"header_name": "X:Y"}, "header_name takes"),
        ({"header_name": ""}, "header_name takes"),
        ({"header_name": "Größe"}, "header_name takes"),
        ({"path": "shop"}, "path takes"),
        ({"path": "/; Secure"}, "path takes"),
        ({"domain": "a\r\nb"}, "domain takes"),
        ({"domain": ""}, "domain takes"),
        ({"same_site": "Lax"}, "same_site takes"),
        ({"same_site": None}, "same_site takes"),
        ({"same_site": "none", "https_only": False}, "Secure"),
        ({"on_bad_token": "raise"}, "on_bad_token takes"),
        ({"write_methods": "POST"}, "write_methods takes"),
        ({"write_methods": [b"POST"]}, "write_methods takes"),
        ({"max_age": 1.5}, "below max_lag_seconds"),
        ({"max_age": 0}, "max_age"),
        ({"max_age": float("nan")}, "max_age"),
        ({"secret_key": ""}, "secret_key"),
        ({"secret_key": []}, "secret_key"),
        ({"router": None}, "router takes"),
        ({"router": "host=pg0 dbname=shop"}, "router takes"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    """Bad configuration raises ConfigurationError when the application is built."""
    given: dict[str, Any] = {"router": FakeRouter(), "secret_key": SECRET, **options}
    with pytest.raises(ConfigurationError, match=message):
        ConsistencyMiddleware(plain, **given)  # type: ignore[arg-type]


def test_max_age_may_equal_the_lag_bound() -> None:
    """A token that outlives the lag it guards by nothing is still a token that covers it."""
    app = wrap(shop(FakeRouter()), FakeRouter(max_lag_seconds=3.0), max_age=3)
    assert fetch(app, path="/about").status_code == 200


def test_keys_rotate(router: FakeRouter) -> None:
    """The last key signs and all verify."""
    app = wrap(shop(router), router, secret_key=["old", "new"])
    old = fetch(app, path="/orders", headers={HEADER: signed(1500, key="old")})
    written = fetch(app, "POST", "/order")
    assert old.text == "1500"
    assert TokenCodec("new").decode(written.headers[HEADER]) == token_at(router.lsn)


# The session of a request


def test_other_scopes_pass_through_untouched(router: FakeRouter) -> None:
    """Lifespan and unknown scopes reach the application with the very objects of the server."""
    passed: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.extend((scope, receive, send))

    async def receive() -> Message:
        raise AssertionError("nothing to receive")

    async def send(message: Message) -> None:
        raise AssertionError("nothing to send")

    for kind in ("lifespan", "something.new"):
        passed.clear()
        scope = {"type": kind}
        asyncio.run(_call(wrap(app, router), scope, receive, send))
        assert all(a is b for a, b in zip(passed, (scope, receive, send), strict=True))


async def _call(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def test_lifespan_runs_under_the_middleware(router: FakeRouter) -> None:
    """Start-up and shutdown of a wrapped Starlette application work as before."""
    incoming: list[Message] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    exchange = Exchange(wrap(shop(router), router))
    sent = asyncio.run(exchange("lifespan", incoming=incoming))
    assert [message["type"] for message in sent] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]


def test_the_session_is_gone_after_the_request(router: FakeRouter) -> None:
    """Neither an answered nor a failed request leaves its session in the caller's context."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        router.write()
        if scope["path"] == "/fail":
            raise RuntimeError("no")
        await plain(send)

    async def scenario() -> None:
        with Session(token_at(1)) as outside:
            await Exchange(wrap(app, router))()
            assert current_session() is outside
            with pytest.raises(RuntimeError, match="no"):
                await Exchange(wrap(app, router))(path="/fail")
            assert current_session() is outside
            assert outside.token == token_at(1)

    asyncio.run(scenario())


def test_concurrent_requests_do_not_mix(router: FakeRouter) -> None:
    """Each of many overlapping requests sees its own token, before and after it had to wait."""
    everyone_is_in = asyncio.Event()
    inside = 0

    async def endpoint(request: Request) -> Response:
        nonlocal inside
        before = current_session().token
        inside += 1
        if inside == 200:
            everyone_is_in.set()
        await everyone_is_in.wait()
        current_session().advance(token_at(int(position_text(before)) + 1000))
        return PlainTextResponse(position_text(current_session().token))

    async def scenario() -> list[tuple[int, int]]:
        app = wrap(starlette(endpoint), router)
        responses = await asyncio.gather(
            *(request(app, headers={HEADER: signed(number)}) for number in range(1, 201))
        )
        return [(int(each.text), lsn_of(each.headers[HEADER])) for each in responses]

    expected = [(number + 1000, number + 1000) for number in range(1, 201)]
    assert asyncio.run(scenario()) == expected
    assert router.not_sent == []


def test_a_sync_endpoint_in_a_thread_advances_the_session(router: FakeRouter) -> None:
    """What a thread pool endpoint writes is sent."""
    loop_thread = threading.get_ident()

    def endpoint(request: Request) -> Response:
        assert threading.get_ident() != loop_thread
        return PlainTextResponse(str(router.write()))

    response = fetch(wrap(starlette(endpoint), router), "POST")
    assert lsn_of(response.headers[HEADER]) == int(response.text)
    assert router.captures == 0


def test_a_handler_below_another_base_http_middleware_advances_the_session(
    router: FakeRouter,
) -> None:
    """A middleware that runs the application in a task of its own hides nothing."""

    async def dispatch(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(str(router.write()))

    app = starlette(endpoint, middleware=[Middleware(BaseHTTPMiddleware, dispatch=dispatch)])
    response = fetch(wrap(app, router), "POST")
    assert lsn_of(response.headers[HEADER]) == int(response.text)


def test_child_tasks_advance_the_session(router: FakeRouter) -> None:
    """Writes that a handler gathers from several tasks are all sent."""

    async def write(system: int) -> None:
        await asyncio.sleep(0)
        current_session().advance(token_at(router.commit(), system=system))

    async def endpoint(request: Request) -> Response:
        await asyncio.gather(*(write(system) for system in (1, 2, 3)))
        return PlainTextResponse("ok")

    response = fetch(wrap(starlette(endpoint), router))
    lsns = {lsn_of(response.headers[HEADER], system=system) for system in (1, 2, 3)}
    assert lsns == {1001, 1002, 1003}


def test_fastapi_works(router: FakeRouter) -> None:
    """Endpoints, dependencies of function scope and HTTP exceptions of FastAPI are covered."""
    app = FastAPI()

    async def unit_of_work() -> AsyncIterator[str]:
        yield "open"
        router.write()

    @app.post("/order")
    async def order(work: str = Depends(unit_of_work, scope="function")) -> str:
        return work

    @app.get("/missing")
    def missing() -> None:
        router.write()
        raise FastAPIHTTPException(404, "no such order")

    wrapped = wrap(app, router)
    written = fetch(wrapped, "POST", "/order")
    assert (written.json(), lsn_of(written.headers[HEADER])) == ("open", 1001)
    missed = fetch(wrapped, path="/missing")
    assert (missed.status_code, lsn_of(missed.headers[HEADER])) == (404, 1002)
    assert router.not_sent == []


def test_it_works_as_an_added_middleware(router: FakeRouter) -> None:
    """The class goes into Starlette's middleware list as well."""

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(str(router.write()))

    middleware = [Middleware(ConsistencyMiddleware, router=router, secret_key=SECRET)]
    response = fetch(starlette(endpoint, middleware=middleware), "POST")
    assert lsn_of(response.headers[HEADER]) == int(response.text)


def test_every_message_passes_in_order(router: FakeRouter) -> None:
    """The start goes out once and at once; early hints, body parts and trailers are left alone."""
    messages: list[Message] = [
        {"type": "http.response.early_hint", "links": []},
        {"type": "http.response.start", "status": 200, "headers": [], "trailers": True},
        {"type": "http.response.body", "body": b"1", "more_body": True},
        {"type": "http.response.body", "body": b"2"},
        {"type": "http.response.trailers", "headers": []},
    ]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        router.write()
        for message in messages:
            await send(message)

    sent = asyncio.run(Exchange(wrap(app, router))())
    assert [message["type"] for message in sent] == [message["type"] for message in messages]
    assert all(a is b for a, b in zip(sent, messages, strict=True) if "start" not in a["type"])
    assert {**sent[1], "headers": []} == messages[1]
    assert messages[1]["headers"] == []


def test_a_second_start_is_the_applications_own_mistake(router: FakeRouter) -> None:
    """Only the first start is completed; what follows goes to the server as it is."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await plain(send)
        router.write()
        await plain(send, status=500)

    sent = asyncio.run(Exchange(wrap(app, router))(method="POST"))
    assert sent[2] == {"type": "http.response.start", "status": 500, "headers": []}
    assert router.captures == 1
    assert router.not_sent == [TokenNotSent(token_at(1001))]


def test_an_untouched_request_sends_the_very_messages_of_the_application(
    router: FakeRouter,
) -> None:
    """Without a token and without an advance nothing is copied or added."""
    start: Message = {"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start)

    headers = [(b"host", b"shop.test"), (b"cookie", b"session=abc; theme=dark")]
    sent = asyncio.run(Exchange(wrap(app, router))(headers=headers))
    assert len(sent) == 1
    assert sent[0] is start


# Applications with an engine of their own


def own_engine(router: Any) -> Starlette:
    async def endpoint(request: Request) -> Response:
        router.lsn += 1
        return PlainTextResponse(str(router.lsn), status_code=int(request.query_params["status"]))

    return starlette(endpoint)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("status", [200, 303, 404, 500])
def test_a_write_method_is_captured(router: FakeRouter, method: str, status: int) -> None:
    """The response to a write method carries the primary's position, whatever its status."""
    response = fetch(wrap(own_engine(router), router), method, f"/?status={status}")
    assert lsn_of(response.headers[HEADER]) == int(response.text)
    assert stored_text(response) == response.headers[HEADER]
    assert router.captures == 1


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_other_methods_are_not_captured(router: FakeRouter, method: str) -> None:
    """A GET costs no statement on the primary."""
    response = fetch(wrap(own_engine(router), router), method, "/?status=200")
    assert (HEADER in response.headers, router.captures) == (False, 0)


def test_write_methods_can_be_chosen(router: FakeRouter) -> None:
    """``write_methods`` replaces the default, in upper or lower case."""
    app = wrap(own_engine(router), router, write_methods=["get"])
    assert HEADER in fetch(app, "GET", "/?status=200").headers
    assert HEADER not in fetch(app, "POST", "/?status=200").headers


def test_a_write_through_the_router_needs_no_capture(router: FakeRouter) -> None:
    """`router.write()` knows its position, so no second one is taken."""
    response = fetch(wrap(shop(router), router), "POST", "/order")
    assert lsn_of(response.headers[HEADER]) == int(response.text)
    assert router.captures == 0


def test_a_position_that_only_came_in_does_not_replace_the_capture(router: FakeRouter) -> None:
    """A token of an earlier write says nothing about this request's."""
    app = wrap(own_engine(router), router)
    response = fetch(app, "POST", "/?status=200", headers={HEADER: signed(900)})
    assert lsn_of(response.headers[HEADER]) == int(response.text)


def test_a_blocking_capture_runs_off_the_event_loop() -> None:
    """A router that blocks is asked in a thread, and advances the session of the request."""
    router = BlockingFakeRouter()
    response = fetch(wrap(own_engine(router), router), "POST", "/?status=200")
    assert lsn_of(response.headers[HEADER]) == int(response.text)
    assert len(router.threads) == 1
    assert router.threads[0] != threading.get_ident()


def test_the_capture_finds_the_session_from_a_foreign_context(router: FakeRouter) -> None:
    """A response that is sent by a task outside the request's context still gets its token."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.create_task(plain(send), context=empty)

    empty = copy_context()
    sent = asyncio.run(Exchange(wrap(app, router))(method="POST"))
    texts = [value.decode() for name, value in sent[0]["headers"] if name == b"x-consistency-token"]
    assert [lsn_of(text) for text in texts] == [router.lsn]


def test_a_pin_is_sent_when_the_position_is_unknown(router: FakeRouter) -> None:
    """If the capture could only pin the session, the client carries the pin."""

    async def capture() -> None:
        current_session().pin(4_000_000_000.0)

    router.capture = capture  # type: ignore[method-assign]
    response = fetch(wrap(own_engine(router), router), "POST", "/?status=200")
    token = TokenCodec(SECRET).decode(response.headers[HEADER])
    assert token == Token(pin_until=4_000_000_000.0)


# Errors


def failing(router: FakeRouter, error: Exception) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        router.write()
        raise error

    return endpoint


def test_an_unhandled_exception_still_sends_the_token_when_wrapped_outermost(
    router: FakeRouter,
) -> None:
    """A handler that commits and then raises gives a 500 with the token of the commit."""
    app = wrap(starlette(failing(router, ValueError("after the commit"))), router)
    response = fetch(app, "POST")
    assert (response.status_code, lsn_of(response.headers[HEADER])) == (500, router.lsn)
    assert router.not_sent == []


def test_an_unhandled_exception_below_an_added_middleware_is_reported(router: FakeRouter) -> None:
    """Where the 500 is made outside, its client gets no token, and that is said."""
    middleware = [Middleware(ConsistencyMiddleware, router=router, secret_key=SECRET)]
    endpoint = failing(router, ValueError("after the commit"))
    response = fetch(starlette(endpoint, middleware=middleware), "POST")
    assert (response.status_code, HEADER in response.headers) == (500, False)
    assert router.not_sent == [TokenNotSent(token_at(router.lsn))]


@pytest.mark.parametrize("status", [400, 404, 503])
def test_http_exceptions_carry_the_token(router: FakeRouter, status: int) -> None:
    """An error response made from an HTTPException carries the token of what was committed."""
    app = wrap(starlette(failing(router, HTTPException(status))), router)
    response = fetch(app, "POST")
    assert (response.status_code, lsn_of(response.headers[HEADER])) == (status, router.lsn)


def test_other_exceptions_propagate_unchanged(router: FakeRouter) -> None:
    """The server sees the application's exception, the same object."""
    error = ValueError("mine")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    with pytest.raises(ValueError, match="mine") as caught:
        asyncio.run(Exchange(wrap(app, router))(method="POST"))
    assert caught.value is error
    assert router.events == []


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (2.01, "3")])
def test_the_fallback_limit_becomes_a_503(router: FakeRouter, seconds: float, header: str) -> None:
    """A read that the guarded primary refuses is answered with 503, Retry-After and the token."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        router.write()
        raise FallbackLimitError(4, seconds)

    response = fetch(wrap(app, router))
    assert (response.status_code, response.headers["retry-after"]) == (503, header)
    assert response.text == f"The database is busy. Try again in {header} s.\n"
    assert response.headers["content-length"] == str(len(response.content))
    assert lsn_of(response.headers[HEADER]) == router.lsn
    assert router.not_sent == []


def test_a_refused_write_method_is_captured(router: FakeRouter) -> None:
    """A POST whose later read was refused may have committed before: its 503 has the position."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        router.commit()
        raise FallbackLimitError(4, 1.0)

    response = fetch(wrap(app, router), "POST")
    assert (response.status_code, lsn_of(response.headers[HEADER])) == (503, router.lsn)


def test_the_fallback_limit_after_the_start_propagates(router: FakeRouter) -> None:
    """A response that has started cannot become another one."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await plain(send)
        raise FallbackLimitError(4, 1.0)

    exchange = Exchange(wrap(app, router))
    with pytest.raises(FallbackLimitError):
        asyncio.run(exchange())
    assert [message["type"] for message in exchange.sent] == [
        "http.response.start",
        "http.response.body",
    ]


# Positions that come too late


def test_a_write_in_a_streamed_body_is_reported(router: FakeRouter) -> None:
    """A position reached after the response has started gives the event TokenNotSent."""

    async def body() -> AsyncIterator[str]:
        yield "one"
        router.write()
        yield "two"

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(body())

    response = fetch(wrap(starlette(endpoint), router))
    assert (response.text, HEADER in response.headers) == ("onetwo", False)
    assert router.not_sent == [TokenNotSent(token_at(1001))]


def test_a_write_in_a_streamed_body_of_a_thread_is_reported(router: FakeRouter) -> None:
    """The same holds for a body that a thread pool produces."""

    def body() -> Iterator[str]:
        yield "one"
        router.write()

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(body())

    fetch(wrap(starlette(endpoint), router))
    assert router.not_sent == [TokenNotSent(token_at(1001))]


def test_a_write_in_a_background_task_is_reported(router: FakeRouter) -> None:
    """What a background task commits cannot be sent; what came before it was sent."""

    async def endpoint(request: Request) -> Response:
        written = router.write()
        return PlainTextResponse(str(written), background=BackgroundTask(router.write))

    response = fetch(wrap(starlette(endpoint), router), "POST")
    assert lsn_of(response.headers[HEADER]) == int(response.text) == 1001
    assert router.not_sent == [TokenNotSent(token_at(1002))]


def test_a_late_dependency_of_fastapi_is_reported(router: FakeRouter) -> None:
    """A dependency that commits after its yield, in the default scope, does it too late."""
    app = FastAPI()

    async def unit_of_work() -> AsyncIterator[None]:
        yield
        router.write()

    @app.get("/")
    async def endpoint(work: None = Depends(unit_of_work)) -> str:
        return "ok"

    response = fetch(wrap(app, router))
    assert HEADER not in response.headers
    assert router.not_sent == [TokenNotSent(token_at(1001))]


def test_each_late_advance_is_reported_once(router: FakeRouter) -> None:
    """Every later advance gives one event; a position that the session holds already gives none."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        router.write()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        current_session().advance(token_at(500))
        router.write()
        router.write()
        await send({"type": "http.response.body", "body": b""})

    asyncio.run(Exchange(wrap(app, router))())
    assert router.not_sent == [TokenNotSent(token_at(1002)), TokenNotSent(token_at(1003))]


def test_an_advance_while_the_start_is_being_sent_is_reported(router: FakeRouter) -> None:
    """Between the choice of the token and the end of the send nothing is lost in silence."""

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            router.write()

    async def receive() -> Message:
        raise AssertionError("nothing to receive")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await plain(send)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asyncio.run(_call(wrap(app, router), scope, receive, send))
    assert router.not_sent == [TokenNotSent(token_at(1001))]


def test_an_application_that_sends_no_response_is_reported(router: FakeRouter) -> None:
    """A write whose response never started is as lost to the client as a late one."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        router.write()

    asyncio.run(Exchange(wrap(app, router))())
    assert router.not_sent == [TokenNotSent(token_at(1001))]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_is_reported_when_all_was_sent(router: FakeRouter, method: str) -> None:
    """A request whose positions all went out, or that had none, gives no event."""

    async def body() -> AsyncIterator[str]:
        yield "one"
        yield "two"

    async def endpoint(request: Request) -> Response:
        if request.method == "POST":
            router.write()
        return StreamingResponse(body())

    app = wrap(starlette(endpoint), router)
    assert fetch(app, method, headers={HEADER: signed(900)}).text == "onetwo"
    assert router.events == []


def test_a_pooled_connection_serves_many_requests(router: FakeRouter) -> None:
    """A client that follows the header alone reads every one of its own writes."""
    app = wrap(shop(router), router, cookie_name=None)

    async def scenario() -> list[tuple[str, str]]:
        pairs = []
        async with client(app) as http:
            for _ in range(20):
                written = await http.post("/order")
                seen = await http.get("/orders", headers={HEADER: written.headers[HEADER]})
                pairs.append((written.text, seen.text))
        return pairs

    assert asyncio.run(scenario()) == [(str(lsn), str(lsn)) for lsn in range(1001, 1021)]
