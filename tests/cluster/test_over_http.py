"""The middleware behind a real server: uvicorn on the loopback address, HTTP and websockets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.sync.client import ClientConnection, connect

from lsn_consistency import Reason, inject
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.harness import CALL_SECONDS, Kind
from tests.cluster.web import HEADER, PATIENT, Browser, Look, Store, Web, open_web, shop


@pytest.fixture
def web(kind: Kind, pg: EmbeddedCluster, table: str) -> Iterator[Web]:
    """Serve the shop with a chat that reads and writes, while both replicas are paused."""
    with open_web(kind, pg, chat, real=True, **PATIENT) as served:
        for replica in pg.replicas.values():
            replica.pause_replay()
        yield served


def chat(store: Store) -> Starlette:
    async def talk(websocket: WebSocket) -> None:
        if "write" in websocket.query_params:
            await store.add(1)
        await websocket.accept()
        async for message in websocket.iter_text():
            carrier: dict[str, Any] = {}
            if message == "write":
                await store.add(2)
                inject(carrier)
            await websocket.send_json({"token": carrier, "look": await store.look()})

    return shop(store, WebSocketRoute("/chat", talk))


@contextmanager
def talking(web: Web, path: str, headers: dict[str, str]) -> Iterator[ClientConnection]:
    uri = web.base_url.replace("http://", "ws://") + path
    with connect(
        uri, additional_headers=headers, open_timeout=CALL_SECONDS, proxy=None
    ) as connection:
        yield connection


def ask(connection: ClientConnection, message: str) -> tuple[Look, dict[str, str]]:
    """Send a message; return what the chat saw, and the carrier that it sent."""
    connection.send(message)
    answer = json.loads(connection.recv(timeout=CALL_SECONDS))
    return Look(**answer["look"]), answer["token"]


def cookie_header(client: Browser) -> dict[str, str]:
    return {"Cookie": "; ".join(f"{name}={value}" for name, value in client.cookies.items())}


def test_a_browser_over_http(web: Web, pg: EmbeddedCluster) -> None:
    """By cookies over a real connection: the primary while both lag, then a replica."""
    with web.browser() as client, web.browser() as stranger:
        client.add(1)
        looks = [client.look(), stranger.look()]
        pg.replicas["replica_1"].resume_replay()
        pg.wait_caught_up()
        looks.append(client.look())
    replica = pg.replicas["replica_1"].port
    assert Look([1], pg.primary.port, Reason.NOT_CAUGHT_UP) == looks[0]
    assert ([], Reason.WITHIN_LAG) == (looks[1].ids, looks[1].reason)
    assert Look([1], replica, Reason.CAUGHT_UP) == looks[2]


@pytest.mark.parametrize("carrier", ["cookie", "header"])
def test_a_websocket_starts_from_its_handshake(web: Web, pg: EmbeddedCluster, carrier: str) -> None:
    """What its client wrote before is read in a websocket, by the token of the handshake."""
    with web.browser(header=True) as client:
        client.add(1)
        headers = {HEADER: client.token or ""} if carrier == "header" else cookie_header(client)
    with talking(web, "/chat", headers) as informed:
        mine, _ = ask(informed, "read")
    with talking(web, "/chat", {}) as stranger:
        others, _ = ask(stranger, "read")
    assert Look([1], pg.primary.port, Reason.NOT_CAUGHT_UP) == mine
    assert ([], Reason.WITHIN_LAG) == (others.ids, others.reason)


@pytest.mark.parametrize("carrier", ["cookie", "header"])
def test_a_websocket_sends_its_token_in_accept(web: Web, pg: EmbeddedCluster, carrier: str) -> None:
    """What was written before the accept is read by the client's next request."""
    with talking(web, "/chat?write", {}) as connection:
        assert connection.response is not None
        sent = connection.response.headers
        cookies = [line.partition(";")[0] for line in sent.get_all("Set-Cookie")]
        headers = {HEADER: sent[HEADER]} if carrier == "header" else {"Cookie": cookies[0]}
    with web.browser(cookies=False) as client:
        look = client.look(headers=headers)
    assert (1, Look([1], pg.primary.port, Reason.NOT_CAUGHT_UP)) == (len(cookies), look)


def test_a_later_position_goes_over_a_message(web: Web, pg: EmbeddedCluster) -> None:
    """A write inside the websocket: its own reads see it, and so does who is given its token."""
    with talking(web, "/chat", {}) as connection:
        assert connection.response is not None
        in_accept = HEADER in connection.response.headers
        mine, carrier = ask(connection, "write")
        again, _ = ask(connection, "read")
    with web.browser(cookies=False) as client:
        informed, stranger = client.look(headers=carrier), client.look()
    primary = pg.primary.port
    assert (False, [HEADER]) == (in_accept, list(carrier))
    assert [Look([2], primary, Reason.NOT_CAUGHT_UP)] * 2 == [mine, again]
    assert Look([2], primary, Reason.NOT_CAUGHT_UP) == informed
    assert ([], Reason.WITHIN_LAG) == (stranger.ids, stranger.reason)
