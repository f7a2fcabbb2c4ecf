"""One endpoint that hides two servers, as DNS, a proxy or a reader endpoint does."""

from __future__ import annotations

import itertools
import time

import pytest
from psycopg.conninfo import make_conninfo

from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App

READS = 500
TOKEN_EVERY = 10
FOUND_SECONDS = 60.0


@pytest.fixture
def endpoint(pg: EmbeddedCluster) -> str:
    """Offer a conninfo that leads to either replica, as chance has it."""
    ports = ",".join(str(replica.port) for replica in pg.replicas.values())
    one = next(iter(pg.replicas.values())).conninfo
    return make_conninfo(one, host="127.0.0.1,127.0.0.1", port=ports, load_balance_hosts="random")


def test_behind_one_endpoint_the_paused_server_is_never_read_stale(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, endpoint: str
) -> None:
    """One conninfo hides two servers, one paused: 0 stale in 500 reads, the running one serves."""
    paused, running = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with opened(replicas={"readers": endpoint}, wait_seconds=1.0) as app:
        paused.pause_replay()
        answers = _reads(app, table, READS)
        _read_until_served(app, table, answers, running.port)
    assert [] == [answer for answer in answers if answer[0] is not True]
    assert 0 == _served(answers, paused.port)
    assert _served(answers, running.port) > 20


def test_behind_one_endpoint_the_servers_may_change_their_parts(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, endpoint: str
) -> None:
    """The paused server runs again and the other one pauses: nothing stale, the other serves."""
    first, second = pg.replicas.values()
    with opened(replicas={"readers": endpoint}, wait_seconds=1.0) as app:
        first.pause_replay()
        answers: list[list[tuple[bool, int]]] = [[], []]
        _read_until_served(app, table, answers[0], second.port)
        first.resume_replay()
        second.pause_replay()
        _read_until_served(app, table, answers[1], first.port, first_row=100_000)
    assert {True} == {fresh for part in answers for fresh, _ in part}
    assert (0, 0) == (_served(answers[0], first.port), _served(answers[1], second.port))
    assert _served(answers[0], second.port) > 20
    assert _served(answers[1], first.port) > 20


def test_behind_one_endpoint_a_server_may_stop(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, endpoint: str
) -> None:
    """One of two hidden servers stops while the other is read: the reads that come go on."""
    stopped, running = pg.replicas.values()
    with opened(replicas={"readers": endpoint}, wait_seconds=1.0) as app:
        answers = _reads(app, table, 50)
        stopped.stop("immediate")
        answers += _reads(app, table, 150, first_row=1000)
    assert {True} == {fresh for fresh, _ in answers}
    served = [port for _, port in answers[50:]]
    assert 0 == served.count(stopped.port)
    assert served.count(running.port) > 50


def _read_until_served(
    app: App, table: str, answers: list[tuple[bool, int]], port: int, *, first_row: int = 10_000
) -> None:
    """Go on until a server is used: which one a new connection reaches is chance."""
    rows = itertools.count(first_row, TOKEN_EVERY)
    ends = time.monotonic() + FOUND_SECONDS
    while _served(answers, port) <= 20 and time.monotonic() < ends:
        answers += _reads(app, table, TOKEN_EVERY, first_row=next(rows))


def _served(answers: list[tuple[bool, int]], port: int) -> int:
    """Count the reads that the server of this port has answered."""
    return [served for _, served in answers].count(port)


def _reads(app: App, table: str, count: int, first_row: int = 0) -> list[tuple[bool, int]]:
    """Tell of each read whether it saw the newest row, and which server it came from."""
    answers = []
    for number in range(first_row, first_row + count):
        if number % TOKEN_EVERY == 0:
            app.write(f"INSERT INTO {table} VALUES (%s)", [number])
            newest, token = number, app.token()
        with app.session(token):
            found, port = app.run_read(
                lambda conn: (conn.value(f"SELECT max(id) FROM {table}"), conn.port)
            )
        answers.append((found == newest, port))
    return answers
