"""
Statements of this package on one connection, within a deadline, below psycopg's cursors.

The statements of this package must not open a transaction, must not depend on the user's row
factories, and must end in time even when the server is frozen: a cursor promises none of these,
and a cancelled one waits for the server. So they go through `psycopg.pq`, psycopg's documented
wrapper of libpq. After a time-out or a cancellation the connection is closed, since what it would
receive next is unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from functools import lru_cache
from time import monotonic
from typing import Any, Final, TypeVar

from psycopg import AsyncConnection, Connection, Error, OperationalError, capabilities, pq

from lsn_consistency._protocol import CommitAndAsk, Need, RefusedError, ask, can_pipeline
from lsn_consistency._retries import Ended
from lsn_consistency._sql import Row
from lsn_consistency._steps import Commit, Fetch, NodeFailure, Plan, Reply

_Result = TypeVar("_Result")
_MESSAGES_BEFORE_END: Final = 16

# Behind a pooler the check is part of the transaction that reads.
_BETWEEN_STATEMENTS = (pq.TransactionStatus.IDLE, pq.TransactionStatus.INTRANS)
_OWN_COMMITS: Final = (
    (Connection.commit, Connection.__exit__),
    (AsyncConnection.commit, AsyncConnection.__aexit__),
)


def fetch(step: Fetch, timeout: float) -> Reply:
    """
    Run a statement on a blocking connection.

    Raises `NodeFailure` for a lost connection, a refusal, or after ``timeout`` seconds.
    """
    pgconn = _usable(step.conn)
    rows: list[Row] = [()]
    sent_at = monotonic()
    deadline = sent_at + timeout
    try:
        for need in ask(pgconn, step, rows):
            left = deadline - monotonic()
            if left <= 0 or not _wait(pgconn.socket, need, left):
                raise TimeoutError
    except BaseException as error:
        raise _failure(pgconn, error, timeout) from None
    return Reply(rows[-1], pgconn.backend_pid, sent_at, monotonic())


async def fetch_async(step: Fetch, timeout: float) -> Reply:
    """
    Run a statement on an async connection; otherwise the same as `fetch`.
    """
    pgconn = _usable(step.conn)
    rows: list[Row] = [()]
    sent_at = monotonic()
    loop = asyncio.get_running_loop()
    ends = loop.time() + timeout
    try:
        for need in ask(pgconn, step, rows):
            await _ready(loop, pgconn.socket, need, ends)
    except BaseException as error:
        raise _failure(pgconn, error, timeout) from None
    return Reply(rows[-1], pgconn.backend_pid, sent_at, monotonic())


def can_ask_at_commit(conn: Any) -> bool:
    """
    Tell whether a connection's commit is psycopg's own, and a question can go with it.
    """
    pgconn = conn.pgconn
    return (
        pgconn.transaction_status == pq.TransactionStatus.INTRANS
        and can_pipeline(pgconn)
        and _may_commit(conn)
    )


def has_nothing_to_commit(conn: Any) -> bool:
    """
    Tell whether a connection's commit is psycopg's own, and would find no transaction open.
    """
    return conn.pgconn.transaction_status == pq.TransactionStatus.IDLE and _may_commit(conn)


def _may_commit(conn: Any) -> bool:
    kind: Any = type(conn)
    return (
        commits_as_psycopg(kind)
        # What psycopg's commit() refuses: the end of a block, or of a two-phase transaction.
        and getattr(conn, "_num_transactions", None) == 0
        and getattr(conn, "_tpc", False) is None
    )


@lru_cache
def commits_as_psycopg(kind: Any) -> bool:
    """
    Tell whether a class of connections has neither a commit nor a block of its own.
    """
    return (kind.commit, getattr(kind, "__aexit__", None) or kind.__exit__) in _OWN_COMMITS


def commit(step: Commit, timeout: float) -> Reply | None:
    """
    Commit a blocking connection's transaction, and ask right after it, in one round trip.

    The question has ``timeout`` seconds from the commit's end on; None says that it has failed.
    Raises what psycopg's ``commit()`` raises. Interrupted, it has the server cancel the commit's
    wait for a standby, as psycopg does, and closes the connection when the commit is answered, or
    after ``timeout`` seconds.
    """
    conn, pgconn = step.conn, step.conn.pgconn
    with conn.lock:
        exchange = CommitAndAsk(pgconn, step)
        sent_at = monotonic()
        try:
            for need, ends in _limited(exchange, monotonic, timeout):
                left = None if ends is None else max(0.0, ends - monotonic())
                if not _wait(pgconn.socket, need, left):
                    raise TimeoutError
        except BaseException as error:
            try:
                if not isinstance(error, Exception) and not exchange.is_answered:
                    answer_by = monotonic() + timeout
                    cancel(conn, timeout)
                    _hear_out(pgconn, exchange, answer_by)
            finally:
                raised = _ended(conn, exchange, error)
            if raised is not None:
                raise raised from None
            return None
        return _committed(conn, exchange, sent_at)


async def commit_async(step: Commit, timeout: float) -> Reply | None:
    """
    Commit an async connection's transaction; otherwise the same as `commit`.
    """
    conn, pgconn = step.conn, step.conn.pgconn
    loop = asyncio.get_running_loop()
    async with conn.lock:
        exchange = CommitAndAsk(pgconn, step)
        sent_at = monotonic()
        try:
            for need, ends in _limited(exchange, loop.time, timeout):
                await _ready(loop, pgconn.socket, need, ends)
        except BaseException as error:
            try:
                if not isinstance(error, Exception) and not exchange.is_answered:
                    answer_by = loop.time() + timeout
                    await cancel_async(conn, timeout)
                    await _hear_out_async(pgconn, exchange, answer_by)
            finally:
                # Whatever interrupts that as well.
                raised = _ended(conn, exchange, error)
            if raised is not None:
                raise raised from None
            return None
        return _committed(conn, exchange, sent_at)


def _hear_out(pgconn: Any, exchange: CommitAndAsk, ends: float) -> None:
    # A COMMIT that its server had not begun is not cancelled, and must not come into effect after
    # the session's next read.
    with contextlib.suppress(Error):
        for need in exchange.rest():
            if not _wait(pgconn.socket, need, max(0, ends - monotonic())):
                return


async def _hear_out_async(pgconn: Any, exchange: CommitAndAsk, ends: float) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(Error, TimeoutError):
        for need in exchange.rest():
            await _ready(loop, pgconn.socket, need, ends)


def _limited(
    exchange: CommitAndAsk, clock: Callable[[], float], timeout: float
) -> Iterator[tuple[Need, float | None]]:
    # A COMMIT may take its time; the question that goes with it may not.
    ends: float | None = None
    for need in exchange.needs():
        if ends is None and exchange.is_answered:
            ends = clock() + timeout
        yield need, ends


def _committed(conn: Any, exchange: CommitAndAsk, sent_at: float) -> Reply | None:
    if refused := exchange.refusal():
        raise refused
    row = exchange.row()
    return None if row is None else Reply(row, conn.pgconn.backend_pid, sent_at, monotonic())


def _ended(conn: Any, exchange: CommitAndAsk, error: BaseException) -> BaseException | None:
    # What the connection would receive next is unknown.
    refused = exchange.refusal()
    conn.pgconn.finish()
    if not isinstance(error, Exception):
        return error
    return refused if exchange.is_answered else refused or error


async def run_async(plan: Plan[_Result], timeout: float) -> _Result:
    """
    Carry out a plan that does nothing but fetch.
    """
    try:
        step = next(plan)
        while True:
            try:
                if not isinstance(step, Fetch):
                    raise TypeError(f"a plan of fetches asked for {step!r}")
                reply = await fetch_async(step, timeout)
            except NodeFailure as failure:
                step = plan.throw(failure)
            else:
                step = plan.send(reply)
    except StopIteration as done:
        result: _Result = done.value
        return result


def is_alive(conn: Any) -> bool:
    """
    Tell, without a round trip, whether an idle connection still has its server.

    A server that stopped or crashed has closed the socket, which is then readable. A frozen one
    or a silent network cannot be seen here.
    """
    pgconn = conn.pgconn
    if pgconn.status != pq.ConnStatus.OK:
        return False
    arrived = select.poll()
    arrived.register(pgconn.socket, select.POLLIN)
    # Before the end of the stream there may be the server's reason for it, or notices.
    for _ in range(_MESSAGES_BEFORE_END):
        if not arrived.poll(0):
            return True
        try:
            pgconn.consume_input()
        except OperationalError:
            return False
    return False


def ended(conn: Any, error: BaseException) -> Ended:
    """
    Describe how a function ended that raised ``error`` while it used a connection.
    """
    state = error.sqlstate if isinstance(error, Error) else None
    # What psycopg raises for a lost connection has no SQLSTATE, what a pooler sends for one is of
    # class 08. The same errors may come from another connection of the function's own.
    says_so = isinstance(error, OperationalError) and (state is None or state.startswith("08"))
    return Ended(None, error, state, lost=says_so and bool(conn.broken), clean=is_idle(conn))


def can_cancel() -> bool:
    """
    Tell whether a request to cancel has a time limit: before libpq 17 it hangs with its server.
    """
    return capabilities.has_cancel_safe()


def cancel(conn: Any, seconds: float) -> bool:
    """
    Have the server cancel what a connection runs; False if it did not say within ``seconds``.

    Safe from another thread than the one that uses the connection.
    """
    if not can_cancel():
        return False
    try:
        conn.cancel_safe(timeout=seconds)
    except Error:
        return False
    return True


async def cancel_async(conn: Any, seconds: float) -> None:
    """
    Have the server cancel what an async connection runs, if it lets itself be told in time.
    """
    if can_cancel():
        with contextlib.suppress(Error):
            await conn.cancel_safe(timeout=seconds)


def cut(conn: Any) -> None:
    """
    End the stream of a connection under whoever uses it: it finds that its server has gone.

    To close the connection instead would pull it from under another thread.
    """
    pgconn = conn.pgconn
    try:
        number = pgconn.socket
        with socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as stream:
            # The number may have been given to another file before it was copied.
            if pgconn.socket == number:
                stream.shutdown(socket.SHUT_RDWR)
    except (Error, OSError):
        # It is closed already.
        return


def is_idle(conn: Any) -> bool:
    """
    Tell whether a connection works and is in no transaction.
    """
    return bool(conn.pgconn.transaction_status == pq.TransactionStatus.IDLE)


def _usable(conn: Any) -> Any:
    pgconn = conn.pgconn
    if pgconn.status != pq.ConnStatus.OK:
        raise NodeFailure(OperationalError("the connection is lost"))
    if pgconn.transaction_status not in _BETWEEN_STATEMENTS:
        raise NodeFailure(OperationalError("the connection is in use"), down=False)
    return pgconn


def _failure(pgconn: Any, error: BaseException, timeout: float) -> BaseException:
    if isinstance(error, RefusedError):
        return NodeFailure(error, state=error.state)
    pgconn.finish()
    if isinstance(error, TimeoutError):
        return NodeFailure(OperationalError(f"no answer within {timeout:g} s"))
    return NodeFailure(error) if isinstance(error, Exception) else error


def _wait(number: int, need: Need, seconds: float | None) -> bool:
    poll = select.poll()
    poll.register(number, select.POLLIN if need == "read" else select.POLLOUT)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


async def _ready(
    loop: asyncio.AbstractEventLoop, number: int, need: Need, ends: float | None
) -> None:
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (
        (loop.add_reader, loop.remove_reader)
        if need == "read"
        else (loop.add_writer, loop.remove_writer)
    )
    timer = None if ends is None else loop.call_at(ends, _expire, ready)
    add(number, _wake, ready)
    try:
        await ready
    finally:
        remove(number)
        if timer is not None:
            timer.cancel()


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _expire(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_exception(TimeoutError())
