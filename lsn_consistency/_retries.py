"""
Which failed run of a read may be answered by running it again, and where.

Pure rules about SQLSTATEs (Appendix A of PostgreSQL's documentation) and the role of the node. What
the node did to a read is its fault and may be tried elsewhere: a recovery conflict, a shutdown, a
lost connection, a statement that a standby refuses. What the user's own statement did, or a
time-out or a cancellation, is an answer and goes to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any, Final, NamedTuple

from lsn_consistency.exceptions import ConfigurationError

CONFLICT_STATES: Final = frozenset({"40001", "40P01", "57P01", "57P02", "57P03"})
"""Recovery conflicts and shutdowns: the same read can succeed on another node."""

PRIMARY_STATES: Final = frozenset({"25006", "0A000"})
"""Refused by a standby because it is one: only a primary may do it."""

ROLE_STATES: Final = frozenset({"25006", "55000"})
"""What a server also says when its role has changed under the read."""


class Ended(NamedTuple):
    """
    Hold how a run of the function ended: with ``value``, or with ``error``.

    ``state`` is the SQLSTATE of a driver's error, ``lost`` says that the connection broke, and
    ``clean`` that it may go back to its pool as it is.
    """

    value: Any = None
    error: BaseException | None = None
    state: str | None = None
    lost: bool = False
    clean: bool = True

    @property
    def is_nodes_fault(self) -> bool:
        """
        Tell whether the node, rather than the function, is why there is no answer.
        """
        return self.lost or self.state in CONFLICT_STATES | PRIMARY_STATES | ROLE_STATES


class Next(Enum):
    """
    What becomes of a read whose run failed.
    """

    RAISE = "raise"
    ELSEWHERE = "elsewhere"
    PRIMARY = "primary"


def after(ended: Ended, *, on_primary: bool, role_changed: bool) -> Next:
    """
    Say where a read that failed so may run again.

    On a primary it may have done something, and 40001 is a conflict between the user's own
    transactions: nothing is repeated there, unless a demotion is what it ran into.
    """
    if role_changed and ended.state in ROLE_STATES:
        return Next.PRIMARY if ended.state in PRIMARY_STATES else Next.ELSEWHERE
    if on_primary:
        return Next.RAISE
    if ended.lost or ended.state in CONFLICT_STATES:
        return Next.ELSEWHERE
    return Next.PRIMARY if ended.state in PRIMARY_STATES else Next.RAISE


class Work:
    """
    Hold a function that reads, with its arguments, for the time of one ``run_read``.

    ``wrote`` tells that it used the router to write, so it must not run again. ``hedged`` tells
    that it may be running twice at this moment.
    """

    __slots__ = ("args", "fn", "hedged", "outer", "wrote")

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], *, hedged: bool) -> None:
        self.fn = fn
        self.args = args
        self.hedged = hedged
        self.wrote = False
        self.outer = _current.get()

    @contextmanager
    def running(self) -> Iterator[None]:
        """
        Make this the work of the context, so that a write in the function finds it.
        """
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


def note_write() -> None:
    """
    Tell the ``run_read`` around this call, if there is one, that its function writes.

    Raises `ConfigurationError` where the function may be running twice at once.
    """
    work = _current.get()
    while work is not None:
        if work.hedged:
            raise ConfigurationError(
                "the function of run_read(..., hedge_after=...) may run twice at once: it cannot "
                "write; write outside of it, or leave hedge_after out"
            )
        work.wrote = True
        work = work.outer


_current: ContextVar[Work | None] = ContextVar("lsn_consistency_work", default=None)
