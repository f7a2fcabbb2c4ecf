"""
Compare ways to do the same thing: in turn, in one process, over several rounds.

What else the machine does hits all ways of a round alike, so each round gives one ratio, and the
median of these ratios is the result. Times by themselves say little and are shown for orientation.
"""

from __future__ import annotations

import gc
import statistics
import time
import timeit
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

FIRST_NUMBER: Final = 1
MAX_NUMBER: Final = 10_000_000
WARMING: Final = 2
"""Each turn of async ways begins with calls that do not count: one for so many that do."""

Way = Callable[[], Any]
AsyncWay = Callable[[], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Series:
    """
    Hold what one way took: seconds per call, one number for each round.
    """

    label: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """
        Return the median over the rounds, in seconds.
        """
        return statistics.median(self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        """
        Return the quartiles over the rounds, in seconds.
        """
        return quartiles(self.rounds)


@dataclass(frozen=True, slots=True)
class Comparison:
    """
    Hold several ways that took turns.
    """

    name: str
    series: Mapping[str, Series]

    def median(self, label: str) -> float:
        """
        Return the median time of one way, in seconds per call.
        """
        return self.series[label].median

    def ratios(self, subject: str, reference: str, *, minus: str | None = None) -> list[float]:
        """
        Return for each round what ``subject`` took over what ``reference`` took.

        ``minus`` names what both contain and neither is measured for: it is taken off both.
        """
        base = self.series[minus].rounds if minus else (0.0,) * len(self.series[subject].rounds)
        rounds = zip(self.series[subject].rounds, self.series[reference].rounds, base, strict=True)
        return [(ours - each) / (theirs - each) for ours, theirs, each in rounds]

    def extras(self, subject: str, reference: str) -> list[float]:
        """
        Return for each round by how many seconds a call ``subject`` took longer.
        """
        rounds = zip(self.series[subject].rounds, self.series[reference].rounds, strict=True)
        return [ours - theirs for ours, theirs in rounds]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """
    Return the lower and the upper quartile; of fewer than two values, the extremes.
    """
    if len(values) < 2:
        return min(values), max(values)
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def compare(
    name: str,
    ways: Mapping[str, Way],
    *,
    rounds: int,
    seconds: float = 0.05,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """
    Let blocking ways take turns; each turn repeats its way for about ``seconds``.

    ``clock`` may be `time.thread_time` where nothing waits: then other processes do not count.
    """
    timers = {label: timeit.Timer(way, timer=clock) for label, way in ways.items()}
    numbers = {label: _number(timer, seconds) for label, timer in timers.items()}
    taken: dict[str, list[float]] = {label: [] for label in ways}
    for turn in range(rounds):
        for label in _turned(list(ways), turn):
            taken[label].append(timers[label].timeit(numbers[label]) / numbers[label])
    return _comparison(name, taken)


async def compare_async(
    name: str, ways: Mapping[str, AsyncWay], *, rounds: int, number: int
) -> Comparison:
    """
    Let async ways take turns; each turn awaits its way ``number`` times.
    """
    taken: dict[str, list[float]] = {label: [] for label in ways}
    for way in ways.values():
        # Pools, caches and prepared statements are warm before anything counts.
        for _ in range(min(number, 20)):
            await way()
    for turn in range(rounds):
        for label in _turned(list(ways), turn):
            way = ways[label]
            with _without_collector():
                # What ran before has filled the caches of both cores with what it needs.
                for _ in range(number // WARMING):
                    await way()
                began = time.perf_counter()
                for _ in range(number):
                    await way()
                taken[label].append((time.perf_counter() - began) / number)
    return _comparison(name, taken)


def _number(timer: timeit.Timer, seconds: float) -> int:
    number = FIRST_NUMBER
    while number < MAX_NUMBER:
        taken = timer.timeit(number)
        if taken >= seconds / 5:
            return max(1, round(number * seconds / taken))
        number *= 4
    return number


def _turned(labels: list[str], turn: int) -> list[str]:
    # Whoever comes after whom changes from round to round.
    return labels if turn % 2 == 0 else labels[::-1]


def _comparison(name: str, taken: Mapping[str, list[float]]) -> Comparison:
    return Comparison(name, {label: Series(label, tuple(each)) for label, each in taken.items()})


@contextmanager
def _without_collector() -> Iterator[None]:
    # As timeit does it.
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
