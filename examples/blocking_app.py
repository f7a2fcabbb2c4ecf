"""
A blocking WSGI application and a worker thread: the token by hand, with inject and extract.

Run it against a primary and two streaming replicas::

    export PRIMARY="host=pg0 dbname=shop"
    export REPLICA_1="host=pg1 dbname=shop"
    export REPLICA_2="host=pg2 dbname=shop"
    python examples/blocking_app.py --port 8000

``POST /orders`` writes an order and gives a job to the worker. The job's headers carry the token,
so the worker finds the order even on a replica. ``GET /receipts`` lists what the worker wrote, for
whoever sends the token of a response back in ``X-Consistency-Token``; the response to
``GET /receipts?wait`` is given after the worker has done all jobs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from lsn_consistency import Router, Session, TokenCodec, current_session, extract, inject

router = Router(
    primary=os.environ["PRIMARY"],
    replicas={"replica_1": os.environ["REPLICA_1"], "replica_2": os.environ["REPLICA_2"]},
    pool_options={"min_size": 2},
)
logger = logging.getLogger(__name__)
codec = TokenCodec(os.environ.get("SECRET_KEY", "for-the-example-only"))

Job = tuple[int, dict[str, str]]
jobs: queue.Queue[Job | None] = queue.Queue(maxsize=1000)
done: queue.Queue[dict[str, str]] = queue.Queue()


@contextmanager
def unit_of_work(carrier: dict[str, str]) -> Iterator[Session]:
    """Open the session of one request or job, with the token that came with it."""
    with Session(codec=codec) as session:
        extract(carrier)
        yield session


def place_order() -> dict[str, Any]:
    with router.write() as conn:
        row = conn.execute("INSERT INTO blocking_orders DEFAULT VALUES RETURNING id").fetchone()
    number = row[0] if row else 0
    headers: dict[str, str] = {}
    inject(headers)
    jobs.put((number, headers))
    return {"order": number}


def show_receipts(wait: bool) -> dict[str, Any]:
    if wait:
        jobs.join()
        while not done.empty():
            # What the worker wrote is now part of what this client has to see.
            extract(done.get())
    with router.read() as conn:
        rows = conn.execute('SELECT "order", found FROM blocking_receipts ORDER BY 1').fetchall()
    route = current_session().last_route
    return {"receipts": rows, "role": route and route.role, "reason": route and route.reason}


def work() -> None:
    while (job := jobs.get()) is not None:
        number, headers = job
        try:
            with unit_of_work(headers):
                write_receipt(number)
                reply: dict[str, str] = {}
                inject(reply)
                done.put(reply)
        except Exception:
            logger.exception("order %d has no receipt", number)
        finally:
            jobs.task_done()


def write_receipt(number: int) -> None:
    with router.read() as conn:
        found = conn.execute("SELECT FROM blocking_orders WHERE id = %s", [number]).rowcount
    with router.write() as conn:
        conn.execute("INSERT INTO blocking_receipts VALUES (%s, %s)", [number, found == 1])


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """
    Serve one request; it computes the whole body before the response starts.
    """
    with unit_of_work({"X-Consistency-Token": environ.get("HTTP_X_CONSISTENCY_TOKEN", "")}):
        if environ["REQUEST_METHOD"] == "POST":
            content = place_order()
        else:
            content = show_receipts(wait=environ.get("QUERY_STRING") == "wait")
        headers = {"Content-Type": "application/json"}
        inject(headers)
    start_response("200 OK", list(headers.items()))
    return [json.dumps(content).encode()]


class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    port = parser.parse_args().port
    with router:
        with router.write() as conn:
            conn.execute(
                "CREATE TABLE IF NOT EXISTS blocking_orders"
                " (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY)"
            )
            conn.execute(
                'CREATE TABLE IF NOT EXISTS blocking_receipts ("order" bigint, found boolean)'
            )
        worker = threading.Thread(target=work)
        worker.start()
        try:
            with make_server("127.0.0.1", port, application, Server, WSGIRequestHandler) as server:
                server.serve_forever()
        except KeyboardInterrupt:
            print("stopping")
        finally:
            jobs.put(None)
            worker.join()


if __name__ == "__main__":
    main()
