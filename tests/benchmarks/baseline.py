"""
What was found before, to tell whether something became slower.

A baseline is a JSON file ``{key: value}`` of findings that mean the same on any machine: ratios,
counts, bytes. Times are not written to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.benchmarks.findings import Finding

TOLERANCE: Final = 1.5
"""A finding has regressed when it is worse than its baseline by more than this factor."""

_TIMES: Final = frozenset({"ns", "us", "µs", "ms", "s"})


class BaselineError(ValueError):
    """
    Say what is wrong with a baseline file.
    """


@dataclass(frozen=True, slots=True)
class Regression:
    """
    Hold a finding that is worse than before; ``limit`` is what it might have been at worst.
    """

    found: Finding
    before: float
    limit: float

    def __str__(self) -> str:
        found = self.found
        worse = "more" if found.sense == "at most" else "less"
        return (
            f"{found.key}: {found.value:.3g} {found.unit}, {worse} than {self.limit:.3g}; "
            f"the baseline is {self.before:.3g} ({found.title})"
        )


def read(path: Path) -> dict[str, float]:
    """
    Return a baseline.

    Raises `BaselineError` for a file that is none, and for one that cannot be read.
    """
    try:
        held = json.loads(path.read_text())
    except OSError as error:
        raise BaselineError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BaselineError(f"{path} is not JSON: {error}") from None
    if not isinstance(held, dict):
        raise BaselineError(f"{path} is no baseline: it holds no object of keys and numbers")
    for key, value in held.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BaselineError(f"{path}: the value of {key!r} is no number: {value!r}")
        if not math.isfinite(value):
            raise BaselineError(f"{path}: the value of {key!r} is not finite")
    return held


def write(path: Path, findings: Iterable[Finding]) -> None:
    """
    Write what was found; keys that were not measured this time keep their values.
    """
    kept = read(path) if path.exists() else {}
    found = {each.key: _rounded(each.value) for each in findings if is_lasting(each)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted({**kept, **found}.items())), indent=2) + "\n")


def is_lasting(found: Finding) -> bool:
    """
    Tell whether a finding may be compared with one of another machine.
    """
    return found.unit.split()[0] not in _TIMES if found.unit else True


def regressions(findings: Iterable[Finding], before: Mapping[str, float]) -> list[Regression]:
    """
    Return what is worse than before by more than half, of the keys that were measured.
    """
    several = (_regression(each, before[each.key]) for each in findings if each.key in before)
    return [each for each in several if each is not None]


def _regression(found: Finding, before: float) -> Regression | None:
    if before <= 0:
        # Nothing is half as much again as nothing: the bar tells.
        regressed, limit = not found.met, found.bar or 0.0
    elif found.sense == "at most":
        limit = before * TOLERANCE
        regressed = not found.value <= limit
    else:
        limit = before / TOLERANCE
        regressed = not found.value >= limit
    return Regression(found, before, limit) if regressed else None


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
