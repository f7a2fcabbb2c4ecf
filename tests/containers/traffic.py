"""
What clients do while a network fails, and the faults that a host can have.

A partition closes no connection, so the statements are what an application has then: in
`run_read`, and with ``tcp_user_timeout`` in the conninfo, without which a statement that was sent
into the dark waits for a quarter of an hour.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lsn_consistency import Consistency, Reason, Token, current_session
from lsn_consistency.testing import ContainerNode
from tests.cluster.harness import App, Connection, wait_until

LIMIT_SECONDS = 20.0
"""No read and no write takes longer under any of these faults, on a busy machine either."""

AGAIN_SECONDS = 60.0
ROUNDS = 20

Change = Callable[[ContainerNode], None]
FAULTS: dict[str, tuple[Change, Change]] = {
    "disconnected": (ContainerNode.disconnect, ContainerNode.reconnect),
    "paused": (ContainerNode.pause, ContainerNode.unpause),
    "killed": (ContainerNode.kill, ContainerNode.start),
}
"""How each fault begins and ends."""


@dataclass(frozen=True)
class Seen:
    """
    What one read saw, which server gave it, why, when it began and how long it took.
    """

    count: int
    port: int
    reason: Reason
    began: float
    seconds: float


def read(app: App, table: str, token: Token | None = None, **options: Any) -> Seen:
    """
    Count the rows as a client with a token, or without one.
    """

    def count(conn: Connection) -> tuple[int, int]:
        return int(conn.value(f"SELECT count(*) FROM {table}")), conn.port

    began = time.monotonic()
    with app.session(token):
        rows, port = app.run_read(count, **options)
        route = current_session().last_route
    assert route is not None
    return Seen(rows, port, route.reason, began, time.monotonic() - began)


def write(app: App, table: str) -> Token:
    """
    Add a row as a new client, and return that client's token.
    """
    with app.session() as session:
        app.write(f"INSERT INTO {table} SELECT count(*) FROM {table}")
        return session.token


def write_and_read(app: App, table: str, rounds: int = ROUNDS) -> list[tuple[int, Seen]]:
    """
    Write and read as that many clients; return how many rows each had to see, and its read.
    """
    before = read(app, table, consistency=Consistency.STRONG).count
    found = []
    for number in range(1, rounds + 1):
        token = write(app, table)
        found.append((before + number, read(app, table, token)))
    return found


def assert_answered(reads: list[tuple[int, Seen]], ports: set[int]) -> None:
    """
    Assert that every read saw its own write, in time, from one of these servers.
    """
    assert [rows for rows, _ in reads] == [seen.count for _, seen in reads]
    assert {seen.port for _, seen in reads} <= ports
    assert max(seen.seconds for _, seen in reads) < LIMIT_SECONDS


def wait_used(app: App, table: str, node: ContainerNode, token: Token) -> None:
    """
    Wait until a node serves reads of this token again.
    """
    wait_until(
        lambda: read(app, table, token).port == node.port,
        AGAIN_SECONDS,
        lambda: f"{node.name} is not used: {app.snapshot()}",
    )
