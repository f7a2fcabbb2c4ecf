"""
What a plan may ask of a router, and the two smallest plans: to observe a server.

A plan is a generator: it yields a step, is sent the step's result, and is thrown `NodeFailure` when
the step cannot be done. Steps are plain data; the routers and the monitors carry them out.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple, TypeVar

from lsn_consistency import _sql
from lsn_consistency._observation import Observation
from lsn_consistency._sql import Identity, Row
from lsn_consistency.lsn import Position

_Result = TypeVar("_Result")
Plan = Generator["Step", Any, _Result]


class NodeFailure(Exception):
    """
    A step could not be done on a node; ``cause`` is the driver's own error.

    ``down`` tells that the node itself failed, rather than that its pool was busy; ``state`` is
    the SQLSTATE of a statement that the server refused.
    """

    def __init__(
        self, cause: BaseException, *, down: bool = True, state: str | None = None
    ) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.down = down
        self.state = state


class Checkout(NamedTuple):
    """
    Take a connection of a node's pool within ``timeout`` seconds; None for the pool's own.

    Where the pool's connections turn out to be dead, a new one may take ``renew_seconds``.
    """

    node: str
    timeout: float | None
    renew_seconds: float


class Return(NamedTuple):
    """
    Give a connection back; ``discard`` has the pool replace it.
    """

    node: str
    conn: Any
    discard: bool = False


class Fetch(NamedTuple):
    """
    Run one statement of `_sql` on a connection within ``probe_timeout``; gives a `Reply`.
    """

    conn: Any
    statement: bytes


class SetReadOnly(NamedTuple):
    """
    Set the ``read_only`` attribute of a connection, which costs no round trip.
    """

    conn: Any
    value: bool | None


class AwaitPosition(NamedTuple):
    """
    Wait until a replica reaches ``required``, for ``seconds`` at most.
    """

    required: Position
    seconds: float


class AwaitObservation(NamedTuple):
    """
    Have ``node`` probed and wait for an observation sent at ``after`` or later; None without one.
    """

    node: str
    after: float
    seconds: float


class AwaitTurn(NamedTuple):
    """
    Wait for a place among the fallback reads.
    """

    seconds: float


Step = Checkout | Return | Fetch | SetReadOnly | AwaitPosition | AwaitObservation | AwaitTurn


class Reply(NamedTuple):
    """
    Hold the row that a statement gave, and when it was sent and received.
    """

    row: Row
    backend_pid: int
    sent_at: float
    received_at: float


def identify(conn: Any) -> Plan[tuple[Identity, Observation]]:
    """
    Observe the server behind a connection and learn which one it is.
    """
    try:
        reply: Reply = yield Fetch(conn, _sql.IDENTIFY)
    except NodeFailure as failure:
        if failure.state not in _sql.WAL_FUNCTIONS_UNAVAILABLE:
            raise
        reply = yield Fetch(conn, _sql.IDENTIFY_WITHOUT_WAL)
    identity = _sql.read_identity(reply.row, reply.backend_pid)
    return identity, _sql.read_observation(identity, *reply)


def observe(conn: Any, identity: Identity) -> Plan[Observation]:
    """
    Observe the server behind a connection whose identity is known.
    """
    # Behind a pooler each statement, or transaction, can reach another server.
    if identity.pooled or identity.limited:
        _, seen = yield from identify(conn)
        return seen
    reply: Reply = yield Fetch(conn, _sql.PROBE)
    return _sql.read_observation(identity, *reply)
