"""
How a router calls the function of ``run_read``, and runs it beside its caller: tasks or threads.

A loser is asked to end in the gentlest way first: its statement is cancelled on the server, and its
connection goes back to the pool. A server that does not react within `CANCEL_SECONDS`, frozen or
behind a dead network, is not waited for: the connection is cut off and thrown away.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from lsn_consistency import _wire
from lsn_consistency._core import Core
from lsn_consistency._hedges import HedgeBudget
from lsn_consistency._retries import Ended, Work
from lsn_consistency._runs import Hedging, run_read
from lsn_consistency._settings import Settings, check_seconds
from lsn_consistency._steps import Abandon, AwaitRace, Call, Plan, Spawn
from lsn_consistency.consistency import Consistency
from lsn_consistency.session import current_session

CANCEL_SECONDS: Final = 1.0
"""How long a loser has to end after it was cancelled, and again after it was cut off."""

MAX_RUNS: Final = 32
"""How many runs a blocking router has in its threads at once; more reads run unhedged."""

_logger = logging.getLogger("lsn_consistency")


class Workers:
    """
    Hold what both kinds of router have for ``run_read``.
    """

    _settings: Settings

    def _reset_workers(self) -> None:
        self._budget = HedgeBudget(self._settings.hedge_share)

    def _reading(
        self,
        core: Core,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        consistency: Consistency | None,
        hedge_after: float | None,
    ) -> Plan[Any]:
        if hedge_after is None:
            work, hedging = Work(fn, args, hedged=False), None
        else:
            check_seconds("hedge_after", hedge_after)
            work, hedging = Work(fn, args, hedged=True), Hedging(hedge_after, self._budget)
        return run_read(core, current_session(), work, consistency, hedging)


class Threads(Workers):
    """
    Call functions in the threads of a blocking router, as it carries out its steps.
    """

    _run: Callable[[Plan[Any]], Any]

    def _reset_workers(self) -> None:
        super()._reset_workers()
        # A fork copies neither the threads nor who holds the lock.
        self._executor: ThreadPoolExecutor | None = None
        self._executor_lock = threading.Lock()
        self._runs = 0

    def _start_workers(self) -> None:
        with self._executor_lock:
            # Threads start when they are needed. Each run may need one more, to be cancelled from.
            self._executor = ThreadPoolExecutor(
                2 * MAX_RUNS, thread_name_prefix="lsn_consistency run_read"
            )

    def _stop_workers(self) -> None:
        with self._executor_lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)

    def _call(self, step: Call) -> Ended:
        try:
            with step.work.running(), step.conn as conn:
                ended = Ended(step.work.fn(conn, *step.work.args))
                self._run(step.last)
            ended = ended._replace(clean=_wire.is_idle(step.conn))
        except BaseException as error:
            if step.run is None and not isinstance(error, Exception):
                raise
            ended = _wire.ended(step.conn, error)
        if step.run is not None and not step.run.end(2 * CANCEL_SECONDS):
            return ended._replace(clean=False)
        return ended

    def _spawn(self, step: Spawn) -> bool:
        if self._submit(step):
            return True
        if step.run is None:
            # The router was closed meanwhile: what is to be ended is ended here.
            self._run(step.plan)
        return step.run is None

    def _submit(self, step: Spawn) -> bool:
        counted = step.run is not None
        with self._executor_lock:
            if self._executor is None or (counted and self._runs >= MAX_RUNS):
                return False
            try:
                self._executor.submit(contextvars.copy_context().run, self._spawned, step)
            except RuntimeError:
                # The interpreter ends.
                return False
            self._runs += counted
        return True

    def _spawned(self, step: Spawn) -> None:
        try:
            self._run(step.plan)
        except Exception:
            _logger.exception("a run of run_read broke off")
        finally:
            with self._executor_lock:
                self._runs -= step.run is not None

    def _await_race(self, step: AwaitRace) -> None:
        over = threading.Event()
        step.race.notify(over.set)
        over.wait(step.seconds)

    def _abandon(self, step: Abandon) -> None:
        run = step.run
        with run.interrupting() as conn:
            if conn is None:
                # It opens a connection, which has its time limit, or gives one back.
                return
            heard = _wire.cancel(conn, CANCEL_SECONDS)
        if heard and run.wait(CANCEL_SECONDS):
            return
        with run.cutting() as conn:
            if conn is None:
                return
            if heard:
                # It has gone on with another statement, which would not notice the cut.
                _wire.cancel(conn, CANCEL_SECONDS)
            _wire.cut(conn)


class Tasks(Workers):
    """
    Call functions in tasks of an async router's loop, as it carries out its steps.
    """

    _run: Callable[[Plan[Any]], Awaitable[Any]]

    def _reset_workers(self) -> None:
        super()._reset_workers()
        self._runs: set[asyncio.Task[None]] = set()
        self._ends: set[asyncio.Task[None]] = set()

    async def _stop_workers(self) -> None:
        await asyncio.gather(*self._ends, return_exceptions=True)

    async def _call(self, step: Call) -> Ended:
        try:
            with step.work.running():
                async with step.conn as conn:
                    ended = Ended(await step.work.fn(conn, *step.work.args))
                    await self._run(step.last)
            ended = ended._replace(clean=_wire.is_idle(step.conn))
        except BaseException as error:
            if step.run is None and not isinstance(error, Exception):
                raise
            ended = _wire.ended(step.conn, error)
        if step.run is not None and not step.run.end(0.0):
            return ended._replace(clean=False)
        return ended

    async def _spawn(self, step: Spawn) -> bool:
        task = asyncio.create_task(self._spawned(step))
        if step.run is not None:
            step.run.task = task
        kept = self._ends if step.run is None else self._runs
        kept.add(task)
        task.add_done_callback(kept.discard)
        return True

    async def _spawned(self, step: Spawn) -> None:
        try:
            await self._run(step.plan)
        except Exception:
            _logger.exception("a run of run_read broke off")

    async def _await_race(self, step: AwaitRace) -> None:
        over = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not over.done():
                over.set_result(None)

        step.race.notify(wake)
        try:
            async with asyncio.timeout(step.seconds):
                await over
        except TimeoutError:
            return

    async def _abandon(self, step: Abandon) -> None:
        run = step.run
        if run.task is None:
            return
        # psycopg answers a cancellation by a request of its own, and waits for the statement's end.
        # It stops waiting at the second one; so does a function that has suppressed the first.
        gently = 2 if _wire.can_cancel() or not run.has_begun else 0
        for _ in range(gently):
            if not run.is_over:
                run.task.cancel()
            if await _has_ended(run.task):
                return
        with run.cutting() as conn:
            if conn is not None:
                _wire.cut(conn)
        if not await _has_ended(run.task) and not run.is_over:
            run.task.cancel()
            await _has_ended(run.task)


async def _has_ended(task: asyncio.Task[None]) -> bool:
    done, _ = await asyncio.wait({task}, timeout=CANCEL_SECONDS)
    return bool(done)
