"""Tokens that must not be believed, through the whole middleware."""

from __future__ import annotations

import asyncio
import random
import re
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator

import itsdangerous
import pytest
from starlette.types import Message, Receive, Scope, Send

from lsn_consistency.events import Event, TokenRejected
from lsn_consistency.exceptions import (
    BadSignatureError,
    MalformedTokenError,
    TokenExpiredError,
)
from lsn_consistency.propagation import inject
from lsn_consistency.session import current_session
from lsn_consistency.tokens import Token, TokenCodec
from tests.asgi.fake_router import (
    HEADER,
    SECRET,
    Exchange,
    FakeRouter,
    cookie_header,
    fetch,
    plain,
    shop,
    signed,
    stored,
    stored_text,
    token_at,
    wrap,
)

SEED = 20
GENERATED = 100_000
VALID = signed(1500)
ALPHABET = string.ascii_letters + string.digits + "-_."

Maker = Callable[[random.Random], str]


def one_character_changed(rng: random.Random) -> str:
    index = rng.randrange(len(VALID))
    return VALID[:index] + rng.choice(ALPHABET) + VALID[index + 1 :]


def characters_moved(rng: random.Random) -> str:
    first, second = sorted(rng.sample(range(len(VALID)), 2))
    return VALID[:first] + VALID[second:] + VALID[first:second]


def cut(rng: random.Random) -> str:
    return VALID[: rng.randrange(1, len(VALID))]


def lengthened(rng: random.Random) -> str:
    index = rng.randrange(len(VALID) + 1)
    return VALID[:index] + "".join(rng.choices(ALPHABET, k=rng.randrange(1, 9))) + VALID[index:]


def of_the_right_shape(rng: random.Random) -> str:
    lengths = (rng.randrange(1, 90), 6, 43)
    return ".".join("".join(rng.choices(ALPHABET[:-1], k=length)) for length in lengths)


def of_two_tokens(rng: random.Random) -> str:
    parts = zip(VALID.split("."), OTHERS[rng.randrange(len(OTHERS))].split("."), strict=True)
    return ".".join(rng.choice(pair) for pair in parts)


def random_bytes(rng: random.Random) -> str:
    return rng.randbytes(rng.randrange(1, 200)).decode("latin-1")


def not_ascii(rng: random.Random) -> str:
    return VALID[:10] + "".join(chr(rng.randrange(128, 256)) for _ in range(9)) + VALID[10:]


def of_another_signer(rng: random.Random) -> str:
    return rng.choice(FOREIGN)


def too_long(rng: random.Random) -> str:
    return VALID * rng.randrange(10, 40)


MAKERS: tuple[Maker, ...] = (
    one_character_changed,
    characters_moved,
    cut,
    lengthened,
    of_the_right_shape,
    of_two_tokens,
    random_bytes,
    not_ascii,
    of_another_signer,
    too_long,
)

OTHERS = [signed(lsn, key=key) for lsn in (1, 1500, 9000) for key in ("another key", SECRET[:-1])]
_PAYLOAD = VALID.split(".", maxsplit=1)[0]
FOREIGN = [
    *OTHERS,
    itsdangerous.TimestampSigner(SECRET).sign(_PAYLOAD).decode(),
    itsdangerous.TimestampSigner(SECRET, salt="lsn_consistency").sign(_PAYLOAD).decode(),
    itsdangerous.Signer(SECRET).sign(_PAYLOAD).decode(),
    itsdangerous.URLSafeTimedSerializer(SECRET).dumps({"lsn": 1500}),
]


def bad_texts(seed: int, count: int) -> Iterator[str]:
    """Yield texts none of whose parts, in whichever carrier, is the valid token itself."""
    rng = random.Random(seed)
    for number in range(count):
        text = VALID
        while VALID in map(str.strip, re.split("[,;]", text)):
            text = MAKERS[number % len(MAKERS)](rng)
        yield text


def raw_header(text: str, *, cookie: bool) -> tuple[bytes, bytes]:
    value = text.encode("latin-1")
    return (
        (b"cookie", b"consistency_token-a=" + value) if cookie else (HEADER.lower().encode(), value)
    )


