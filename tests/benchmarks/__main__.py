"""
Measure what the library costs, side by side with others: ``python -m tests.benchmarks``.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tests.benchmarks import baseline, plots, report
from tests.benchmarks.findings import Bench, describe
from tests.benchmarks.report import Outcome
from tests.benchmarks.suites import SUITES, Suite

MISSED: Final = 1
"""The status when a bar is missed, something has regressed, or a suite has failed."""
USAGE: Final = 2
"""The status of a command that cannot run: what it says, or what is not installed."""
INTERRUPTED: Final = 130

INSTALL: Final = "pip install -e '.[bench]'"
_OURS: Final = frozenset({"tests", "lsn_consistency"})

_EPILOG: Final = f"""\
suites:
{{suites}}

The suites marked * are those of a run with --quick. Peers and matplotlib come with the
extra `bench`: {INSTALL}

written to DIR:
  report.md      the bars, met or missed, and what was measured, suite by suite
  report.json    the same for programs, with every round of each comparison
  <figure>.svg   the plots

status:
  0  every bar is met; with --baseline: nothing has regressed
  1  a bar is missed (not with --baseline, where it is only shown, as CI machines
     differ), something is worse than its baseline by more than half, or a suite failed
  2  the command is wrong, or a peer that a suite needs is not installed

examples:
  python -m tests.benchmarks                        everything
  python -m tests.benchmarks decision middleware    these two
  python -m tests.benchmarks --quick --baseline tests/benchmarks/baseline.json
"""


def main(
    arguments: Sequence[str] | None = None,
    suites: Sequence[Suite] = SUITES,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """
    Run what the command line asks for and return the status.
    """
    parser = _parser(suites)
    given = parser.parse_args(arguments)
    chosen = _chosen(parser, suites, given.suites, quick=given.quick)
    try:
        before = None if given.baseline is None else baseline.read(given.baseline)
        if given.write_baseline is not None and given.write_baseline.exists():
            # Better said now than after all the measuring.
            baseline.read(given.write_baseline)
        given.out.mkdir(parents=True, exist_ok=True)
    except (baseline.BaselineError, OSError) as error:
        parser.error(str(error))
    began = clock()

    def say(text: str) -> None:
        name = f"{bench.suite}: " if bench.suite else ""
        print(f"[{clock() - began:7.1f} s] {name}{text}", file=sys.stderr, flush=True)

    bench = Bench(say=say, quick=given.quick)
    outcome = run(bench, chosen, clock)
    bench.suite = ""
    if before is not None:
        outcome.regressions = baseline.regressions(bench.findings, before)
    if given.write_baseline is not None:
        baseline.write(given.write_baseline, bench.findings)
    write(bench, outcome, given.out)
    conclude(bench, outcome)
    print(f"report: {given.out / 'report.md'}")
    return status(bench, outcome)


def run(bench: Bench, suites: Sequence[Suite], clock: Callable[[], float]) -> Outcome:
    """
    Run suites one after the other; one that raises does not take the others with it.
    """
    outcome = Outcome(suites={suite.name: suite.about for suite in suites})
    for suite in suites:
        bench.suite = suite.name
        bench.say(suite.about)
        began = clock()
        # What the suites before have left is not searched for garbage while this one is measured.
        gc.collect()
        gc.freeze()
        try:
            suite.load()(bench)
        except KeyboardInterrupt:
            outcome.interrupted = True
            break
        except Exception as error:
            if (peer := _lacking(error)) is not None:
                outcome.lacking[suite.name] = f"{peer} is not installed: {INSTALL}"
                bench.say(outcome.lacking[suite.name])
            else:
                outcome.failures[suite.name] = f"{type(error).__name__}: {error}"
                bench.say("".join(traceback.format_exception(error)).rstrip())
        finally:
            outcome.seconds[suite.name] = clock() - began
    return outcome


def write(bench: Bench, outcome: Outcome, folder: Path) -> None:
    """
    Write the plots, the JSON and the Markdown.
    """
    try:
        failed = plots.draw_all(bench.figures, folder)
    except plots.PlotsMissing as error:
        outcome.plots = False
        bench.say(f"no plots: {error}")
    else:
        for name, problem in failed.items():
            outcome.failures[f"{name}.svg"] = f"{type(problem).__name__}: {problem}"
    held = json.dumps(report.as_json(bench, outcome), indent=1, default=str)
    (folder / "report.json").write_text(held + "\n")
    (folder / "report.md").write_text(report.as_markdown(bench, outcome))


def conclude(bench: Bench, outcome: Outcome) -> None:
    """
    Print the bars and what went wrong.
    """
    for found in bench.findings:
        if found.bar is not None:
            print(f"{found.suite}: {describe(found)}")
            if not found.met and found.floor:
                print(f"    {found.floor}")
    for regression in outcome.regressions or ():
        print(f"REGRESSION {regression}")
    if outcome.regressions == []:
        print("no regressions")
    for name, error in (*outcome.failures.items(), *outcome.lacking.items()):
        print(f"FAILED {name}: {error}")


def status(bench: Bench, outcome: Outcome) -> int:
    """
    Return the exit status of a run.
    """
    if outcome.interrupted:
        return INTERRUPTED
    if outcome.lacking:
        return USAGE
    if outcome.failures or outcome.regressions:
        return MISSED
    # Against a baseline only what has changed counts: the bars were set on another machine.
    if outcome.regressions is None and report.missed(bench.findings):
        return MISSED
    return 0


def _lacking(error: Exception) -> str | None:
    """Return the name of the missing module if it is not one of this project."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    name = error.name.partition(".")[0]
    return None if name in _OURS else name


def _chosen(
    parser: argparse.ArgumentParser, suites: Sequence[Suite], names: list[str], *, quick: bool
) -> list[Suite]:
    unknown = [name for name in names if name not in {suite.name for suite in suites}]
    if unknown:
        known = ", ".join(suite.name for suite in suites)
        parser.error(f"no suite is named {unknown[0]!r}; there are {known}")
    if names:
        return [suite for suite in suites if suite.name in names]
    return [suite for suite in suites if suite.quick or not quick]


def _parser(suites: Sequence[Suite]) -> argparse.ArgumentParser:
    listed = "\n".join(
        f"  {suite.name:<11} {'*' if suite.quick else ' '} {suite.about}" for suite in suites
    )
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure what the library costs, side by side with others in one run.",
        epilog=_EPILOG.format(suites=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help="what to run, by name; without any, all"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds; without names, the suites that CI runs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/benchmarks"),
        metavar="DIR",
        help="the folder for the report (default %(default)s)",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="fail on what is worse than in this file by more than half, instead of on the bars",
    )
    parser.add_argument(
        "--write-baseline",
        type=Path,
        metavar="FILE",
        help="write what was found there, times excepted; other keys of the file are kept",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
