"""The token between services and into jobs, over a real cluster."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lsn_consistency import (
    Reason,
    Session,
    TokenCodec,
    extract,
    inject,
)
from lsn_consistency.exceptions import BadSignatureError, TokenError
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import CALL_SECONDS, App, Kind
from tests.cluster.web import (
    CODEC,
    PATIENT,
    Look,
    Store,
    Web,
    open_web,
    shop,
)


def pause(pg: EmbeddedCluster) -> None:
    for replica in pg.replicas.values():
        replica.pause_replay()


@contextmanager
def two_services(kind: Kind, pg: EmbeddedCluster, *, passing: bool = True) -> Iterator[Web]:
    """
    Serve a front service whose handlers call a back service; each has a router of its own.
    """
    with open_web(kind, pg, **PATIENT) as back:

        async def call_back(method: str, path: str) -> httpx.Response:
            headers: dict[str, str] = {}
            if passing:
                inject(headers)
            response = await in_back(back, method, path, headers)
            if passing:
                extract(response.headers)
            return response.raise_for_status()

        def front(store: Store) -> Starlette:
            async def write_here_read_there(request: Request) -> Response:
                await store.add(1)
                return JSONResponse((await call_back("GET", "/items")).json())

            async def write_there_read_here(request: Request) -> Response:
                await call_back("POST", "/items/2")
                return JSONResponse(await store.look())

            async def write_there(request: Request) -> Response:
                await call_back("POST", "/items/3")
                return JSONResponse({})

            # All three are GETs: the middleware takes no position by itself.
            return shop(
                store,
                Route("/read-there", write_here_read_there),
                Route("/read-here", write_there_read_here),
                Route("/write-there", write_there),
            )

        with open_web(kind, pg, front, **PATIENT) as web:
            yield web


async def in_back(back: Web, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    """Send a request to a service that runs on another loop, from this one."""
    client = back.browser(cookies=False)
    future = back.start(client.send(method, path, headers=headers))
    return await asyncio.wrap_future(future)


def test_the_token_travels_through_services(kind: Kind, pg: EmbeddedCluster, table: str) -> None:
    """What one service wrote the other reads, in both directions, and so does the client."""
    with two_services(kind, pg) as web:
        clients = [web.browser() for _ in range(3)]
        pause(pg)
        there = clients[0].look("/read-there")
        here = clients[1].look("/read-here")
        clients[2].get("/write-there").raise_for_status()
        mine = clients[2].look()
    primary = pg.primary.port
    assert Look([1], primary, Reason.NOT_CAUGHT_UP) == there
    assert Look([1, 2], primary, Reason.NOT_CAUGHT_UP) == here
    assert Look([1, 2, 3], primary, Reason.NOT_CAUGHT_UP) == mine


def test_without_the_token_services_miss_writes(
    kind: Kind, pg: EmbeddedCluster, table: str
) -> None:
    """The same calls without inject and extract are stale: the header is what does it."""
    with two_services(kind, pg, passing=False) as web:
        pause(pg)
        there, here = web.browser().look("/read-there"), web.browser().look("/read-here")
    assert ([], []) == (there.ids, here.ids)


class Worker:
    """
    Run jobs from a queue in a thread, each in a session of its own.
    """

    def __init__(self, app: App, statement: str) -> None:
        self.app = app
        self.statement = statement
        self.answers: queue.Queue[tuple[Any, int, str]] = queue.Queue()
        self.errors: list[TokenError] = []
        self.jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.thread = threading.Thread(target=self.run, name="worker")

    def run(self) -> None:
        while (message := self.jobs.get(timeout=CALL_SECONDS)) is not None:
            with Session(codec=CODEC):
                extract(message["headers"], on_error=self.errors.append)
                answer = self.app.ask(self.statement)
            self.answers.put((answer.value, answer.port, answer.route.reason))

    def __enter__(self) -> Worker:
        self.thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.jobs.put(None)
        self.thread.join(CALL_SECONDS)

    def answer(self, message: dict[str, Any]) -> tuple[Any, int, str]:
        self.jobs.put(message)
        return self.answers.get(timeout=CALL_SECONDS)


def test_a_job_sees_what_its_sender_wrote(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """A message carries the token to a worker thread; the next job starts from nothing again."""
    message: dict[str, Any] = {"task": "invoice", "headers": {}}
    replicas = {node.port for node in pg.replicas.values()}
    with opened(**PATIENT) as app, Worker(app, f"SELECT count(*) FROM {table}") as worker:
        pause(pg)
        with Session(codec=CODEC):
            app.write(f"INSERT INTO {table} VALUES (1)")
            inject(message["headers"])
        informed = worker.answer(message)
        without = worker.answer({"task": "report", "headers": {}})
    assert (1, pg.primary.port, Reason.NOT_CAUGHT_UP) == informed
    assert (0, True, Reason.WITHIN_LAG) == (without[0], without[1] in replicas, without[2])
    assert [] == worker.errors


def test_a_forged_job_stops_no_worker(opened: OpenRouter, pg: EmbeddedCluster, table: str) -> None:
    """A message whose token does not verify is worked on as one without, and reported."""
    forged: dict[str, Any] = {}
    with opened(**PATIENT) as app, Worker(app, f"SELECT count(*) FROM {table}") as worker:
        with Session(app.token(), codec=TokenCodec("another key that is long enough too")):
            inject(forged)
        answer = worker.answer({"headers": forged})
    assert (0, Reason.WITHIN_LAG) == (answer[0], answer[2])
    assert [BadSignatureError] == [type(error) for error in worker.errors]


def test_a_result_brings_the_workers_writes_back(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """What a worker wrote is in the token of its result, whatever the sender had before."""
    result: dict[str, Any] = {}

    def work(app: App) -> None:
        with Session(codec=CODEC):
            app.write(f"INSERT INTO {table} VALUES (1)")
            inject(result)

    with opened(**PATIENT) as app:
        pause(pg)
        thread = threading.Thread(target=work, args=[app], name="scenario")
        thread.start()
        thread.join(CALL_SECONDS)
        before = app.ask(f"SELECT count(*) FROM {table}")
        with Session(codec=CODEC) as session:
            token = extract(result)
            after = app.ask(f"SELECT count(*) FROM {table}")
    assert (0, 1, pg.primary.port) == (before.value, after.value, after.port)
    assert session.token.merge(token) == session.token
