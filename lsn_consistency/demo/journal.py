"""
The last things that happened, for the page.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Final, assert_never

from lsn_consistency import events

KEPT_ENTRIES: Final = 200
SHOWN_FAILURES: Final = 3
"""A node that is down fails at every probe: only this many failures in a row are told."""


class Journal:
    """
    Keep the last entries, each with a number by which the page asks for what is new.
    """

    def __init__(self) -> None:
        self._entries: deque[dict[str, Any]] = deque(maxlen=KEPT_ENTRIES)
        self._last = 0

    def add(self, kind: str, text: str) -> None:
        """
        Append an entry; the oldest one falls out.
        """
        self._last += 1
        entry = {"number": self._last, "time": time.time(), "kind": kind, "text": text}
        self._entries.append(entry)

    def on_event(self, event: events.Event) -> None:
        """
        Take an event of the router, in words; reads are left out, for the page lists them itself.
        """
        text = describe(event)
        if text is not None:
            self.add(type(event).__name__, text)

    def since(self, number: int) -> list[dict[str, Any]]:
        """
        Return the entries after the one of that number, the oldest first.
        """
        return [entry for entry in self._entries if entry["number"] > number]


def describe(event: events.Event) -> str | None:
    """
    Return an event in words, or None for one that is not worth a line.
    """
    match event:
        case events.ReadRouted():
            return None
        case events.TokenRejected():
            return f"a token in the {event.carrier} was refused: {event.error}"
        case events.TokenNotSent():
            return "a position came after the response had started"
        case events.PositionUnknown():
            return f"position unknown, so the client is pinned to the primary: {event.error}"
        case events.LostWrite():
            return f"{event.position.lsn} of timeline {event.position.timeline} may be lost"
        case events.LagExceeded():
            return f"every replica lags for more than {event.limit_seconds:g} s"
        case events.NodeFailed():
            return _failure(event)
        case events.NodeRecovered():
            return f"{event.name} answers again"
        case events.RoleChanged():
            was = "" if event.before is None else f", before as {event.before}"
            return f"{event.name} was seen as {event.after}{was}"
        case events.ReadRetried():
            return f"a read failed on {event.name} and runs elsewhere: {event.error}"
        case events.ReadHedged():
            first = event.other if event.won else event.name
            return f"{event.name} was slow, so {event.other} was asked too: {first} was first"
        case events.FallbackLimited():
            return f"the primary serves {event.limit} fallback reads already"
        case _:
            assert_never(event)


def _failure(event: events.NodeFailed) -> str | None:
    if event.consecutive_failures > SHOWN_FAILURES:
        return None
    opened = ": its breaker opens" if event.consecutive_failures == SHOWN_FAILURES else ""
    return f"{event.name} fails ({first_line(event.error)}){opened}"


def first_line(error: object) -> str:
    """
    Return the first line of an error's text, which is all that a page has room for.
    """
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
