"""
The outcomes of the workload for people: tables and figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from tests.benchmarks.shop.judge import Outcome, percentile

OURS: Final = ("READ_YOUR_WRITES", "CAUSAL")

HEADERS: Final = (
    "strategy",
    "stale reads",
    "non-monotonic reads",
    "reads kept off the primary",
    "answers/s",
    "p50",
    "p99",
    "primary: statements a request",
    "primary: ms a request",
)

_OURS_COLOUR: Final = "#0072B2"
_OTHER_COLOUR: Final = "#B8BEC6"
_LINES: Final[Mapping[str, tuple[str, str]]] = {
    "READ_YOUR_WRITES": ("#0072B2", "o"),
    "CAUSAL": ("#D55E00", "s"),
    "sticky 5 s": ("#8A8F98", "^"),
    "always primary": ("#000000", "D"),
    "oracle": ("#009E73", "v"),
}

Sweep = Mapping[str, Mapping[float, Outcome]]
"""Outcomes by strategy and by the number that was swept."""


def row(outcome: Outcome) -> list[str]:
    """
    Return one strategy as a row under `HEADERS`.
    """
    excepted = f" (+ {outcome.excepted} excepted)" if outcome.excepted else ""
    return [
        outcome.strategy,
        f"{outcome.stale} ({outcome.stale_share:.1%})",
        f"{outcome.backward}{excepted}",
        f"{outcome.offload:.1%}",
        f"{outcome.per_second:.0f}",
        f"{outcome.percentile(0.5) * 1000:.0f} ms",
        f"{outcome.percentile(0.99) * 1000:.0f} ms",
        f"{outcome.primary_calls:.2f}",
        f"{outcome.primary_ms:.2f}",
    ]


SWEEP_HEADERS: Final = ("strategy", "kept off the primary", "mean", "p50", "p99", "stale reads")


def sweep_rows(sweep: Sweep, shown: Callable[[float], str]) -> list[list[str]]:
    """
    Return a sweep as rows under a header for its number and `SWEEP_HEADERS`.
    """
    numbers = sorted({number for outcomes in sweep.values() for number in outcomes})
    return [
        [shown(number), strategy, *_sweep_cells(outcomes[number])]
        for number in numbers
        for strategy, outcomes in sweep.items()
        if number in outcomes
    ]


def _sweep_cells(outcome: Outcome) -> list[str]:
    times = outcome.read_latencies
    return [
        f"{outcome.offload:.1%}",
        f"{sum(times) / max(1, len(times)) * 1000:.0f} ms",
        f"{percentile(times, 0.5) * 1000:.0f} ms",
        f"{percentile(times, 0.99) * 1000:.0f} ms",
        f"{outcome.stale}",
    ]


def by_strategy(outcomes: Sequence[Outcome]) -> Callable[[Any, Any], None]:
    """
    Draw stale reads and offload of each strategy side by side.
    """
    ours = [outcome.strategy in OURS for outcome in outcomes]
    names = [
        f"{outcome.strategy}\n(this library)" if is_ours else outcome.strategy
        for outcome, is_ours in zip(outcomes, ours, strict=True)
    ]
    colours = [_OURS_COLOUR if is_ours else _OTHER_COLOUR for is_ours in ours]
    panels = (
        ("stale reads", [outcome.stale_share * 100 for outcome in outcomes], 0.1),
        ("reads kept off the primary", [outcome.offload * 100 for outcome in outcomes], 1),
    )

    def draw(figure: Any, axes: Any) -> None:
        two = _panels(figure, axes, sharey=True)
        for panel, (title, values, smallest) in zip(two, panels, strict=True):
            bars = panel.barh(names, values, color=colours, height=0.7)
            digits = 1 if smallest < 1 else 0
            panel.bar_label(bars, [f"{value:.{digits}f} %" for value in values], padding=3)
            panel.set_title(title, loc="left")
            panel.set_xlim(0, max(*values, smallest) * 1.25)
            panel.grid(False)
            panel.xaxis.set_visible(False)
            panel.tick_params(length=0)
            for side in ("top", "right", "bottom", "left"):
                panel.spines[side].set_visible(False)
        panel.invert_yaxis()

    return draw


def over(sweep: Sweep, label: str, scale: float = 1.0) -> Callable[[Any, Any], None]:
    """
    Draw offload and p99 of reads over the number that was swept.
    """

    def draw(figure: Any, axes: Any) -> None:
        left, right = _panels(figure, axes)
        for strategy, outcomes in sweep.items():
            colour, marker = _LINES[strategy]
            numbers = sorted(outcomes)
            found = [outcomes[number] for number in numbers]
            places = [number * scale for number in numbers]
            style = {
                "color": colour,
                "marker": marker,
                "markersize": 4,
                "label": strategy,
                "linestyle": "-",
            }
            left.plot(places, [outcome.offload * 100 for outcome in found], **style)
            p99s = [percentile(outcome.read_latencies, 0.99) * 1000 for outcome in found]
            right.plot(places, p99s, **style)
        left.set_title("reads kept off the primary, %", loc="left")
        left.set_ylim(-3, 105)
        right.set_title("p99 of reads, ms", loc="left")
        right.set_ylim(bottom=0)
        for panel in (left, right):
            panel.set_xlabel(label)
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        left.legend(frameon=False)

    return draw


def _panels(figure: Any, axes: Any, **options: Any) -> Any:
    # Two in the place of one, under its title.
    figure.suptitle(axes.get_title(loc="left"), x=0.01, ha="left", weight="bold")
    axes.remove()
    return figure.subplots(1, 2, **options)
