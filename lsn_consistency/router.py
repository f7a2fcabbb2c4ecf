"""
The blocking router: threads wait, the plans decide.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from time import monotonic
from typing import Any, Self, TypeVar, Unpack

import psycopg
from psycopg_pool import ConnectionPool, PoolTimeout

from lsn_consistency import _connections, _plans, _retries, _steps, _wire, _writes
from lsn_consistency._base import BaseRouter
from lsn_consistency._blocks import Block
from lsn_consistency._core import Core
from lsn_consistency._monitor import Monitor, MonitorThread
from lsn_consistency._observation import Observation
from lsn_consistency._settings import RouterOptions
from lsn_consistency._waiting import wait
from lsn_consistency._workers import Threads
from lsn_consistency.consistency import Consistency
from lsn_consistency.exceptions import ConfigurationError
from lsn_consistency.route import Route
from lsn_consistency.session import current_session
from lsn_consistency.tokens import Token

_Result = TypeVar("_Result")
Connection = psycopg.Connection[Any]


class Router(Threads, BaseRouter):
    """
    Route reads to replicas that have replayed what the session wrote or saw; for blocking code.

    ``primary`` is a conninfo or an open `psycopg_pool.ConnectionPool`, ``replicas`` a mapping of
    names to the same. Open it with ``with``, `open`, or an application's ``lifespan``. It may be
    used from any thread; after a fork, each child opens its own pools and monitors at first use.

    Raises `ConfigurationError` for options that cannot work.
    """

    _pool_types = (ConnectionPool,)

    def __init__(
        self, *, primary: Any = None, replicas: Any = (), **options: Unpack[RouterOptions]
    ) -> None:
        super().__init__(primary, replicas, options)
        self._reset_workers()
        self._opened = False
        self._open_lock = threading.Lock()
        self._monitors: MonitorThread | None = None

    # Life

    def open(self) -> None:
        """
        Open the pools, start the monitors, and wait for the first observation of each node.

        A node that is down does not fail it; the wait ends after ``open_timeout``.
        """
        with self._open_lock:
            if self._core is None:
                try:
                    self._start()
                except BaseException:
                    self._stop()
                    raise
            self._opened = True

    def close(self) -> None:
        """
        End the monitors and close the pools that the router made.
        """
        with self._open_lock:
            self._opened = False
            self._stop()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """
        Open the router for the life of an ASGI application: ``Starlette(lifespan=...)``.
        """
        await asyncio.to_thread(self.open)
        try:
            yield
        finally:
            await asyncio.to_thread(self.close)

    # Use

    def read(
        self,
        token: Token | None = None,
        *,
        consistency: Consistency | None = None,
        node: str | None = None,
    ) -> AbstractContextManager[Connection]:
        """
        Yield a read-only connection of a node that satisfies the session's token.

        ``token`` takes the place of the session's, ``consistency`` that of the block's or the
        router's level; ``node`` names a node and skips the decision. The transaction ends with
        the block. At ``CAUSAL`` and ``STRONG`` the session advances past what it can have seen.

        Raises a `RoutingError` when nothing may serve the read.
        """
        return Block(self, _plans.Reading(token, consistency, node))

    def write(self) -> AbstractContextManager[Connection]:
        """
        Yield a connection of the primary; after COMMIT the session advances to its position.

        The block's end commits, an exception rolls back. A position is taken either way, since
        the block may have committed by itself. If none can be had, the session is pinned to the
        primary for ``pin_seconds``.

        Raises the driver's own error when the primary is down, and `NoNodeAvailableError` when no
        node is the primary. Writes are never repeated.
        """
        return Block(self, _writes.Writing())

    def choose(
        self,
        token: Token | None = None,
        *,
        consistency: Consistency | None = None,
        timeout: float | None = None,
    ) -> Route:
        """
        Decide where a read goes, and open nothing.

        ``timeout`` takes the place of ``wait_seconds``. The answer holds for connections that were
        open before the decision; `read` also makes sure of that for the connection that it yields.

        Raises a `RoutingError` when nothing may serve the read.
        """
        core = self._core or self._running()
        session = current_session()
        choice = core.choose_at_once(session, token, consistency)
        if choice is not None:
            if session.last_route is not choice.route or core.listens:
                core.note(session, choice.route)
            return choice.route
        asked = core.new_read(session, token, consistency, timeout)
        return self._run(_plans.choose(core, session, asked))

    def run_read(
        self,
        fn: Callable[..., _Result],
        *args: Any,
        consistency: Consistency | None = None,
        hedge_after: float | None = None,
    ) -> _Result:
        """
        Return ``fn(conn, *args)``; run it again on another node if a replica cancels or dies.

        ``fn`` runs again after a recovery conflict, a shutdown or a lost connection, on a node
        where it has not run, the primary last; what a standby refuses runs on the primary. It must
        only read, and keep nothing of ``conn``. After a write through the router it is not
        repeated.

        ``hedge_after`` seconds later a second replica that satisfies the read is asked the same,
        the first answer wins, and the other run is cancelled: for at most ``hedge_share`` of the
        reads. ``fn`` then runs twice at once, in threads of the router, and cannot write.

        Raises what ``fn`` raises, and a `RoutingError` when nothing may serve the read.
        """
        core = self._running()
        plan = self._reading(core, fn, args, consistency, hedge_after)
        result: _Result = self._run(plan)
        return result

    def token(self) -> Token:
        """
        Return the primary's position now, as a token.

        Raises `NoNodeAvailableError` when it cannot be had within ``probe_timeout``.
        """
        return self._run(_writes.primary_token(self._running()))

    def capture(self) -> None:
        """
        Advance the session past everything committed on the primary by now.

        For applications that write through an engine of their own: call it after COMMIT. A primary
        that cannot be reached raises nothing; the session is pinned to the primary instead.
        """
        _retries.note_write()
        self._run(_writes.capture(self._running(), current_session()))

    # Starting

    def _running(self) -> Core:
        if self._core is None and self._opened:
            self.open()
        return super()._running()

    def _start(self) -> None:
        core = self._new_core(self._kick)
        pools: dict[str, Any] = {}
        for name in self._sources:
            given = self._is_given(name)
            pools[name] = self._open_given(name) if given else self._new_pool(core, name)
        events = [threading.Event() for _ in self._sources]
        waiters = [
            core.cluster.wait_for_observation(name, float("-inf"), event.set)
            for name, event in zip(self._sources, events, strict=True)
        ]
        self._pools = pools
        self._monitors = MonitorThread(
            lambda: [Monitor(name, self._monitor_connect(name), core) for name in self._sources]
        )
        self._monitors.start()
        self._start_workers()
        ends = monotonic() + self._settings.open_timeout
        for waiter, event in zip(waiters, events, strict=True):
            wait(core, waiter, event, ends - monotonic())
        for name, pool in pools.items():
            if not self._is_given(name):
                pool.open(wait=False)
        self._core = core

    def _stop(self) -> None:
        monitors, self._core, self._monitors = self._monitors, None, None
        self._stop_workers()
        if monitors is not None:
            monitors.stop()
        # The pools stay known: a connection in use goes back to a closed pool, which closes it.
        for name, pool in self._pools.items():
            if not self._is_given(name):
                pool.close()

    def _new_pool(self, core: Core, name: str) -> ConnectionPool[Any]:
        users = self._settings.pool_options.get("configure")

        def configure(conn: Connection) -> None:
            if users is not None:
                users(conn)
            if _wire.is_idle(conn):
                self._fit_to_pooler(conn, self._run(_connections.meet(core, name, conn)))

        try:
            return ConnectionPool(**self._pool_arguments(name, configure))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"pool_options: {error}") from None

    def _after_fork(self) -> None:
        super()._after_fork()
        self._reset_workers()
        self._monitors = None
        self._open_lock = threading.Lock()
        if self._inherited_names:
            self._opened = False

    # Steps

    def _run(self, plan: _steps.Plan[_Result]) -> _Result:
        methods = self._methods
        try:
            step = next(plan)
            while True:
                try:
                    result = methods[type(step)](step)
                except BaseException as error:
                    step = plan.throw(error)
                else:
                    step = plan.send(result)
        except StopIteration as done:
            value: _Result = done.value
            return value

    def _checkout(self, step: _steps.Checkout) -> Connection:
        pool: ConnectionPool[Any] = self._pools[step.node]
        timeout = step.timeout
        dead: psycopg.OperationalError | None = None
        while True:
            try:
                conn: Connection = pool.getconn(timeout)
            except PoolTimeout as busy:
                error = dead or PoolTimeout(self._explained(step.node, busy))
                raise _steps.NodeFailure(error, down=dead is not None) from None
            except psycopg.Error as error:
                raise _steps.NodeFailure(error, down=False) from None
            if _wire.is_alive(conn):
                return conn
            dead = psycopg.OperationalError(f"{step.node} has closed its connections")
            timeout = step.renew_seconds
            conn.close()
            pool.putconn(conn)

    def _return(self, step: _steps.Return) -> None:
        if step.discard:
            step.conn.close()
        lost = step.conn.closed and not step.discard
        try:
            self._pools[step.node].putconn(step.conn)
        except ValueError:
            # The router was closed and opened again in between: this pool is another.
            step.conn.close()
        if lost and self._core is not None:
            self._core.lost(step.node)

    def _fetch(self, step: _steps.Fetch) -> _steps.Reply:
        return _wire.fetch(step, self._settings.probe_timeout)

    def _commit(self, step: _steps.Commit) -> _steps.Reply | None:
        if step.statement is None or not _wire.can_ask_at_commit(step.conn):
            step.conn.__exit__(None, None, None)
            return None
        return _wire.commit(step, self._settings.probe_timeout)

    def _set_read_only(self, step: _steps.SetReadOnly) -> None:
        step.conn.set_read_only(step.value)

    def _await_position(self, step: _steps.AwaitPosition) -> None:
        core = self._running()
        event = threading.Event()
        waiter = core.cluster.wait_for_position(step.required, event.set, step.since)
        for name in self._sources:
            self._kick(name)
        wait(core, waiter, event, step.seconds)

    def _await_observation(self, step: _steps.AwaitObservation) -> Observation | None:
        core = self._core
        if core is None:
            # The router was closed while a read or a write was under way.
            return None
        known = core.cluster.nodes[step.node].newest
        if known is not None and known.sent_at >= step.after:
            return known
        event = threading.Event()
        waiter = core.cluster.wait_for_observation(step.node, step.after, event.set)
        self._kick(step.node)
        wait(core, waiter, event, self._settings.probe_timeout)
        return waiter.seen

    def _await_turn(self, step: _steps.AwaitTurn) -> None:
        core = self._running()
        event = threading.Event()
        wait(core, core.cluster.wait_for_fallback(event.set), event, step.seconds)

    def _kick(self, name: str) -> None:
        if self._monitors is not None:
            self._monitors.kick(name)
