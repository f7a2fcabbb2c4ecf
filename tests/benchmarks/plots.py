"""
Figures as SVG files that are the same for the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.findings import Figure

# The palette of Okabe and Ito, which people with any kind of colour vision can tell apart; the
# black comes last, as it looks like an axis.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
STYLES: Final = ("-", "--", "-.", ":", "-", "--", "-.")


class PlotsMissing(ImportError):
    """
    Say what to install.
    """

    def __init__(self) -> None:
        super().__init__("plots need matplotlib: pip install -e '.[bench]'")


def draw_all(figures: Sequence[Figure], folder: Path) -> dict[str, Exception]:
    """
    Write ``<name>.svg`` for each figure; return what went wrong, by name.

    Raises `PlotsMissing` without matplotlib.
    """
    failed: dict[str, Exception] = {}
    if not figures:
        return failed
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise PlotsMissing from None
    matplotlib.use("Agg")
    for figure in figures:
        with matplotlib.rc_context(_settings(figure.name)):
            try:
                _draw(figure, folder / f"{figure.name}.svg")
            except Exception as error:
                failed[figure.name] = error
    return failed


def _draw(figure: Figure, path: Path) -> None:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8.0, 4.8), layout="constrained")
    axes = canvas.add_subplot()
    axes.set_title(figure.title, loc="left")
    figure.draw(canvas, axes)
    canvas.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _settings(name: str) -> dict[str, Any]:
    from cycler import cycler

    cycle = cycler(color=COLOURS) + cycler(marker=MARKERS) + cycler(linestyle=STYLES)
    return {
        # Identifiers inside the file follow from its name, and not from chance.
        "svg.hashsalt": name,
        "axes.prop_cycle": cycle,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.labelsize": 11,
        "grid.color": "#DDDDDD",
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "lines.linewidth": 2.0,
        "lines.markersize": 6,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "font.family": "DejaVu Sans",
        "figure.facecolor": "white",
    }
