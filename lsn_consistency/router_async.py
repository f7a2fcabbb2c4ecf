"""
The async router: tasks wait, the plans decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Self, TypeVar, Unpack

import psycopg
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from lsn_consistency import _connections, _plans, _retries, _steps, _wire, _writes
from lsn_consistency._base import BaseRouter
from lsn_consistency._blocks import AsyncBlock
from lsn_consistency._core import Core
from lsn_consistency._monitor import Monitor
from lsn_consistency._observation import Observation
from lsn_consistency._settings import RouterOptions
from lsn_consistency._waiting import AsyncWaiting, Deadlines, Gathering, known, whole
from lsn_consistency._workers import Tasks
from lsn_consistency.consistency import Consistency
from lsn_consistency.exceptions import ConfigurationError
from lsn_consistency.route import Route
from lsn_consistency.session import current_session
from lsn_consistency.tokens import Token

_Result = TypeVar("_Result")
Connection = psycopg.AsyncConnection[Any]


class AsyncRouter(Tasks, BaseRouter):
    """
    Route reads to replicas that have replayed what the session wrote or saw; for asyncio.

    ``primary`` is a conninfo or an open `psycopg_pool.AsyncConnectionPool`, ``replicas`` a mapping
    of names to the same. Open it with ``async with``, `open`, or an application's ``lifespan``, and
    use it on the event loop that opened it. After a fork, a child opens it anew.

    Raises `ConfigurationError` for options that cannot work.
    """

    _pool_types = (AsyncConnectionPool,)

    def __init__(
        self, *, primary: Any = None, replicas: Any = (), **options: Unpack[RouterOptions]
    ) -> None:
        super().__init__(primary, replicas, options)
        self._reset_workers()
        self._open_lock = asyncio.Lock()
        self._deadlines = Deadlines()
        self._monitors: dict[str, Monitor] = {}
        self._gatherings: dict[str, Gathering] = {}
        self._tasks: list[asyncio.Task[None]] = []

    # Life

    async def open(self) -> None:
        """
        Open the pools, start the monitors, and wait for the first observation of each node.

        A node that is down does not fail it; the wait ends after ``open_timeout``.
        """
        async with self._open_lock:
            if self._core is None:
                try:
                    await self._start()
                except BaseException:
                    await self._stop()
                    raise

    async def close(self) -> None:
        """
        End the monitors and close the pools that the router made.
        """
        async with self._open_lock:
            await self._stop()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """
        Open the router for the life of an ASGI application: ``Starlette(lifespan=...)``.
        """
        async with self:
            yield

    # Use

    def read(
        self,
        token: Token | None = None,
        *,
        consistency: Consistency | None = None,
        node: str | None = None,
    ) -> AbstractAsyncContextManager[Connection]:
        """
        Yield a read-only connection of a node that satisfies the session's token.

        ``token`` takes the place of the session's, ``consistency`` that of the block's or the
        router's level; ``node`` names a node and skips the decision. The transaction ends with
        the block. At ``CAUSAL`` and ``STRONG`` the session advances past what it can have seen.

        Raises a `RoutingError` when nothing may serve the read.
        """
        return AsyncBlock(self, _plans.Reading(token, consistency, node))

    def write(self) -> AbstractAsyncContextManager[Connection]:
        """
        Yield a connection of the primary; after COMMIT the session advances to its position.

        The block's end commits, an exception rolls back. A position is taken either way, since
        the block may have committed by itself. If none can be had, the session is pinned to the
        primary for ``pin_seconds``.

        Raises the driver's own error when the primary is down, and `NoNodeAvailableError` when no
        node is the primary. Writes are never repeated.
        """
        return AsyncBlock(self, _writes.Writing())

    async def choose(
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
        return await self._run(_plans.choose(core, session, asked))

    async def run_read(
        self,
        fn: Callable[..., Awaitable[_Result]],
        *args: Any,
        consistency: Consistency | None = None,
        hedge_after: float | None = None,
    ) -> _Result:
        """
        Return ``await fn(conn, *args)``; run it again on another node if a replica cancels or dies.

        ``fn`` runs again after a recovery conflict, a shutdown or a lost connection, on a node
        where it has not run, the primary last; what a standby refuses runs on the primary. It must
        only read, and keep nothing of ``conn``. After a write through the router it is not
        repeated.

        ``hedge_after`` seconds later a second replica that satisfies the read is asked the same,
        the first answer wins, and the other run is cancelled: for at most ``hedge_share`` of the
        reads. ``fn`` then runs twice at once, in tasks of the router, and cannot write.

        Raises what ``fn`` raises, and a `RoutingError` when nothing may serve the read.
        """
        core = self._running()
        plan = self._reading(core, fn, args, consistency, hedge_after)
        result: _Result = await self._run(plan)
        return result

    async def token(self) -> Token:
        """
        Return the primary's position now, as a token.

        Raises `NoNodeAvailableError` when it cannot be had within ``probe_timeout``.
        """
        return await self._run(_writes.primary_token(self._running()))

    async def capture(self) -> None:
        """
        Advance the session past everything committed on the primary by now.

        For applications that write through an engine of their own: call it after COMMIT. A primary
        that cannot be reached raises nothing; the session is pinned to the primary instead.
        """
        _retries.note_write()
        await self._run(_writes.capture(self._running(), current_session()))

    # Starting

    async def _start(self) -> None:
        core = self._new_core(self._kick)
        pools: dict[str, Any] = {}
        for name in self._sources:
            given = self._is_given(name)
            pools[name] = self._open_given(name) if given else self._new_pool(core, name)
        self._pools = pools
        # Timers are of one event loop.
        self._deadlines = Deadlines()
        first = [asyncio.create_task(self._first_observation(core, name)) for name in self._sources]
        for name in self._sources:
            monitor = Monitor(name, self._monitor_connect(name), core)
            self._monitors[name] = monitor
            seconds = self._settings.probe_timeout
            self._gatherings[name] = Gathering(core, name, seconds)
            task = asyncio.create_task(monitor.run(), name=f"lsn_consistency monitor {name}")
            self._tasks.append(task)
        try:
            await asyncio.gather(*first)
        except BaseException:
            for task in first:
                task.cancel()
            raise
        for name, pool in pools.items():
            if not self._is_given(name):
                await pool.open(wait=False)
        self._core = core

    async def _stop(self) -> None:
        tasks, self._core, self._tasks, self._monitors = self._tasks, None, [], {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stop_workers()
        # The pools stay known: a connection in use goes back to a closed pool, which closes it.
        for name, pool in self._pools.items():
            if not self._is_given(name):
                await pool.close()

    async def _first_observation(self, core: Core, name: str) -> None:
        waiting = AsyncWaiting(core)
        waiting.waiter = core.cluster.wait_for_observation(name, float("-inf"), waiting.end)
        await waiting.within(self._settings.open_timeout, self._deadlines)

    def _new_pool(self, core: Core, name: str) -> AsyncConnectionPool[Any]:
        users = self._settings.pool_options.get("configure")

        async def configure(conn: Connection) -> None:
            if users is not None:
                await users(conn)
            if _wire.is_idle(conn):
                self._fit_to_pooler(conn, await self._run(_connections.meet(core, name, conn)))

        try:
            return AsyncConnectionPool(**self._pool_arguments(name, configure))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"pool_options: {error}") from None

    def _after_fork(self) -> None:
        super()._after_fork()
        self._reset_workers()
        self._monitors, self._tasks = {}, []
        self._open_lock = asyncio.Lock()

    # Steps

    async def _run(self, plan: _steps.Plan[_Result]) -> _Result:
        methods = self._methods
        try:
            step = next(plan)
            while True:
                try:
                    pending = methods[type(step)](step)
                    # Many may wait for long: nothing is kept that only the beginning has needed.
                    del step
                    result = await pending
                except BaseException as error:
                    step = plan.throw(error)
                else:
                    step = plan.send(result)
        except StopIteration as done:
            value: _Result = done.value
            return value

    async def _checkout(self, step: _steps.Checkout) -> Connection:
        pool: AsyncConnectionPool[Any] = self._pools[step.node]
        timeout = step.timeout
        dead: psycopg.OperationalError | None = None
        while True:
            try:
                conn: Connection = await pool.getconn(timeout)
            except PoolTimeout as busy:
                error = dead or PoolTimeout(self._explained(step.node, busy))
                raise _steps.NodeFailure(error, down=dead is not None) from None
            except psycopg.Error as error:
                raise _steps.NodeFailure(error, down=False) from None
            if _wire.is_alive(conn):
                return conn
            dead = psycopg.OperationalError(f"{step.node} has closed its connections")
            timeout = step.renew_seconds
            await conn.close()
            await self._put_back(pool, conn)

    async def _return(self, step: _steps.Return) -> None:
        if step.discard:
            await step.conn.close()
        lost = step.conn.closed and not step.discard
        try:
            await self._put_back(self._pools[step.node], step.conn)
        except ValueError:
            # The router was closed and opened again in between: this pool is another.
            await step.conn.close()
        if lost and self._core is not None:
            self._core.lost(step.node)

    def _put_back(self, pool: Any, conn: Connection) -> Awaitable[None]:
        # The pool waits for its locks where somebody waits for a connection. Cut off there it would
        # lose both, and the connection where it has to roll back first, within time limits.
        returning = pool.putconn(conn)
        return whole(returning) if _wire.is_idle(conn) else asyncio.shield(returning)

    async def _fetch(self, step: _steps.Fetch) -> _steps.Reply:
        return await _wire.fetch_async(step, self._settings.probe_timeout)

    async def _commit(self, step: _steps.Commit) -> _steps.Reply | None:
        if step.statement is None or not _wire.can_ask_at_commit(step.conn):
            await step.conn.__aexit__(None, None, None)
            return None
        return await _wire.commit_async(step, self._settings.probe_timeout)

    async def _set_read_only(self, step: _steps.SetReadOnly) -> None:
        await step.conn.set_read_only(step.value)

    def _await_position(self, step: _steps.AwaitPosition) -> Awaitable[Observation | None]:
        core = self._running()
        waiting = AsyncWaiting(core)
        waiting.waiter = core.cluster.wait_for_position(step.required, waiting.end, step.since)
        for name in self._sources:
            self._kick(name)
        return waiting.within(step.seconds, self._deadlines)

    def _await_observation(self, step: _steps.AwaitObservation) -> Awaitable[Observation | None]:
        core = self._core
        if core is None:
            # The router was closed while a read or a write was under way.
            return known(None)
        newest = core.cluster.nodes[step.node].newest
        if newest is not None and newest.sent_at >= step.after:
            return known(newest)
        awaited = self._gatherings[step.node].join(step.after)
        self._kick(step.node)
        return awaited

    def _await_turn(self, step: _steps.AwaitTurn) -> Awaitable[Observation | None]:
        core = self._running()
        waiting = AsyncWaiting(core)
        waiting.waiter = core.cluster.wait_for_fallback(waiting.end)
        return waiting.within(step.seconds, self._deadlines)

    def _kick(self, name: str) -> None:
        if name in self._monitors:
            self._monitors[name].kick()
