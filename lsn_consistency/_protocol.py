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
    yield from _exchange(pgconn, [_question(pgconn, step.statement, step.prepared)], answers)
    try:
        rows.append(_answer(answers[0], step.statement, step.prepared))
    except RefusedError as refused:
        if refused.state not in NOT_PREPARED:
            raise
        yield from _ask_alone(pgconn, step, rows)


class CommitAndAsk:
    """
    Send COMMIT and a statement in one round trip.

    The Sync between them has the server complete the commit first, and run the statement in a
    transaction of its own ("Pipelining" in the description of the protocol).
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
        commit = [partial(self._pgconn.send_query_params, COMMIT, None)]
        question = _question(self._pgconn, self._step.statement, self._step.prepared)
        yield from _exchange(self._pgconn, [commit, question], self._answers)

    def rest(self) -> Iterator[Need]:
        """
        Go on receiving after `needs` was interrupted, wherever that was, until COMMIT is answered.
        """
        yield from _receive(self._pgconn, 1, self._answers)

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
        failed = _first_failure(self._answers[0]) if self._answers else None
        if failed is None:
            return None
        return errors.error_from_result(failed, encoding=self._step.conn.info.encoding)

    def row(self) -> Row | None:
        """
        Return the statement's row; None if it was refused.
        """
        assert self._step.statement is not None
        try:
            return _answer(self._answers[1], self._step.statement, self._step.prepared)
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


def _exchange(pgconn: Any, groups: Sequence[Sequence[_Send]], answers: _Answers) -> Iterator[Need]:
    # Each group ends with a Sync; its answers are begun when those of the one before have ended.
    pgconn.enter_pipeline_mode()
    for group in groups:
        for send in group:
            send()
        pgconn.pipeline_sync()
    yield from _receive(pgconn, len(groups), answers)
    pgconn.exit_pipeline_mode()


def _receive(pgconn: Any, groups: int, answers: _Answers) -> Iterator[Need]:
    # Goes on where another one was interrupted; a result that was about to be added is missing.
    while pgconn.flush():
        yield "write"
    if not answers:
        answers.append([])
    while True:
        while pgconn.is_busy():
            yield "read"
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is not None and result.status == pq.ExecStatus.PIPELINE_SYNC:
            if len(answers) >= groups:
                return
            answers.append([])
            continue
        if result is not None:
            answers[-1].append(result)
        if pgconn.status != pq.ConnStatus.OK:
            raise OperationalError(_lost(answers[-1]))
        if result is None and pgconn.transaction_status != pq.TransactionStatus.ACTIVE:
            # Nothing is to come: nothing was sent, or what ended it was missed.
            return


def _question(pgconn: Any, statement: bytes, prepared: Prepared | None) -> list[_Send]:
    known = False if prepared is None else prepared.get(statement)
    if known is False:
        return [partial(pgconn.send_query_params, statement, None)]
    name = PREPARED_NAMES[statement]
    run = partial(pgconn.send_query_prepared, name, None)
    return [run] if known else [partial(pgconn.send_prepare, name, statement), run]


def _answer(results: Sequence[Any], statement: bytes, prepared: Prepared | None) -> Row:
    if prepared is not None and results and results[0].status == pq.ExecStatus.COMMAND_OK:
        prepared[statement] = True
    failed = _first_failure(results)
    if failed is None:
        return next((_text(each) for each in results if each.ntuples), ())
    refused = _refusal(failed)
    if prepared is not None and refused.state in NOT_PREPARED:
        # Somebody has deallocated it, and may do so again.
        prepared[statement] = False
    raise refused


def _first_failure(results: Sequence[Any]) -> Any:
    for result in results:
        if result.status == pq.ExecStatus.FATAL_ERROR:
            return result
    return None


def _lost(results: Sequence[Any]) -> str:
    failed = _first_failure(results)
    return "the connection is lost" if failed is None else str(_refusal(failed))


def _text(result: Any) -> Row:
    values = [result.get_value(0, column) for column in range(result.nfields)]
    return [None if value is None else value.decode("utf-8", "replace") for value in values]


def _refusal(result: Any) -> RefusedError:
    state = result.error_field(pq.DiagnosticField.SQLSTATE)
    message = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"the server gave no reason"
    return RefusedError(
        message.decode("utf-8", "replace"), None if state is None else state.decode("ascii")
    )
