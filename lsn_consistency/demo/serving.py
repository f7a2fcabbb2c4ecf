"""
The demo from start to end: servers, application, and what the terminal shows.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import threading
import time
import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Final

import httpx
import uvicorn
from rich.console import Console
from starlette.types import ASGIApp

from lsn_consistency.demo.app import make_app
from lsn_consistency.demo.check import ShopError, number_of_reads, play
from lsn_consistency.demo.console import counting, starting
from lsn_consistency.demo.stage import LATE_REPLICA, REPLICAS, Stage
from lsn_consistency.demo.tally import Tally, make_table, objections, total
from lsn_consistency.testing import EmbeddedCluster
from lsn_consistency.tokens import TokenCodec

HOST: Final = "127.0.0.1"
MAX_CONCURRENCY: Final = 200
BACKLOG: Final = 128
SHUTDOWN_SECONDS: Final = 2


class PortInUseError(Exception):
    """
    Say that somebody else listens on the port.
    """


@dataclass(frozen=True, slots=True)
class Options:
    """
    Hold what the command line asks for; ``port`` 0 takes a free one.
    """

    port: int
    apply_delay: float
    bindir: str | None
    open_browser: bool
    reads: int
    secret_key: str | None = field(repr=False)


def serve(options: Options) -> int:
    """
    Serve the page until a signal ends it, and return the exit status.

    Raises `PortInUseError`, `ConfigurationError` and `ClusterError`.
    """
    console = Console()
    with _ready(options, console) as (listener, stage, key):
        url = _url(listener)

        def announce() -> None:
            console.print(f"The shop is open at {url}", style="bold", soft_wrap=True)
            late = f"{LATE_REPLICA} applies commits {options.apply_delay:g} s late. "
            console.print(f"{late if options.apply_delay else ''}Ctrl-C ends everything.")
            if options.open_browser:
                threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

        server = _server(make_app(stage, key, announce))
        asyncio.run(server.serve(sockets=[listener]))
        return 0 if server.started else 1


def check(options: Options) -> int:
    """
    Play the scenario, print its table and the verdict, and return the exit status.

    Raises `ConfigurationError` and `ClusterError`.
    """
    console = Console()
    began = time.monotonic()
    with _ready(options, console) as (listener, stage, key):
        server = _server(make_app(stage, key, lambda: None))
        try:
            tallies = asyncio.run(_played(server, listener, options, console))
        except (ShopError, httpx.HTTPError, TimeoutError, ExceptionGroup) as error:
            return _judge(console, [f"the scenario could not be played: {_cause(error)}"])
    console.print(make_table(tallies))
    seconds = time.monotonic() - began
    found = total(tallies)
    console.print(
        f"{found.stale} of {found.reads} reads with a token were stale, "
        f"{found.twin_stale} of {found.twin_reads} without one; {seconds:.0f} s.",
        highlight=False,
    )
    return _judge(console, objections(tallies))


def _judge(console: Console, reasons: list[str]) -> int:
    for reason in reasons:
        console.print(f"FAILED: {reason}", style="bold red", markup=False, soft_wrap=True)
    if not reasons:
        console.print("PASSED", style="bold green")
    return 1 if reasons else 0


async def _played(
    server: uvicorn.Server, listener: socket.socket, options: Options, console: Console
) -> list[Tally]:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    with counting(console, number_of_reads(options.reads)) as on_read:
        playing = asyncio.create_task(
            play(_url(listener), options.reads, options.apply_delay, on_read)
        )
        try:
            # The server ends first when a signal asks it to.
            await asyncio.wait((serving, playing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            server.should_exit = True
            playing.cancel()
            await asyncio.gather(serving, playing, return_exceptions=True)
    if playing.cancelled():
        raise ShopError("the shop closed before the end")
    return playing.result()


def _cause(error: BaseException) -> str:
    # The clients run in a task group, which wraps what they raise.
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


@contextmanager
def _ready(options: Options, console: Console) -> Iterator[tuple[socket.socket, Stage, str]]:
    """
    Yield a listening socket, the running servers, and the key; what can be refused comes first.
    """
    key = secrets.token_hex(32) if options.secret_key is None else options.secret_key
    TokenCodec(key)
    with (
        _quiet(),
        _listening(options.port) as listener,
        _cluster(options, console) as cluster,
    ):
        yield listener, Stage.prepare(cluster, options.apply_delay), key


@contextmanager
def _cluster(options: Options, console: Console) -> Iterator[EmbeddedCluster]:
    with ExitStack() as stack:
        with starting(console) as report:
            cluster = EmbeddedCluster(REPLICAS, bindir=options.bindir, progress=report)
            stack.enter_context(cluster)
        yield cluster


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """
    Listen before the servers are started: a port in use is told at once, an early visitor waits.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen(BACKLOG)
        except OSError as error:
            raise PortInUseError(f"port {port} of {HOST} cannot be used ({error})") from None
        yield listener


def _url(listener: socket.socket) -> str:
    return f"http://{HOST}:{listener.getsockname()[1]}"


def _server(app: ASGIApp) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            limit_concurrency=MAX_CONCURRENCY,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """
    Leave warnings about servers that a visitor has stopped to the page, which shows them.
    """
    loggers = [logging.getLogger(name) for name in ("lsn_consistency", "psycopg.pool")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
