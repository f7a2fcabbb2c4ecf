"""
What a plan may ask of a router, and the two smallest plans: to observe a server.

A plan is a generator: it yields a step, is sent the step's result, and is thrown `NodeFailure` when
the step cannot be done. Steps are plain data; the routers and the monitors carry them out.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Final, NamedTuple, TypeVar

from lsn_consistency import _sql
from lsn_consistency._hedges import Race, Run
from lsn_consistency._observation import Observation, Server
from lsn_consistency._retries import Work
from lsn_consistency._sql import Identity, Row
from lsn_consistency._timelines import FIRST_TIMELINE
from lsn_consistency.lsn import Position, TimelineHistory

_Result = TypeVar("_Result")
Plan = Generator["Step", Any, _Result]
Prepared = dict[bytes, bool]
"""Which statements a connection has prepared; False for one that must not be prepared again."""


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

    ``simple`` asks for the simple query protocol, the only one of a replication connection;
    ``prepared`` is what its connection keeps prepared, None for nothing.
    """

    conn: Any
    statement: bytes
    simple: bool = False
    prepared: Prepared | None = None


class Commit(NamedTuple):
    """
    Commit a connection's transaction, and ask a statement after it if that takes no more time.

    Gives a `Reply`, or None if it was not asked or not answered. The driver's own error is thrown
    when the transaction does not commit.
    """

    conn: Any
    statement: bytes | None = None
    prepared: Prepared | None = None


class SetReadOnly(NamedTuple):
    """
    Set the ``read_only`` attribute of a connection, which costs no round trip.
    """

    conn: Any
    value: bool | None


class AwaitPosition(NamedTuple):
    """
    Wait until a replica reaches ``required``, for ``seconds`` at most.

    The wait also ends when the primary, asked after ``since``, turns out not to have it.
    """

    required: Position
    seconds: float
    since: float


class AwaitObservation(NamedTuple):
    """
    Have ``node`` probed and wait for an observation sent at ``after`` or later; None without one.

    A probe has ``probe_timeout`` seconds, and so have all that wait for it.
    """

    node: str
    after: float


class AwaitTurn(NamedTuple):
    """
    Wait for a place among the fallback reads.
    """

    seconds: float


class Call(NamedTuple):
    """
    Call the user's function in a block of the connection, ``last`` at its end; gives an `Ended`.

    Only what is no `Exception` is thrown, and only without a ``run``: nobody but the caller can
    have interrupted it then.
    """

    conn: Any
    work: Work
    last: Generator[Any, Any, None]
    run: Run | None = None


class Spawn(NamedTuple):
    """
    Carry out a plan beside this one; False when there is no room for one more ``run``.
    """

    plan: Generator[Any, Any, None]
    run: Run | None


class AwaitRace(NamedTuple):
    """
    Wait until a race is over, for ``seconds`` at most; None for as long as its runs take.
    """

    race: Race
    seconds: float | None


class Abandon(NamedTuple):
    """
    End a run that is not needed: cancel its statement on the server, or cut its connection off.
    """

    run: Run


Step = (
    Checkout
    | Return
    | Fetch
    | Commit
    | SetReadOnly
    | AwaitPosition
    | AwaitObservation
    | AwaitTurn
    | Call
    | Spawn
    | AwaitRace
    | Abandon
)

METHODS: Final[Mapping[type, str]] = {
    Checkout: "_checkout",
    Return: "_return",
    Fetch: "_fetch",
    Commit: "_commit",
    SetReadOnly: "_set_read_only",
    AwaitPosition: "_await_position",
    AwaitObservation: "_await_observation",
    AwaitTurn: "_await_turn",
    Call: "_call",
    Spawn: "_spawn",
    AwaitRace: "_await_race",
    Abandon: "_abandon",
}
"""The method of a router that carries out each step."""


class Reply(NamedTuple):
    """
    Hold the row that a statement gave, and when it was sent and received.
    """

    row: Row
    backend_pid: int
    sent_at: float
    received_at: float


