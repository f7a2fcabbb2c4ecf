"""
Play a trace against the shop, as browsers with cookies do, and say what each call saw.

    python -m tests.benchmarks.shop.load CONFIG

is a process of its own. It speaks HTTP/1.1 over plain asyncio, since a client with more features
takes as much of the machine as the shop does. It prints ``measuring`` when the trace is at 0,
``over`` when its seconds have passed, and at the end what it recorded as one line of JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Final, Literal, NamedTuple

from tests.benchmarks.shop.trace import PINNING_COOKIE, SESSION_COOKIE, Call, Shape, make_trace

Loop = Literal["closed", "open"]
DRAIN_SECONDS: Final = 10.0
"""How long answers may still come when no request is sent any more."""


@dataclass(frozen=True, slots=True)
class Config:
    """
    Say what is played against which port; keys begin at ``first_key``.

    ``pin_seconds`` is the window of a sticky strategy: its sessions begin with the cookie of
    their last write before the trace, as in the middle of a day.
    """

    port: int
    shape: Shape
    loop: Loop
    first_key: int
    pin_seconds: float

    def to_text(self) -> str:
        """
        Return what the process is given on its command line.
        """
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Config:
        """
        Return what `to_text` was made of.
        """
        given = json.loads(text)
        return cls(**{**given, "shape": Shape(**given["shape"])})


class Sample(NamedTuple):
    """
    What one call saw, in seconds after the trace's 0.

    ``due`` is when it should have been sent, ``body`` the answer, which is empty for a failure.
    """

    session: int
    write: bool
    key: int
    number: int
    due: float
    began: float
    ended: float
    body: str


class Wire(asyncio.Protocol):
    """
    One connection that is kept alive; one request at a time.
    """

    def __init__(self) -> None:
        self._transport: Any = None
        self._received = b""
        self._answer: asyncio.Future[tuple[list[str], str]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("the shop closed a connection"))

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found or self._answer is None:
            return
        lines = head.decode("latin-1").split("\r\n")
        length = next(int(line[15:]) for line in lines if line[:15] == "content-length:")
        if len(body) < length:
            return
        self._received = b""
        answered = body.decode() if lines[0].split(" ", 2)[1] == "200" else ""
        if not self._answer.done():
            self._answer.set_result((lines[1:], answered))

    def send(self, request: str) -> asyncio.Future[tuple[list[str], str]]:
        """
        Send a request; the future gets the lines of the answer's head and its body.
        """
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request.encode("latin-1"))
        return self._answer

    def close(self) -> None:
        self._transport.close()


class Browser:
    """
    The cookies of one session.
    """

    def __init__(self, session: int) -> None:
        self._cookies: dict[str, tuple[str, float]] = {SESSION_COOKIE: (str(session), float("inf"))}

    def keep(self, name: str, value: str, until: float) -> None:
        """
        Keep a cookie until it expires.
        """
        self._cookies[name] = value, until

    def header(self, now: float) -> str:
        """
        Return the value of the header for the cookies that have not expired.
        """
        expired = [name for name, (_, until) in self._cookies.items() if until <= now]
        for name in expired:
            del self._cookies[name]
        return "; ".join(f"{name}={value}" for name, (value, _) in self._cookies.items())

    def take(self, lines: list[str], now: float) -> None:
        """
        Take over the cookies of an answer.
        """
        for line in lines:
            if line[:12] != "set-cookie: ":
                continue
            first, *attributes = line[12:].split("; ")
            name, _, value = first.partition("=")
            ages = [each[8:] for each in attributes if each[:8].lower() == "max-age="]
            self.keep(name, value, now + float(ages[0]) if ages else float("inf"))


class Player:
    """
    Play one trace.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._trace = make_trace(config.shape)
        self._browsers = [Browser(session) for session in range(config.shape.sessions)]
        self._idle: deque[Wire] = deque()
        self._zero = 0.0
        self.samples: list[Sample] = []
        self.cpu_seconds = 0.0

    async def play(self) -> None:
        """
        Play the whole trace.
        """
        shape = self._config.shape
        for _ in range(shape.sessions):
            self._idle.append(await self._connect())
        # Nothing of what was made so far is garbage, and no pause shall look like a slow answer.
        gc.collect()
        gc.freeze()
        self._zero = time.monotonic() + shape.warm_seconds + 0.1
        self._pin()
        tasks = [asyncio.create_task(self._measure())]
        play = self._closed if self._config.loop == "closed" else self._open
        tasks += [asyncio.create_task(play(list(calls))) for calls in self._trace.sessions]
        done, pending = await asyncio.wait(
            tasks, timeout=shape.warm_seconds + shape.seconds + DRAIN_SECONDS
        )
        for task in pending:
            task.cancel()
        for task in done:
            task.result()

    def _pin(self) -> None:
        for browser, last in zip(self._browsers, self._trace.last_writes, strict=True):
            browser.keep(PINNING_COOKIE, "y", self._zero + last + self._config.pin_seconds)

    async def _measure(self) -> None:
        await asyncio.sleep(self._zero - time.monotonic())
        print("measuring", flush=True)
        began = time.process_time()
        await asyncio.sleep(self._zero + self._config.shape.seconds - time.monotonic())
        self.cpu_seconds = time.process_time() - began
        print("over", flush=True)

    async def _closed(self, calls: list[Call]) -> None:
        due = self._zero + calls[0].at if calls else 0.0
        for call, after in pairwise([*calls, None]):
            if call is None or due > self._zero + self._config.shape.seconds:
                return
            await asyncio.sleep(due - time.monotonic())
            await self._call(call, due)
            if after is not None:
                due = time.monotonic() + after.think

    async def _open(self, calls: list[Call]) -> None:
        async with asyncio.TaskGroup() as group:
            for call, after in pairwise([*calls, None]):
                if call is None or call.follows:
                    continue
                due = self._zero + call.at
                await asyncio.sleep(due - time.monotonic())
                group.create_task(self._visit(call, after, due))

    async def _visit(self, call: Call, after: Call | None, due: float) -> None:
        await self._call(call, due)
        if after is not None and after.follows:
            due = time.monotonic() + after.think
            await asyncio.sleep(after.think)
            await self._call(after, due)

    async def _call(self, call: Call, due: float) -> None:
        browser = self._browsers[call.session]
        wire = self._idle.popleft() if self._idle else await self._connect()
        method, number = ("POST", f"/{call.number}") if call.write else ("GET", "")
        began = time.monotonic()
        request = (
            f"{method} /keys/{self._config.first_key + call.key}{number} HTTP/1.1\r\nHost: shop\r\n"
            f"Cookie: {browser.header(began)}\r\n"
            f"{'Content-Length: 0' if call.write else 'Accept: text/plain'}\r\n\r\n"
        )
        body = ""
        try:
            lines, body = await wire.send(request)
            browser.take(lines, time.monotonic())
            self._idle.append(wire)
        except ConnectionError:
            wire.close()
        ended = time.monotonic()
        zero = self._zero
        self.samples.append(
            Sample(
                call.session,
                call.write,
                call.key,
                call.number,
                due - zero,
                began - zero,
                ended - zero,
                body,
            )
        )

    async def _connect(self) -> Wire:
        _, wire = await asyncio.get_running_loop().create_connection(
            Wire, "127.0.0.1", self._config.port
        )
        return wire


def main() -> None:
    config = Config.of(sys.argv[1])
    player = Player(config)
    asyncio.run(player.play())
    recorded = {"cpu_seconds": player.cpu_seconds, "samples": player.samples}
    print(json.dumps(recorded), flush=True)


if __name__ == "__main__":
    main()
