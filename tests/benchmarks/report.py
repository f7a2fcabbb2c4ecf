"""
A run as JSON, for programs, and as Markdown, for people.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from lsn_consistency import __version__
from tests.benchmarks.baseline import Regression
from tests.benchmarks.findings import Bench, Finding, Table
from tests.benchmarks.measuring import Comparison

DISTRIBUTIONS: Final = (
    "psycopg",
    "psycopg-pool",
    "itsdangerous",
    "starlette",
    "uvicorn",
    "gunicorn",
    "djanorm",
    "hasql",
    "django-multidb-router",
    "django-replicated",
    "Django",
    "advanced-alchemy",
    "SQLAlchemy",
    "asgi-correlation-id",
)
_SCALES: Final = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


@dataclass(slots=True)
class Outcome:
    """
    Hold what a run came to beside its numbers.

    ``failures`` tells by suite why it ended early, ``lacking`` what is not installed that it needs;
    ``regressions`` is None where there is no baseline.
    """

    suites: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)
    regressions: list[Regression] | None = None
    plots: bool = True
    interrupted: bool = False


def machine(bench: Bench) -> dict[str, Any]:
    """
    Return what the numbers were measured on and with.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return {
        "cpus": len(usable) or os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "postgresql": bench.data.get("postgresql"),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """
    Return the releases of what is measured, as far as it is installed.
    """
    found = {"lsn-consistency": __version__}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def missed(findings: Iterable[Finding]) -> list[Finding]:
    """
    Return the findings whose bar is not met.
    """
    return [each for each in findings if not each.met]


# JSON


def as_json(bench: Bench, outcome: Outcome) -> dict[str, Any]:
    """
    Return all of a run, every round of each comparison included, as what JSON can hold.
    """
    return {
        "machine": machine(bench),
        "quick": bench.quick,
        "command": ["python", "-m", "tests.benchmarks", *sys.argv[1:]],
        "suites": [
            {"name": name, "about": about, "seconds": outcome.seconds.get(name)}
            for name, about in outcome.suites.items()
        ],
        "failures": {**outcome.failures, **outcome.lacking},
        "findings": [_finding(each) for each in bench.findings],
        "regressions": [
            {"key": each.found.key, "value": each.found.value, "baseline": each.before}
            for each in outcome.regressions or ()
        ],
        "comparisons": [
            {
                "suite": suite,
                "name": comparison.name,
                "seconds_per_call": {
                    label: list(series.rounds) for label, series in comparison.series.items()
                },
            }
            for suite, comparison in bench.comparisons
        ],
        "tables": [_table(each) for each in bench.tables],
        "figures": [
            {"suite": each.suite, "title": each.title, "file": f"{each.name}.svg"}
            for each in bench.figures
        ],
        "data": bench.data,
    }


def _finding(found: Finding) -> dict[str, Any]:
    return {
        "suite": found.suite,
        "key": found.key,
        "title": found.title,
        "value": found.value,
        "spread": found.spread,
        "unit": found.unit,
        "bar": found.bar,
        "sense": found.sense if found.bar is not None else None,
        "met": found.met if found.bar is not None else None,
        "floor": found.floor,
    }


def _table(table: Table) -> dict[str, Any]:
    return {
        "suite": table.suite,
        "title": table.title,
        "headers": list(table.headers),
        "rows": [list(row) for row in table.rows],
        "note": table.note,
    }


# Markdown


def as_markdown(bench: Bench, outcome: Outcome) -> str:
    """
    Return the report for people: the bars first, then suite by suite.
    """
    parts = ["# Benchmarks", *_facts(bench), *_troubles(outcome)]
    barred = [each for each in bench.findings if each.bar is not None]
    if barred:
        parts += ["## Bars", _bars(barred)]
    if outcome.regressions is not None:
        parts += ["## Regressions", _regressions(outcome.regressions)]
    for name, about in outcome.suites.items():
        parts += _suite(bench, name, about, plots=outcome.plots)
    return "\n\n".join(parts) + "\n"


def _facts(bench: Bench) -> list[str]:
    facts = machine(bench)
    server = f", PostgreSQL {facts['postgresql']}" if facts["postgresql"] else ""
    shown = ", ".join(f"{name} {each}" for name, each in facts["versions"].items())
    kind = "A quick run: few rounds, the suites that CI runs. " if bench.quick else ""
    return [
        f"{kind}{facts['cpus']} CPUs, {facts['system']}, {facts['python']}{server}.",
        f"With {shown}.",
        "Ways of a comparison take turns in one process. A ratio is the median of the ratios of "
        "the rounds, with its quartiles; times are for orientation only.",
    ]


def _troubles(outcome: Outcome) -> list[str]:
    told = [f"* `{name}` ended early: {error}" for name, error in outcome.failures.items()]
    told += [f"* `{name}` did not run: {error}" for name, error in outcome.lacking.items()]
    if outcome.interrupted:
        told.append("* The run was interrupted; what it had measured by then follows.")
    return ["## What went wrong", "\n".join(told)] if told else []


def _bars(findings: Sequence[Finding]) -> str:
    rows = [
        [
            each.suite,
            each.title,
            f"{number(each.value)} {each.unit}",
            _spread(each),
            f"{each.sense} {number(each.bar or 0.0)} {each.unit}",
            "met" if each.met else "**missed**",
            "" if each.met else each.floor,
        ]
        for each in findings
    ]
    headers = ["suite", "what", "measured", "quartiles", "bar", "", "what stands between"]
    return grid(headers, rows)


def _regressions(regressions: Sequence[Regression]) -> str:
    if not regressions:
        return "None: nothing is worse than the baseline by more than half."
    return "\n".join(f"* {each}" for each in regressions)


def _suite(bench: Bench, name: str, about: str, *, plots: bool) -> list[str]:
    parts = [f"## {name}: {about}"]
    others = [each for each in bench.findings if each.suite == name and each.bar is None]
    if others:
        rows = [[each.title, f"{number(each.value)} {each.unit}", _spread(each)] for each in others]
        parts.append(grid(["what", "measured", "quartiles"], rows))
    for table in bench.tables:
        if table.suite == name:
            parts += [f"### {table.title}", grid(table.headers, table.rows)]
            parts += [table.note] if table.note else []
    for suite, comparison in bench.comparisons:
        if suite == name:
            parts += [f"### Times: {comparison.name}", _times(comparison)]
    for figure in bench.figures:
        if figure.suite == name and plots:
            parts.append(f"![{figure.title}]({figure.name}.svg)")
    return parts if len(parts) > 1 else []


def _times(comparison: Comparison) -> str:
    rows = []
    for label, series in comparison.series.items():
        low, high = series.spread
        shown = f"{duration(low)} to {duration(high)}"
        rows.append([label, duration(series.median), shown, str(len(series.rounds))])
    return grid(["way", "median", "quartiles", "rounds"], rows)


def _spread(found: Finding) -> str:
    if found.spread is None:
        return ""
    return f"{number(found.spread[0])} to {number(found.spread[1])}"


def grid(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """
    Return a Markdown table; columns of numbers are aligned to the right.
    """
    several = [list(row) for row in rows]
    columns = zip(*several, strict=True) if several else [()] * len(headers)
    marks = ["---:" if _is_numeric(column) else "---" for column in columns]
    lines = [list(headers), marks, *several]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def number(value: float) -> str:
    """
    Show a number with three digits that mean something, and no exponent where it is large.
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """
    Show a time in the unit that suits it.
    """
    for scale, unit in _SCALES:
        if abs(seconds) >= scale:
            return f"{number(seconds / scale)} {unit}"
    return f"{number(seconds / _SCALES[-1][0])} {_SCALES[-1][1]}"


def _is_numeric(column: Iterable[str]) -> bool:
    shown = [each for each in column if each]
    return bool(shown) and all(each.lstrip("-+").removeprefix(".")[:1].isdigit() for each in shown)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
