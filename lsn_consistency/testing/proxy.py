"""
A TCP proxy before one server, to break the network between it and an application.

::

    with TcpProxy(pg.replicas["replica_1"]) as proxy:
        app = make_app(pg.primary.conninfo, [proxy.conninfo])
        proxy.black_hole()               # nothing answers, and nothing says so
        ...
        proxy.heal()

It has a thread with an event loop of its own, so blocking and async applications can stand on it
alike. The methods return when the fault is there, after about a millisecond.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from lsn_consistency.testing._errors import ClusterError
from lsn_consistency.testing._links import Link, Weather
from lsn_consistency.testing._server import Server
from lsn_consistency.testing._workspace import LOOPBACK, free_port

__all__ = ["TcpProxy"]

CALL_SECONDS = 10.0
BACKLOG = 128
BIND_TRIALS = 20


class TcpProxy:
    """
    Forward TCP connections from a port of 127.0.0.1 to one server, for the time of a `with` block.

    `target` is a node of a cluster, or the conninfo of any server that is reached over TCP. Bytes
    in flight are bounded: a server that does not read holds its clients back. `close()` leaves no
    thread and no socket behind. Faults add up; `heal()` ends them all. Raises `ClusterError`.
    """

    def __init__(self, target: Server | str) -> None:
        self.host = LOOPBACK
        self.port = 0
        self._target = target
        self._weather = Weather()
        self._links: dict[Link, asyncio.Task[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._listener: socket.socket | None = None
        self._refusing = False

    def __repr__(self) -> str:
        return f"<TcpProxy port {self.port} to port {self._address()[1]}>"

    # -- connecting -----------------------------------------------------------------------------

    @property
    def conninfo(self) -> str:
        """
        The conninfo of the server, over this proxy.
        """
        return self.conninfo_for()

    def conninfo_for(self, user: str | None = None, **options: str | int) -> str:
        """
        Return the conninfo for another account, or with any other libpq option.
        """
        given: dict[str, Any] = {**conninfo_to_dict(self._server), **options}
        given.pop("hostaddr", None)
        if user is not None:
            given["user"] = user
        return make_conninfo(**{**given, "host": self.host, "port": self.port})

    @property
    def connections(self) -> int:
        """
        How many connections the proxy holds, also those that lead nowhere.
        """
        return len(self._links)

    @property
    def _server(self) -> str:
        return self._target if isinstance(self._target, str) else self._target.conninfo

    def _address(self) -> tuple[str, int]:
        """Return where the server listens."""
        given = conninfo_to_dict(self._server)
        host = given.get("hostaddr") or given.get("host") or LOOPBACK
        return str(host), int(given.get("port") or 5432)

    # -- life -----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """
        Listen and forward; when this returns, connections are accepted.
        """
        if self._loop is not None:
            raise ClusterError("the proxy is running already")
        self._listener = self._bind()
        self._loop = asyncio.new_event_loop()
        name = f"TcpProxy {self.port}"
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()
        try:
            self._carry_out(self._listen)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """
        End all connections with a reset and stop listening; nothing if it is closed already.
        """
        if self._loop is None or self._thread is None:
            return
        self._carry_out(self._close_listener)
        self._abort(list(self._links))
        # Host names are looked up in threads of the loop.
        self._await(self._loop.shutdown_default_executor())
        loop, self._loop = self._loop, None
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()
        self._weather = Weather()
        self._refusing = False

    # -- faults ---------------------------------------------------------------------------------

    def latency(self, seconds: float) -> None:
        """
        Deliver everything that many seconds late, in each direction; 0 ends it.

        Order stays, and many bytes can be on their way at once. Connecting takes no longer: the
        first packet over the connection does.
        """
        self._carry_out(lambda: setattr(self._weather, "latency_seconds", seconds))

    def black_hole(self) -> None:
        """
        Take everything and deliver nothing, neither data nor ends, as if packets were dropped.

        New connections are accepted and get no answer. With `heal()` connections that have lost
        something are reset; those that were silent meanwhile go on.
        """

        def drop() -> None:
            self._weather.black_hole = True
            for link in self._links:
                link.lose_what_is_in_flight()

        self._carry_out(drop)

    def reset(self) -> None:
        """
        Break all connections with a reset (RST) to both sides; new ones work.
        """
        self._abort(list(self._links))

    def half_open(self) -> None:
        """
        End all connections at the server, and tell the clients nothing.

        To a client the connection looks alive: what it sends is taken, and no answer comes, until
        `heal()` resets it. New connections work.
        """

        def sever() -> None:
            for link in self._links:
                link.sever()

        self._carry_out(sever)

    def refuse(self) -> None:
        """
        Refuse new connections, as a host without a server does; those that exist go on.
        """

        def shut() -> None:
            if self._refusing:
                return
            self._close_listener()
            # Bound and not listening: connections are refused, and nobody is given the port who
            # asks for any.
            self._listener = _bound(self.port)
            self._refusing = True

        self._carry_out(shut)

    def heal(self) -> None:
        """
        End all faults; connections over which something was lost are reset.
        """

        def clear() -> None:
            self._weather.black_hole = False
            self._weather.latency_seconds = 0.0
            if self._refusing:
                self._listen()

        self._carry_out(clear)
        self._abort([link for link in list(self._links) if link.lost])

    # -- on the loop ----------------------------------------------------------------------------

    def _carry_out(self, step: Callable[[], None]) -> None:
        """Run a step in the proxy's own thread, and return when it is done."""

        async def run() -> None:
            step()

        self._await(run())

    def _abort(self, links: list[Link]) -> None:
        """Reset connections, and return when they are."""

        async def abort() -> None:
            tasks = [self._links[link] for link in links if link in self._links]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

        self._await(abort())

    def _await(self, coroutine: Coroutine[None, None, None]) -> None:
        """Wait for a coroutine on the proxy's loop."""
        if self._loop is None:
            coroutine.close()
            raise ClusterError("the proxy is not running: use it in a with block, or start() it")
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(CALL_SECONDS)

    def _bind(self) -> socket.socket:
        """Return a socket bound to a free port, which from now on is that of the proxy."""
        for _ in range(BIND_TRIALS):
            port = self.port or free_port()
            with suppress(OSError):
                listener = _bound(port)
                self.port = port
                return listener
        raise ClusterError(f"no port on {self.host} for a proxy in {BIND_TRIALS} trials")

    def _listen(self) -> None:
        """Accept connections on the bound socket."""
        if self._listener is not None:
            try:
                self._listener.listen(BACKLOG)
            except OSError as error:
                # Being bound to it does not keep out who asks for this very port.
                raise ClusterError(f"port {self.port} has been taken: {error}") from error
            asyncio.get_running_loop().add_reader(self._listener, self._accept)
            self._refusing = False

    def _close_listener(self) -> None:
        """Stop listening and let go of the port."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        """Take a connection that waits, and carry it."""
        if self._listener is None:
            return
        try:
            client, _ = self._listener.accept()
        except OSError:
            # Who waited has gone again.
            return
        link = Link(client, self._weather, self._address)
        task = asyncio.get_running_loop().create_task(link.run())
        self._links[link] = task

        def forget(_: asyncio.Task[None]) -> None:
            del self._links[link]
            # A task that is cancelled before its first step has closed nothing.
            link.close()

        task.add_done_callback(forget)


def _bound(port: int) -> socket.socket:
    """Return a socket that is bound to a port of the loopback address."""
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setblocking(False)
        bound.bind((LOOPBACK, port))
    except OSError:
        bound.close()
        raise
    return bound
