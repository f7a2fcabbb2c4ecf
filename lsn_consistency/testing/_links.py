"""
One client of a `TcpProxy` and its way to the server: bytes in flight, lost bytes, ends.

Everything here runs on the proxy's own event loop. What is in flight is bounded, so that a server
that does not read holds its client back as it would without a proxy.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["CHUNKS_IN_FLIGHT", "CHUNK_BYTES", "Link", "Weather"]

CHUNK_BYTES = 65_536
CHUNKS_IN_FLIGHT = 64
"""In each direction; with a latency the throughput is at most 4 MiB in the time of one way."""

_RESET = struct.pack("ii", 1, 0)
_END = b""
_Way: TypeAlias = "asyncio.Queue[tuple[float, bytes]]"


@dataclass
class Weather:
    """
    What the network does at the moment, to all links of a proxy.
    """

    latency_seconds: float = 0.0
    black_hole: bool = False


class Link:
    """
    A connection that the proxy accepted; `run()` carries its bytes until both sides have ended.
    """

    def __init__(
        self, client: socket.socket, weather: Weather, address: Callable[[], tuple[str, int]]
    ) -> None:
        self.lost = False
        self._client = client
        self._server: socket.socket | None = None
        self._weather = weather
        self._address = address
        self._severed = False
        self._broken = False
        self._carrying: asyncio.Task[None] | None = None
        self._ways: tuple[_Way, ...] = ()
        _prepare(client)

    async def run(self) -> None:
        """
        Connect to the server and carry everything both ways; never raises for the network.
        """
        self._carrying = asyncio.create_task(self._carry())
        try:
            await asyncio.wait([self._carrying])
            if self._severed:
                self._close(self._server)
                await self._swallow()
            elif not self._broken:
                self._close(self._server)
                self._close(self._client)
        finally:
            # The sockets must be out of the loop's hands before they are closed. Who is still
            # connected by now gets a reset: the link was broken, or is given up.
            self._carrying.cancel()
            await asyncio.wait([self._carrying])
            self.close()

    # -- faults ---------------------------------------------------------------------------------

    def lose_what_is_in_flight(self) -> None:
        """
        Drop what was accepted and not delivered; what comes is dropped while the hole is there.
        """
        for way in self._ways:
            while not way.empty():
                way.get_nowait()
                self.lost = True

    def sever(self) -> None:
        """
        Close the server's side and keep the client's open, which is never told.
        """
        self._severed = self.lost = True
        if self._carrying is not None:
            self._carrying.cancel()

    # -- carrying -------------------------------------------------------------------------------

    async def _carry(self) -> None:
        """Carry both directions; an error of either side ends both."""
        if self._weather.black_hole:
            self.lost = True
            await self._swallow()
            return
        server = self._server = socket.socket()
        _prepare(server)
        there: _Way = asyncio.Queue(CHUNKS_IN_FLIGHT)
        back: _Way = asyncio.Queue(CHUNKS_IN_FLIGHT)
        self._ways = (there, back)
        try:
            await asyncio.get_running_loop().sock_connect(server, self._address())
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive(self._client, there))
                group.create_task(self._deliver(there, server))
                group.create_task(self._receive(server, back))
                group.create_task(self._deliver(back, self._client))
        except* OSError:
            self._broken = True

    async def _receive(self, source: socket.socket, way: _Way) -> None:
        """Take what one side sends, up to its end, and say when the other side may have it."""
        loop = asyncio.get_running_loop()
        data = b"begin"
        while data != _END:
            try:
                data = await loop.sock_recv(source, CHUNK_BYTES)
            except OSError:
                # A black hole lets nothing out, not even the word that one side has crashed.
                if not self._weather.black_hole:
                    raise
                data = _END
            if self._weather.black_hole:
                self.lost = True
            else:
                await way.put((loop.time() + self._weather.latency_seconds, data))

    async def _deliver(self, way: _Way, sink: socket.socket) -> None:
        """Give one side what the other sent, in order, each piece when it is due."""
        loop = asyncio.get_running_loop()
        data = b"begin"
        while data != _END:
            due, data = await way.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if self._weather.black_hole:
                self.lost = True
            elif data == _END:
                sink.shutdown(socket.SHUT_WR)
            else:
                await loop.sock_sendall(sink, data)

    async def _swallow(self) -> None:
        """Take what the client sends and drop it, until the client goes."""
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            while await loop.sock_recv(self._client, CHUNK_BYTES):
                continue

    # -- ending ---------------------------------------------------------------------------------

    def close(self) -> None:
        """
        Close what is open still, with a reset.
        """
        self._close(self._server, reset=True)
        self._close(self._client, reset=True)

    def _close(self, side: socket.socket | None, *, reset: bool = False) -> None:
        """Close one side, so that who is there sees an end, or else a reset; once."""
        if side is None or side.fileno() == -1:
            return
        if reset:
            with suppress(OSError):
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        side.close()


def _prepare(side: socket.socket) -> None:
    """Make a socket ready for the loop; the proxy adds no delay of its own to small packets."""
    side.setblocking(False)
    side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
