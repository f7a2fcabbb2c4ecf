"""
What goes over a connection and comes back, without the waiting: generators tell what they wait for.

It goes through `psycopg.pq`, psycopg's documented wrapper of libpq. Columns come as text. Several
statements go in one round trip by libpq's pipeline mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, Literal

from psycopg import OperationalError, capabilities, errors, pq

from lsn_consistency._sql import COMMIT, NOT_PREPARED, PREPARED_NAMES, Row
from lsn_consistency._steps import Commit, Fetch, Prepared

Need = Literal["read", "write"]
_Send = Callable[[], None]
_Answers = list[list[Any]]

_HAS_PIPELINE: Final = capabilities.has_pipeline()


class RefusedError(OperationalError):
    """
    The server refused a statement of this package; ``state`` is its SQLSTATE.
    """

    def __init__(self, message: str, state: str | None) -> None:
        super().__init__(message)
        self.state = state


def can_pipeline(pgconn: Any) -> bool:
    """
    Tell whether several statements can be sent at once: libpq can since 14.
    """
    return _HAS_PIPELINE and bool(pgconn.pipeline_status == pq.PipelineStatus.OFF)


def ask(pgconn: Any, step: Fetch, rows: list[Row]) -> Iterator[Need]:
    """
    Send a statement, and add the row that it gave.

    Raises `RefusedError`, or what psycopg raises for a lost connection.
    """
    if step.prepared is None or not can_pipeline(pgconn):
        yield from _ask_alone(pgconn, step, rows)
        return
    answers: _Answers = []
    yield from _exchange(pgconn, _question(pgconn, step.statement, step.prepared), answers)
    try:
        rows.append(_answer(answers, step.statement, step.prepared))
    except RefusedError as refused:
        if refused.state not in NOT_PREPARED:
            raise
        yield from _ask_alone(pgconn, step, rows)


class CommitAndAsk:
    """
    Send COMMIT and a statement in one round trip.

    A server completes a COMMIT before it looks at the next message, and runs what follows in a
    transaction of its own (`exec_execute_message` in postgres.c). What follows a COMMIT that fails
    it leaves out.
    """

    __slots__ = ("_answers", "_pgconn", "_step")

    def __init__(self, pgconn: Any, step: Commit) -> None:
        self._pgconn = pgconn
        self._step = step
        self._answers: _Answers = []

    def needs(self) -> Iterator[Need]:
        """
        Send both and receive what comes back.
        """
        assert self._step.statement is not None
        commit = partial(self._pgconn.send_query_params, COMMIT, None)
        question = _question(self._pgconn, self._step.statement, self._step.prepared)
        yield from _exchange(self._pgconn, [commit, *question], self._answers)

    @property
    def is_answered(self) -> bool:
        """
        Tell whether the server has said what became of the transaction.
        """
        return len(self._answers) > 1

    def refusal(self) -> BaseException | None:
        """
        Return what psycopg raises for the server's answer to COMMIT, None if that went well.
        """
        failed = _first_failure(self._answers[:1])
        if failed is None:
            return None
        return errors.error_from_result(failed, encoding=self._step.conn.info.encoding)

    def row(self) -> Row | None:
        """
        Return the statement's row; None if it was refused.
        """
        assert self._step.statement is not None
        try:
            return _answer(self._answers[1:], self._step.statement, self._step.prepared)
        except RefusedError:
            return None


def _ask_alone(pgconn: Any, step: Fetch, rows: list[Row]) -> Iterator[Need]:
    # The extended protocol takes one statement only.
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


def _exchange(pgconn: Any, sends: Sequence[_Send], answers: _Answers) -> Iterator[Need]:
    # The answer of each statement is begun when the one before it has ended.
    pgconn.enter_pipeline_mode()
    for send in sends:
        send()
    pgconn.pipeline_sync()
    while pgconn.flush():
        yield "write"
    answers.append([])
    while True:
        while pgconn.is_busy():
            yield "read"
            pgconn.consume_input()
        result = pgconn.get_result()
        if pgconn.status != pq.ConnStatus.OK:
            answers[-1] += [] if result is None else [result]
            raise OperationalError(str(_lost(answers[-1:])))
        if result is None:
            answers.append([])
        elif result.status == pq.ExecStatus.PIPELINE_SYNC:
            break
        else:
            answers[-1].append(result)
    pgconn.exit_pipeline_mode()


def _question(pgconn: Any, statement: bytes, prepared: Prepared | None) -> list[_Send]:
    known = False if prepared is None else prepared.get(statement)
    if known is False:
        return [partial(pgconn.send_query_params, statement, None)]
    name = PREPARED_NAMES[statement]
    run = partial(pgconn.send_query_prepared, name, None)
    return [run] if known else [partial(pgconn.send_prepare, name, statement), run]


def _answer(answers: _Answers, statement: bytes, prepared: Prepared | None) -> Row:
    results = [result for answer in answers for result in answer]
    if prepared is not None and results and results[0].status == pq.ExecStatus.COMMAND_OK:
        prepared[statement] = True
    failed = _first_failure(answers)
    if failed is None:
        return next((_text(each) for each in results if each.ntuples), ())
    refused = _refusal(failed)
    if prepared is not None and refused.state in NOT_PREPARED:
        # Somebody has deallocated it, and may do so again.
        prepared[statement] = False
    raise refused


def _first_failure(answers: _Answers) -> Any:
    for answer in answers:
        for result in answer:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                return result
    return None


def _lost(answers: _Answers) -> object:
    failed = _first_failure(answers)
    return "the connection is lost" if failed is None else _refusal(failed)


def _text(result: Any) -> Row:
    values = [result.get_value(0, column) for column in range(result.nfields)]
    return [None if value is None else value.decode("utf-8", "replace") for value in values]


def _refusal(result: Any) -> RefusedError:
    state = result.error_field(pq.DiagnosticField.SQLSTATE)
    message = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"the server gave no reason"
    return RefusedError(
        message.decode("utf-8", "replace"), None if state is None else state.decode("ascii")
    )