def identify(conn: Any, *, limited: bool = False) -> Plan[tuple[Identity, Observation]]:
    """
    Observe the server behind a connection and learn which one it is.

    ``limited`` says that it refuses its WAL functions, which would end a transaction.
    """
    try:
        reply: Reply = yield Fetch(conn, _sql.IDENTIFY_WITHOUT_WAL if limited else _sql.IDENTIFY)
    except NodeFailure as failure:
        if failure.state not in _sql.WAL_FUNCTIONS_UNAVAILABLE:
            raise
        reply = yield Fetch(conn, _sql.IDENTIFY_WITHOUT_WAL)
    try:
        identity = _sql.read_identity(reply.row, reply.backend_pid)
        return identity, _sql.read_observation(identity, *reply)
    except ValueError as error:
        raise _unreadable(error) from error


def commit_and_observe(
    conn: Any, identity: Identity, *, in_recovery: bool, prepared: Prepared
) -> Plan[Observation | None]:
    """
    Commit a connection's transaction and ask its server after it, None if that takes longer.

    A primary is asked for its position only.
    """
    statement = _sql.PROBE_STANDBY if in_recovery else _sql.POSITION
    reply: Reply | None = yield Commit(conn, statement, prepared)
    try:
        if reply is None:
            return None
        if not in_recovery:
            return _sql.read_position(identity, *reply)
        return _sql.read_observation(identity, *reply) if _sql.is_in_recovery(reply.row) else None
    except ValueError:
        # The transaction is committed all the same.
        return None


def ask_position(conn: Any, identity: Identity, prepared: Prepared) -> Plan[Observation]:
    """
    Ask a primary whose identity is known how far it is.
    """
    reply: Reply = yield Fetch(conn, _sql.POSITION, prepared=prepared)
    try:
        return _sql.read_position(identity, *reply)
    except ValueError as error:
        raise _unreadable(error) from error


def observe(
    conn: Any, identity: Identity, *, in_recovery: bool, prepared: Prepared | None = None
) -> Plan[Observation]:
    """
    Observe the server behind a connection whose identity is known, and its role of before.
    """
    # Behind a pooler each statement, or transaction, can reach another server.
    if identity.pooled or identity.limited:
        _, seen = yield from identify(conn, limited=identity.pooled and identity.limited)
        return seen
    try:
        statement = _sql.PROBE_STANDBY if in_recovery else _sql.PROBE_PRIMARY
        reply: Reply = yield Fetch(conn, statement, prepared=prepared)
    except NodeFailure as failure:
        if failure.state != _sql.IN_RECOVERY:
            raise
        # No primary becomes a standby while it runs: the connection leads elsewhere now.
        _, seen = yield from identify(conn)
        return seen
    try:
        if in_recovery and not _sql.is_in_recovery(reply.row):
            in_recovery = False
            reply = yield Fetch(conn, _sql.PROBE_PRIMARY)
        if _sql.is_in_recovery(reply.row) != in_recovery:
            raise ValueError("a standby answers as a primary does")
        return _sql.read_observation(identity, *reply)
    except ValueError as error:
        raise _unreadable(error) from error


def _unreadable(error: ValueError) -> NodeFailure:
    # Whatever answered so is not believed in anything.
    return NodeFailure(ConnectionError(f"the server's answer cannot be read: {error}"))


def ask_timeline(conn: Any, server: Server) -> Plan[tuple[int, TimelineHistory | None]]:
    """
    Ask a server over a replication connection for its timeline and the history of that.

    On a standby it is the timeline of the last replayed record (`IdentifySystem` in PostgreSQL's
    walsender.c). Raises `NodeFailure` when the connection leads to another server.
    """
    reply: Reply = yield Fetch(conn, _sql.IDENTIFY, simple=True)
    if _sql.read_identity(reply.row, reply.backend_pid).server != server:
        raise NodeFailure(ConnectionError("the replication connection is of another server"))
    reply = yield Fetch(conn, _sql.IDENTIFY_SYSTEM, simple=True)
    timeline = _sql.read_system_timeline(reply.row)
    if timeline == FIRST_TIMELINE:
        return timeline, None
    reply = yield Fetch(conn, _sql.timeline_history(timeline), simple=True)
    return timeline, _sql.read_timeline_history(timeline, reply.row)