def at_age(monkeypatch: pytest.MonkeyPatch, seconds: float) -> str:
    """Return a genuine token that was signed ``seconds`` ago."""
    now = time.time()
    with monkeypatch.context() as patched:
        patched.setattr("itsdangerous.timed.time.time", lambda: now - seconds)
        return signed(1500)


def test_100_000_bad_tokens_are_harmless() -> None:
    """No generated token is accepted or makes an error, alone or beside a valid one."""
    statuses: Counter[int] = Counter()
    tokens: Counter[Token] = Counter()
    sent: Counter[Token] = Counter()
    rejected: Counter[str] = Counter()

    class Counting(FakeRouter):
        def emit(self, event: Event) -> None:
            assert isinstance(event, TokenRejected)
            rejected[event.carrier] += 1

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tokens[current_session().token] += 1
        await plain(send)

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses[message["status"]] += 1
            for name, value in message["headers"]:
                if name == HEADER.lower().encode():
                    sent[TokenCodec(SECRET).decode(value.decode())] += 1

    async def receive() -> Message:
        raise AssertionError("nothing to receive")

    async def run() -> None:
        wrapped = wrap(app, Counting())
        genuine = (b"cookie", f"consistency_token-b={VALID}".encode())
        for number, text in enumerate(bad_texts(SEED, GENERATED)):
            headers = [raw_header(text, cookie=number // len(MAKERS) % 2 == 0)]
            if number // len(MAKERS) % 3 == 0:
                headers.append(genuine)
            scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
            await wrapped(scope, receive, send)

    asyncio.run(run())
    beside = sum(number // len(MAKERS) % 3 == 0 for number in range(GENERATED))
    assert statuses == {200: GENERATED}
    assert tokens == {Token(): GENERATED - beside, token_at(1500): beside}
    # A header value with several commas brings so many tokens that the genuine one is sent again.
    assert set(sent) <= {token_at(1500)}
    assert min(rejected["header"], rejected["cookie"]) > GENERATED * 0.45


@pytest.mark.parametrize(
    ("age", "error"),
    [(3600 + 60, TokenExpiredError), (-3600, TokenExpiredError), (3000, None), (-100, None)],
)
def test_age_is_judged(
    monkeypatch: pytest.MonkeyPatch, age: float, error: type[Exception] | None
) -> None:
    """A genuine token is left out once it is too old, or too far ahead of the clock."""
    router = FakeRouter()
    headers = {HEADER: at_age(monkeypatch, age)}
    response = fetch(wrap(shop(router), router), path="/orders", headers=headers)
    assert response.text == ("1500" if error is None else "0")
    assert [type(each.error) for each in router.rejected] == ([] if error is None else [error])


@pytest.mark.parametrize("carrier", ["header", "cookie"])
@pytest.mark.parametrize(
    ("text", "error"),
    [("bad", MalformedTokenError), (signed(1, key="another key"), BadSignatureError)],
    ids=["malformed", "another key"],
)
def test_a_bad_token_is_reported_with_its_carrier(
    carrier: str, text: str, error: type[Exception]
) -> None:
    """The event TokenRejected says what was wrong and where it was found."""
    router = FakeRouter()
    headers = {HEADER: text} if carrier == "header" else cookie_header(text)
    assert fetch(wrap(shop(router), router), path="/orders", headers=headers).text == "0"
    assert [(type(each.error), each.carrier) for each in router.rejected] == [(error, carrier)]


def test_the_cost_of_a_huge_value_is_its_length() -> None:
    """Values of a megabyte, in the worst shapes, take no more than a moment."""
    router = FakeRouter()
    million = 1_000_000
    shapes = [
        b"," * million,
        b"a," * (million // 2),
        b"A" * million,
        b"." * million,
        b";" * million,
        b"; " * (million // 2),
        b" " * million,
        b"consistency_token" * (million // 17),
        b"consistency_token=;" * (million // 19),
        b"consistency_token-" + b"a" * million,
        b";\t \t" * (million // 4) + b"consistency_token=a",
    ]
    started = time.perf_counter()
    for shape in shapes:
        for name in (b"cookie", b"x-consistency-token"):
            asyncio.run(Exchange(wrap(plain_app, router))(headers=[(name, shape)]))
    assert time.perf_counter() - started < 5.0
    assert len(router.rejected) < 40 * len(shapes) * 2


async def plain_app(scope: Scope, receive: Receive, send: Send) -> None:
    await plain(send)


# What on_bad_token makes of them


def pin_seen(router: FakeRouter, headers: list[tuple[bytes, bytes]]) -> tuple[Token, list[Message]]:
    seen: list[Token] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(router.read())
        await plain(send)

    wrapped = wrap(app, router, on_bad_token="primary")
    sent = asyncio.run(Exchange(wrapped)(headers=headers))
    return seen[0], sent


def test_a_bad_token_pins_the_request_to_the_primary() -> None:
    """With ``on_bad_token="primary"`` the reads of the request go to the primary."""
    router = FakeRouter()
    before = time.time()
    token, _ = pin_seen(router, [raw_header("bad", cookie=False)])
    assert token.pin_until is not None
    assert token.pin_until - router.settings.pin_seconds >= before
    assert token.positions == {}


def test_no_token_and_good_tokens_do_not_pin() -> None:
    """Only a token that does not verify pins; a request without one goes on as usual."""
    router = FakeRouter()
    assert pin_seen(router, [])[0] == Token()
    assert pin_seen(router, [raw_header(VALID, cookie=True)])[0] == token_at(1500)
    assert pin_seen(router, [raw_header("", cookie=True)])[0] == Token()


def test_a_bad_token_does_not_mint_a_pin() -> None:
    """The pin of a bad token stays in the request: nothing signed comes of it."""
    router = FakeRouter()
    _, sent = pin_seen(router, [raw_header("bad", cookie=False)])
    assert sent[0]["headers"] == [(b"vary", b"Cookie, X-Consistency-Token")]
    app = wrap(shop(router), router, on_bad_token="primary")
    for method, path in (("POST", "/order"), ("GET", "/orders?causal")):
        response = fetch(app, method, path, headers=cookie_header("bad"))
        token = TokenCodec(SECRET).decode(stored_text(response))
        assert token == token_at(router.lsn)


def test_many_bad_cookies_do_not_mint_a_pin() -> None:
    """Clearing away many bad cookies signs nothing either."""
    router = FakeRouter()
    app = wrap(shop(router), router, on_bad_token="primary")
    response = fetch(app, path="/orders", headers=cookie_header(*["bad"] * 40))
    assert (stored(response), HEADER in response.headers) == ([], False)


def test_a_genuine_pin_is_sent_beside_a_bad_token() -> None:
    """A pin that the request itself needs goes out, even one shorter than the bad token's."""
    router = FakeRouter()
    genuine = time.time() + 1.0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        current_session().pin(genuine)
        await plain(send)

    response = fetch(wrap(app, router, on_bad_token="primary"), headers={HEADER: "bad"})
    assert TokenCodec(SECRET).decode(response.headers[HEADER]) == Token(pin_until=genuine)


def test_a_genuine_pin_that_came_in_is_kept() -> None:
    """The pin of a valid token survives beside a bad one, and is no advance by itself."""
    router = FakeRouter()
    pinned = TokenCodec(SECRET).encode(token_at(900, pin_until=4_000_000_000.0))
    app = wrap(shop(router), router, on_bad_token="primary")
    headers = cookie_header(pinned, "bad")
    assert stored(fetch(app, path="/orders", headers=headers)) == []
    written = TokenCodec(SECRET).decode(stored_text(fetch(app, "POST", "/order", headers=headers)))
    assert written == token_at(router.lsn, pin_until=4_000_000_000.0)


def test_calls_made_during_a_pinned_request_are_pinned_too() -> None:
    """`inject` hands on what the reads of this unit of work must reach, its pin included."""
    router = FakeRouter()
    carriers: list[dict[str, str]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        carriers.append({})
        inject(carriers[0])
        assert TokenCodec(SECRET).decode(carriers[0][HEADER]) == current_session().token
        await plain(send)

    assert fetch(wrap(app, router, on_bad_token="primary"), headers={HEADER: "bad"}).is_success
