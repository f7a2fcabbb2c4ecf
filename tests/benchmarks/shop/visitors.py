"""
Sessions whose every request is a connection of its own, so that it lands on any process.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from lsn_consistency.testing import Operation, Report, check
from tests.benchmarks.shop.load import Browser, Wire
from tests.benchmarks.shop.served import PROCESS_HEADER, TOKEN_HEADER

READS_PER_WRITE: Final = 5
PAUSE_SECONDS: Final = 0.005
REQUEST_SECONDS: Final = 20.0


@dataclass(slots=True)
class Visits:
    """
    What the sessions saw: all operations, and for each session which process answered it.
    """

    operations: list[Operation] = field(default_factory=list)
    processes: dict[int, list[int]] = field(default_factory=dict)
    failed: int = 0

    @property
    def pids(self) -> set[int]:
        """
        Return every process that has answered.
        """
        return {pid for pids in self.processes.values() for pid in pids}

    @property
    def moved(self) -> float:
        """
        Return the share of requests that another process answered than the session's last one.
        """
        pairs = [pair for pids in self.processes.values() for pair in pairwise(pids)]
        return sum(before != after for before, after in pairs) / max(1, len(pairs))

    @property
    def reads(self) -> int:
        """
        Return the number of reads.
        """
        return sum(each.kind == "read" for each in self.operations)

    def judge(self) -> Report:
        """
        Return what the checker says.
        """
        return check(self.operations)


class Visitor:
    """
    One session: it writes, and reads what it wrote a few times, until the time is over.

    It keeps the token in cookies and in the header, whichever the shop gives.
    """

    def __init__(self, port: int, session: int, first_key: int, visits: Visits) -> None:
        self._port = port
        self._session = session
        self._key = first_key + session
        self._visits = visits
        self._browser = Browser(session)
        self._token = ""
        self._numbers = 0

    async def visit(self, ends: float) -> None:
        while time.monotonic() < ends:
            self._numbers += 1
            await self._request(self._numbers)
            for _ in range(READS_PER_WRITE):
                await self._request(None)
                await asyncio.sleep(PAUSE_SECONDS)

    async def _request(self, number: int | None) -> None:
        began = time.monotonic()
        _, wire = await asyncio.get_running_loop().create_connection(Wire, "127.0.0.1", self._port)
        path = f"/keys/{self._key}" + (f"/{number}" if number is not None else "")
        token = f"{TOKEN_HEADER}: {self._token}\r\n" if self._token else ""
        request = (
            f"{'GET' if number is None else 'POST'} {path} HTTP/1.1\r\nHost: shop\r\n"
            f"Cookie: {self._browser.header(began)}\r\n{token}"
            f"Content-Length: 0\r\nConnection: close\r\n\r\n"
        )
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                lines, body = await wire.send(request)
        except (ConnectionError, TimeoutError):
            lines, body = [], ""
        finally:
            wire.close()
        self._note(number, began, lines, body)

    def _note(self, number: int | None, began: float, lines: list[str], body: str) -> None:
        self._browser.take(lines, time.monotonic())
        headers = dict(line.split(": ", 1) for line in lines)
        self._token = headers.get(TOKEN_HEADER, self._token)
        if not body:
            self._visits.failed += 1
            return
        pids = self._visits.processes.setdefault(self._session, [])
        pids.append(int(headers[PROCESS_HEADER]))
        role, _, shown = body.partition(" ")
        seen = set(map(int, filter(None, shown.split(",")))) if number is None else {number}
        self._visits.operations.append(
            Operation(
                client=str(self._session),
                kind="read" if number is None else "write",
                began=began,
                ended=time.monotonic(),
                values={self._key: frozenset(seen)},
                role="replica" if number is None and role == "replica" else "primary",
            )
        )


async def visit(port: int, first_key: int, *, sessions: int, seconds: float) -> Visits:
    """
    Let some sessions visit a shop for a time.
    """
    visits = Visits()
    ends = time.monotonic() + seconds
    visitors = [Visitor(port, number, first_key, visits) for number in range(sessions)]
    await asyncio.gather(*(visitor.visit(ends) for visitor in visitors))
    return visits
