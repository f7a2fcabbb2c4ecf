"""
The monitor of one node: probes on a connection of its own.

There is one monitor a node and process, whatever the request rate, and at most one probe of it in
flight. It runs on an event loop: the async router's own, or for the blocking router a loop in a
thread of the router's. It probes every poll interval, at once when asked, every few milliseconds
while a read waits for a position, and less and less often while the node fails. Between probes it
watches its socket, so a server that stops or crashes is known in milliseconds.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from lsn_consistency import _wire
from lsn_consistency._core import Core
from lsn_consistency._nodes import FIRST_RETRY_SECONDS, MANY_READS
from lsn_consistency._observation import Observation
from lsn_consistency._replay_wait import ReplayWait
from lsn_consistency._replication import TimelineSource
from lsn_consistency._sql import WAIT_FOR_VERSION, Identity
from lsn_consistency._steps import Prepared, identify, observe

WAITING_POLL_SECONDS: Final = 0.004
"""Time between probes while a read waits for this node to reach its position."""

GATHER_SECONDS: Final = 0.000_25
MAX_GATHER_SECONDS: Final = 0.01
"""Time between probes, for each read in flight, while reads that have ended wait for one."""

SHORTER_SECONDS: Final = 0.001
"""Time by which a pause is cut short at least, rather than left as it is."""

_logger = logging.getLogger("lsn_consistency")
_LONG_AGO: Final = float("-inf")

FIRST_PATIENCE_SECONDS: Final = 0.5
MAX_PATIENCE_SECONDS: Final = 4.0
"""Times to a new connection to a server that goes on lagging, each twice as long as the last."""

Connect = Callable[..., Awaitable[Any]]
"""Open a connection of a node; ``replication=True`` asks for one to its walsender."""


class Monitor:
    """
    Probe one node until cancelled.
    """

    def __init__(self, name: str, connect: Connect, core: Core) -> None:
        self.name = name
        self._connect = connect
        self._core = core
        self._node = core.cluster.nodes[name]
        self._conn: Any = None
        self._process = os.getpid()
        self._identity: Identity | None = None
        self._prepared: Prepared = {}
        self._seen: Observation | None = None
        self._timelines = TimelineSource(name, connect, core)
        self._replay = ReplayWait(connect, core, self._suspect)
        self._awake = asyncio.Event()
        self._probed_at = _LONG_AGO
        self._pause_ends = _LONG_AGO
        self._patience = FIRST_PATIENCE_SECONDS
        self._leaves_at: float | None = None

    def kick(self) -> None:
        """
        Look again when the next probe is due. Call it on the monitor's loop.
        """
        if self._probed_at + self._interval() < self._pause_ends - SHORTER_SECONDS:
            self._awake.set()

    async def run(self) -> None:
        """
        Probe until cancelled, then close the connection.
        """
        try:
            while True:
                await self._pause()
                self._probed_at = self._core.clock()
                await self._probe()
        finally:
            self._close()
            await self._replay.stop()

    async def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        while (left := self._probed_at + self._interval() - self._core.clock()) > 0:
            self._pause_ends = self._core.clock() + left
            self._awake.clear()
            socket = self._watch(left)
            try:
                async with asyncio.timeout(left):
                    await self._awake.wait()
            except TimeoutError:
                return
            finally:
                if socket is not None and not loop.is_closed() and self._is_ours():
                    loop.remove_reader(socket)

    def _interval(self) -> float:
        node = self._node
        if node.waiting and not node.failures:
            many = node.in_flight if node.in_flight >= MANY_READS else 0
            return min(GATHER_SECONDS * many, MAX_GATHER_SECONDS)
        retry = node.retry_seconds(self._core.poll_seconds, random.random())
        if node.waiting:
            # Who asks for this node does not wait for a back-off, but a dead node is not hammered.
            return min(retry, FIRST_RETRY_SECONDS)
        if not node.failures and self._core.cluster.awaits_position(node):
            return retry if self._replay.covers(self._seen) else WAITING_POLL_SECONDS
        return retry

    def _watch(self, seconds: float) -> int | None:
        # The socket of an idle connection is readable when the server has closed it. The next probe
        # of a short pause tells as well.
        if self._conn is None or seconds <= MAX_GATHER_SECONDS:
            return None
        socket: int = self._conn.pgconn.socket
        asyncio.get_running_loop().add_reader(socket, self._suspect)
        return socket

    def _suspect(self) -> None:
        self._probed_at = _LONG_AGO
        self._awake.set()

    async def _probe(self) -> None:
        core = self._core
        try:
            if self._conn is None:
                async with asyncio.timeout(core.settings.connect_timeout):
                    self._conn = await self._connect()
                self._identity = self._seen = None
                self._prepared = {}
            seen = await self._observe()
        except Exception as error:
            self._close()
            core.failed(self.name, error)
        else:
            self._seen = core.observed(self.name, seen, sample=True, before=self._seen)
            if self._conn.info.server_version >= WAIT_FOR_VERSION:
                self._replay.tend(self._seen)
            self._leave_if_lagging(self._seen)
            await self._timelines.ask(self._seen)

    def _leave_if_lagging(self, seen: Observation) -> None:
        # An endpoint may hide other servers than the one that is watched: a new connection may
        # reach a better one, and shows that there are several.
        core = self._core
        now = core.clock()
        if not seen.in_recovery or not core.lags(seen):
            self._patience, self._leaves_at = FIRST_PATIENCE_SECONDS, None
        elif self._leaves_at is None:
            # At first no lag is known: the primary has not been observed yet.
            self._leaves_at = now + self._patience
        elif now >= self._leaves_at:
            self._close()
            self._patience = min(2 * self._patience, MAX_PATIENCE_SECONDS)
            self._leaves_at = now + self._patience

    async def _observe(self) -> Observation:
        timeout = self._core.settings.probe_timeout
        if self._identity is None or self._seen is None:
            self._identity, seen = await _wire.run_async(identify(self._conn), timeout)
            return seen
        known = observe(
            self._conn,
            self._identity,
            in_recovery=self._seen.in_recovery,
            prepared=self._prepared,
        )
        return await _wire.run_async(known, timeout)

    def _close(self) -> None:
        if not self._is_ours():
            self._timelines.forget()
            self._replay.forget()
        elif self._conn is not None:
            self._conn.pgconn.finish()
        self._timelines.close()
        self._conn = None

    def _is_ours(self) -> bool:
        # A forked child that collects what it inherited must not end the parent's session, nor
        # touch the selector that both share.
        return os.getpid() == self._process


class MonitorThread:
    """
    Run monitors on an event loop in a daemon thread, for the blocking router.
    """

    def __init__(self, monitors: Callable[[], Iterable[Monitor]]) -> None:
        self._make = monitors
        self._monitors: dict[str, Monitor] = {}
        self._loop = asyncio.SelectorEventLoop()
        self._started = threading.Event()
        self._thread = threading.Thread(
            target=self._main, name="lsn_consistency monitors", daemon=True
        )

    def start(self) -> None:
        """
        Start the thread and return when the monitors run.
        """
        self._thread.start()
        self._started.wait()

    def kick(self, name: str) -> None:
        """
        Have a monitor look again, from any thread; too late is harmless.
        """
        monitor = self._monitors.get(name)
        if monitor is not None and not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(monitor.kick)
            except RuntimeError:
                # The loop was closed in between: the router closes.
                return

    def stop(self) -> None:
        """
        End the monitors and the thread.
        """
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join()

    def _cancel(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._run())
        except asyncio.CancelledError:
            _logger.debug("the monitors ended")
        finally:
            self._loop.close()
            self._started.set()

    async def _run(self) -> None:
        self._monitors = {monitor.name: monitor for monitor in self._make()}
        self._started.set()
        await asyncio.gather(*(monitor.run() for monitor in self._monitors.values()))
