"""
One statement on one connection, within a deadline, below psycopg's cursors.

The statements of this package must not open a transaction, must not depend on the user's row
factories, and must end in time even when the server is frozen: a cursor promises none of these,
and a cancelled one waits for the server. So they go through `psycopg.pq`, psycopg's documented
wrapper of libpq. After a time-out or a cancellation the connection is closed, since what it would
receive next is unknown.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Iterator
from time import monotonic
from typing import Any, Final, Literal, TypeVar

from psycopg import Error, OperationalError, capabilities, pq

from lsn_consistency._retries import Ended
from lsn_consistency._sql import Row
from lsn_consistency._steps import Fetch, NodeFailure, Plan, Reply

_Result = TypeVar("_Result")
Need = Literal["read", "write"]

_MESSAGES_BEFORE_END: Final = 16

# Behind a pooler the check is part of the transaction that reads.
_BETWEEN_STATEMENTS = (pq.TransactionStatus.IDLE, pq.TransactionStatus.INTRANS)


class RefusedError(OperationalError):
    """
    The server refused a statement of this package; ``state`` is its SQLSTATE.
    """

    def __init__(self, message: str, state: str | None) -> None:
        super().__init__(message)
        self.state = state


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
        for need in _exchange(pgconn, step, rows):
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
        for need in _exchange(pgconn, step, rows):
            await _ready(loop, pgconn.socket, need, ends)
    except BaseException as error:
        raise _failure(pgconn, error, timeout) from None
    return Reply(rows[-1], pgconn.backend_pid, sent_at, monotonic())


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
    # Before the end of the stream there may be the server's reason for it, or notices.
    for _ in range(_MESSAGES_BEFORE_END):
        if pgconn.status != pq.ConnStatus.OK:
            return False
        if not _wait(pgconn.socket, "read", 0):
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


def _exchange(pgconn: Any, step: Fetch, rows: list[Row]) -> Iterator[Need]:
    # The extended protocol takes one statement only. Both give text columns.
    if step.simple:
        pgconn.send_query(step.statement)
    else:
        pgconn.send_query_params(step.statement, None)
    while pgconn.flush():
        yield "write"
    failure: RefusedError | None = None
    while True:
        while pgconn.is_busy():
            yield "read"
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            break
        if result.status == pq.ExecStatus.FATAL_ERROR:
            failure = failure or _refusal(result)
        elif result.ntuples:
            rows.append(_text(result))
    if pgconn.status != pq.ConnStatus.OK:
        raise OperationalError(str(failure or "the connection is lost"))
    if failure is not None:
        raise failure


def _text(result: Any) -> Row:
    values = [result.get_value(0, column) for column in range(result.nfields)]
    return [None if value is None else value.decode("utf-8", "replace") for value in values]


def _refusal(result: Any) -> RefusedError:
    state = result.error_field(pq.DiagnosticField.SQLSTATE)
    message = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"the server gave no reason"
    return RefusedError(
        message.decode("utf-8", "replace"), None if state is None else state.decode("ascii")
    )


def _wait(number: int, need: Need, seconds: float) -> bool:
    poll = select.poll()
    poll.register(number, select.POLLIN if need == "read" else select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


async def _ready(loop: asyncio.AbstractEventLoop, number: int, need: Need, ends: float) -> None:
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (
        (loop.add_reader, loop.remove_reader)
        if need == "read"
        else (loop.add_writer, loop.remove_writer)
    )
    timer = loop.call_at(ends, _expire, ready)
    add(number, _wake, ready)
    try:
        await ready
    finally:
        remove(number)
        timer.cancel()


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _expire(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_exception(TimeoutError())
