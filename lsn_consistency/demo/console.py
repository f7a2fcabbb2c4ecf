"""
What the demo tells on the terminal: lively on one, plain lines elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

Report = Callable[[str], None]
Advance = Callable[[str, int], None]


@contextmanager
def starting(console: Console) -> Iterator[Report]:
    """
    Yield what takes one line of text at each step.
    """
    if not console.is_terminal:
        yield lambda text: _print_line(console, text)
        return
    with console.status("starting PostgreSQL") as status:
        yield lambda text: status.update(f"{text} ...")


@contextmanager
def counting(console: Console, total: int) -> Iterator[Advance]:
    """
    Yield what takes the name of a phase and a number of reads that were made in it.
    """
    if not console.is_terminal:
        yield _Lines(console, total).advance
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("reads"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda phase, reads: progress.update(task, description=phase, advance=reads)


class _Lines:
    """
    Print a line when a phase begins.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = 0
        self._phase = ""

    def advance(self, phase: str, reads: int) -> None:
        """
        Take note of reads.
        """
        if phase != self._phase:
            self._phase = phase
            _print_line(self._console, f"{self._done} of {self._total} reads; now {phase}")
        self._done += reads


def _print_line(console: Console, text: str) -> None:
    console.print(f"... {text}", markup=False, highlight=False, soft_wrap=True)
