"""
The blocks of ``read()`` and ``write()``: each lends a connection and ends its transaction.
"""

from __future__ import annotations

from collections.abc import Awaitable
from types import TracebackType
from typing import Any, Protocol, TypeVar

from lsn_consistency._core import Core
from lsn_consistency._leases import Lease, Use
from lsn_consistency._steps import Plan
from lsn_consistency._wire import has_nothing_to_commit
from lsn_consistency.exceptions import ConfigurationError
from lsn_consistency.session import Session, current_session

_Result = TypeVar("_Result")
_ENTERED_TWICE = "call read() or write() once for each with block: this one was entered before"


class _Router(Protocol):
    """
    Carry out plans.
    """

    def _running(self) -> Core: ...

    def _run(self, plan: Plan[_Result]) -> _Result: ...


class _AsyncRouter(Protocol):
    """
    Carry out plans.
    """

    def _running(self) -> Core: ...

    def _run(self, plan: Plan[_Result]) -> Awaitable[_Result]: ...


class Block:
    """
    Lend a connection for the time of one ``with`` block.
    """

    __slots__ = ("_core", "_lease", "_router", "_session", "_use")

    _core: Core
    _session: Session

    def __init__(self, router: _Router, use: Use) -> None:
        self._router = router
        self._use = use
        self._lease: Lease | None = None

    def __enter__(self) -> Any:
        if self._lease is not None:
            raise ConfigurationError(_ENTERED_TWICE)
        self._core = self._router._running()
        self._session = current_session()
        self._lease = self._router._run(self._use.open(self._core, self._session))
        return self._lease.conn

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        lease = self._lease
        assert lease is not None
        interrupted = kind is not None and not issubclass(kind, Exception)
        try:
            commit = self._use.commit(self._core, lease) if kind is None else None
            if commit is not None:
                self._router._run(commit)
            elif kind is not None or not has_nothing_to_commit(lease.conn):
                lease.conn.__exit__(kind, error, trace)
        except BaseException as ending:
            interrupted = interrupted or not isinstance(ending, Exception)
            raise
        finally:
            close = self._use.close(self._core, self._session, lease, interrupted=interrupted)
            self._router._run(close)


class AsyncBlock:
    """
    Lend a connection for the time of one ``async with`` block.
    """

    __slots__ = ("_core", "_lease", "_router", "_session", "_use")

    _core: Core
    _session: Session

    def __init__(self, router: _AsyncRouter, use: Use) -> None:
        self._router = router
        self._use = use
        self._lease: Lease | None = None

    async def __aenter__(self) -> Any:
        if self._lease is not None:
            raise ConfigurationError(_ENTERED_TWICE)
        self._core = self._router._running()
        self._session = current_session()
        self._lease = await self._router._run(self._use.open(self._core, self._session))
        return self._lease.conn

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        lease = self._lease
        assert lease is not None
        interrupted = kind is not None and not issubclass(kind, Exception)
        try:
            commit = self._use.commit(self._core, lease) if kind is None else None
            if commit is not None:
                await self._router._run(commit)
            elif kind is not None or not has_nothing_to_commit(lease.conn):
                await lease.conn.__aexit__(kind, error, trace)
        except BaseException as ending:
            interrupted = interrupted or not isinstance(ending, Exception)
            raise
        finally:
            close = self._use.close(self._core, self._session, lease, interrupted=interrupted)
            await self._router._run(close)
