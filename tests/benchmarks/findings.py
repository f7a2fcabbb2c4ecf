"""
What a run found: comparisons, numbers with their bars, tables and figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.benchmarks.measuring import Comparison, quartiles

Sense = Literal["at most", "at least"]


@dataclass(frozen=True, slots=True)
class Finding:
    """
    Hold one number, and the bar that it has to meet if there is one.

    ``key`` names it in the baseline. ``floor`` says what stands between and what would be the
    best, where a bar cannot be met.
    """

    suite: str
    key: str
    title: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None
    bar: float | None = None
    sense: Sense = "at most"
    floor: str = ""

    @property
    def met(self) -> bool:
        """
        Tell whether the bar is met; True where there is none.
        """
        if self.bar is None:
            return True
        return self.value <= self.bar if self.sense == "at most" else self.value >= self.bar


@dataclass(frozen=True, slots=True)
class Table:
    """
    Hold rows for people.
    """

    suite: str
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """
    Hold a plot: ``draw`` is given matplotlib's ``(figure, axes)``, ``name`` becomes the file's.
    """

    suite: str
    name: str
    title: str
    draw: Callable[[Any, Any], None]


@dataclass(slots=True)
class Bench:
    """
    Collect what the suites find, and tell them how long they may take.

    ``quick`` asks for the subset that CI runs. ``say`` shows progress.
    """

    say: Callable[[str], None]
    quick: bool = False
    suite: str = ""
    findings: list[Finding] = field(default_factory=list)
    comparisons: list[tuple[str, Comparison]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def rounds(self, whole: int, quick: int) -> int:
        """
        Return how often the ways of a comparison take turns.
        """
        return quick if self.quick else whole

    def add(self, comparison: Comparison) -> Comparison:
        """
        Keep a comparison for the report and return it.
        """
        self.comparisons.append((self.suite, comparison))
        shown = ", ".join(
            f"{label} {series.median * 1e6:.2f} us" for label, series in comparison.series.items()
        )
        self.say(f"{comparison.name}: {shown}")
        return comparison

    def find(
        self,
        key: str,
        title: str,
        values: float | Sequence[float],
        unit: str = "x",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        floor: str = "",
    ) -> Finding:
        """
        Keep a number, or the median of one for each round, with its bar.

        ``at_least`` is for what is the better the greater it is.
        """
        several = [values] if isinstance(values, int | float) else list(values)
        found = Finding(
            suite=self.suite,
            key=key,
            title=title,
            value=statistics.median(several),
            unit=unit,
            spread=quartiles(several) if len(several) > 1 else None,
            bar=at_most if at_least is None else at_least,
            sense="at most" if at_least is None else "at least",
            floor=floor,
        )
        self.findings.append(found)
        self.say(describe(found))
        return found

    def table(
        self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
    ) -> None:
        """
        Keep a table for the report.
        """
        self.tables.append(Table(self.suite, title, headers, rows, note))

    def figure(self, name: str, title: str, draw: Callable[[Any, Any], None]) -> None:
        """
        Keep a plot for the report.
        """
        self.figures.append(Figure(self.suite, name, title, draw))


def describe(found: Finding) -> str:
    """
    Say one finding in a line.
    """
    shown = f"{found.title}: {found.value:.3g} {found.unit}"
    if found.spread is not None:
        shown += f" ({found.spread[0]:.3g} to {found.spread[1]:.3g})"
    if found.bar is None:
        return shown
    return f"{shown}, {found.sense} {found.bar:g}: {'met' if found.met else 'MISSED'}"
