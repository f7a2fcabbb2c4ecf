"""
Who asks for what and when: the same calls for every strategy, from a seed.

A session is one client with its cookies. It has a key of its own, such as its orders, and all
share a hot one, such as the front page; each key is a set of numbers that grows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final, NamedTuple

SESSION_COOKIE: Final = "shop_session"
PINNING_COOKIE: Final = "multidb_pin_writes"

HOT_KEYS: Final = 1
OWN_SHARE: Final = 0.7
"""Share of the calls that are about the session's own key; the others are about a hot one."""

FOLLOW_SHARE: Final = 0.3
"""Share of the reads after which the page asks for the same once more, as for what it shows."""

FOLLOW_SECONDS: Final = 0.02
"""How long after an answer its browser asks for what comes after it: the way there and back."""

PIN_SECONDS: Final = 15.0
"""The longest window of the sticky strategies: how far back a session's earlier writes matter."""


@dataclass(frozen=True, slots=True)
class Shape:
    """
    Say what a trace is like; the same shape is the same trace.

    A session visits a key, thinks, and visits another: ``think_seconds`` is the mean of an
    exponential distribution. A visit writes, and then reads, as a form is followed by the page that
    shows it; or it reads, once or twice. ``write_share`` is that of all calls, so at most a half.
    The calls of the ``warm_seconds`` before 0 are played and not counted.
    """

    sessions: int
    seconds: float
    warm_seconds: float = 1.5
    think_seconds: float = 0.3
    write_share: float = 0.1
    # One whose calls come at the rate that was asked for in the few seconds of a run, to within
    # 3 %, with as many writes, and in which sticky windows leave what they leave in a long trace.
    seed: int = 42


def shape_for(
    rate: float,
    *,
    seconds: float,
    think_seconds: float,
    write_share: float = 0.1,
    warm_seconds: float = 1.5,
) -> Shape:
    """
    Return a shape with as many sessions as make that many calls a second, if answers took no time.
    """
    calls = _calls_a_visit(write_share)
    visit_seconds = think_seconds + (calls - 1) * FOLLOW_SECONDS
    sessions = round(rate * visit_seconds / calls)
    return Shape(sessions, seconds, warm_seconds, think_seconds, write_share)


def _calls_a_visit(write_share: float) -> float:
    writes = _writes_a_visit(write_share)
    return 1 + writes + (1 - writes) * FOLLOW_SHARE


def _writes_a_visit(write_share: float) -> float:
    # Each write brings a read with it, and some reads another.
    return write_share * (1 + FOLLOW_SHARE) / (1 - write_share * (1 - FOLLOW_SHARE))


class Call(NamedTuple):
    """
    One request: when it arrives in an open loop, or how long after the last answer in a closed one.

    ``key`` counts the hot key first. ``number`` is what a write adds, unlike any other's.
    ``follows``: it is the second of a visit, and waits for the first's answer in an open loop too.
    """

    session: int
    at: float
    think: float
    write: bool
    key: int
    number: int
    follows: bool


class Trace(NamedTuple):
    """
    The calls of each session in order, and when each session last wrote before the first of them.
    """

    sessions: Sequence[Sequence[Call]]
    last_writes: Sequence[float]


def make_trace(shape: Shape) -> Trace:
    """
    Return the trace of a shape.
    """
    numbers = count(1)
    sessions: list[list[Call]] = []
    last_writes: list[float] = []
    for session in range(shape.sessions):
        calls = list(_calls(shape, session))
        earlier = [call.at for call in calls if call.write and call.at < -shape.warm_seconds]
        last_writes.append(max(earlier, default=-float("inf")))
        played = (call for call in calls if -shape.warm_seconds <= call.at < shape.seconds)
        sessions.append([call._replace(number=next(numbers)) for call in played])
    return Trace(sessions, last_writes)


def _calls(shape: Shape, session: int) -> Iterator[Call]:
    # Each session has chances of its own, so that more sessions leave the first ones alone.
    chance = random.Random(f"{shape.seed} {session}")
    share = _writes_a_visit(shape.write_share)
    at = -shape.warm_seconds - PIN_SECONDS
    while at < shape.seconds:
        think = chance.expovariate(1 / shape.think_seconds)
        own = chance.random() < OWN_SHARE
        key = HOT_KEYS + session if own else chance.randrange(HOT_KEYS)
        write = chance.random() < share
        twice = chance.random() < FOLLOW_SHARE
        at += think
        yield Call(session, at, think, write, key, 0, False)
        if write or twice:
            at += FOLLOW_SECONDS
            yield Call(session, at, FOLLOW_SECONDS, False, key, 0, True)


def sticky_offload(shape: Shape, window_seconds: float) -> float:
    """
    Return the share of reads that a sticky window leaves to replicas: its rule needs no server.
    """
    reads = kept = 0
    trace = make_trace(shape)
    for calls, last in zip(trace.sessions, trace.last_writes, strict=True):
        for call in calls:
            if call.write:
                last = call.at
            elif call.at >= 0:
                reads += 1
                kept += call.at - last >= window_seconds
    return kept / reads
