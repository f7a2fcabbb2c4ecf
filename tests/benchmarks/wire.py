"""
A relay before a server that counts the round trips of its clients, by what the server answers.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

_CHUNK_BYTES: Final = 65_536
_HEADER_BYTES: Final = 5
_READY_FOR_QUERY: Final = ord("Z")


class CountingRelay:
    """
    Forward TCP connections to a server for the time of a `with` block, and count.

    A client of libpq waits for ReadyForQuery before it goes on, so each is the end of one round
    trip (but that of a new connection). Who has its answer has been counted: the count is exact.
    """

    def __init__(self, conninfo: str) -> None:
        given = conninfo_to_dict(conninfo)
        self._address = (str(given["host"]), int(str(given["port"])))
        self._listener = socket.create_server(("127.0.0.1", 0))
        # Without encryption every byte after the start is part of a message.
        plain = {"sslmode": "disable", "gssencmode": "disable"}
        here = {"host": "127.0.0.1", "port": self._listener.getsockname()[1]}
        self.conninfo = make_conninfo(conninfo, **plain, **here)
        self.round_trips = 0
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each in (self._listener, *self._sockets):
            _end(each)
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._sockets):
            each.close()

    def _start(self, body: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=body, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._address)
                for each in (client, server):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets += [client, server]
                self._start(self._carry, client, server, _ignore)
                self._start(self._carry, server, client, self._counter())

    def _carry(
        self, source: socket.socket, sink: socket.socket, see: Callable[[bytes], None]
    ) -> None:
        with suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                see(data)
                sink.sendall(data)
        _end(sink)

    def _counter(self) -> Callable[[bytes], None]:
        held = bytearray()

        def see(data: bytes) -> None:
            held.extend(data)
            while len(held) >= _HEADER_BYTES:
                end = 1 + int.from_bytes(held[1:_HEADER_BYTES], "big")
                if len(held) < end:
                    break
                if held[0] == _READY_FOR_QUERY:
                    with self._lock:
                        self.round_trips += 1
                del held[:end]

        return see


def _ignore(data: bytes) -> None:
    return None


def _end(side: socket.socket) -> None:
    # Wakes whoever waits for it in another thread, which closing would not.
    with suppress(OSError):
        side.shutdown(socket.SHUT_RDWR)
