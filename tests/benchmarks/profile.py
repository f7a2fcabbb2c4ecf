"""
Find where the time of one path goes: ``python -m tests.benchmarks.profile PATH``.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.benchmarks import counted
from tests.benchmarks.paths import OFFLINE, PATHS, Run

MISSING: Final = 2
"""The status when a tool is not installed."""

TOOLS: Final = ("callgrind", "pyinstrument", "cprofile")
WARM: Final = 200
SHOWN: Final = 25
INTERVAL_SECONDS: Final = 0.0005

_EPILOG: Final = """\
callgrind counts the instructions of one operation (valgrind; `choose` and `middleware` only, as it
needs no server): what an operation more costs, so that nothing of the start counts. The others
take samples (pyinstrument) or time each call (cprofile), and print text.

examples:
  python -m tests.benchmarks.profile choose
  python -m tests.benchmarks.profile middleware --way "no token" --tool cprofile
  python -m tests.benchmarks.profile read --tool pyinstrument
"""


def main() -> int:
    """
    Profile what the command line names and return the status.
    """
    parser = _parser()
    given = parser.parse_args()
    tool = given.tool or ("callgrind" if given.path in OFFLINE else "cprofile")
    if tool == "callgrind" and given.path not in OFFLINE:
        parser.error(f"{given.path} needs servers, which callgrind would not see: use cprofile")
    if tool == "callgrind":
        return _count(given.path, given.way, given.number, given.keep)
    if tool == "pyinstrument" and not _has_pyinstrument():
        print("pyinstrument is not installed: pip install pyinstrument", file=sys.stderr)
        return MISSING
    show = _sampled if tool == "pyinstrument" else _timed
    with PATHS[given.path]() as ways:
        for name in _chosen(ways, given.way):
            print(f"== {given.path}: {name}", flush=True)
            ways[name](WARM)
            show(ways[name], given.seconds)
    return 0


def _count(path: str, way: str | None, number: int, keep: Path | None) -> int:
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        print("valgrind is not on PATH: it comes with the package `valgrind`", file=sys.stderr)
        return MISSING
    with tempfile.TemporaryDirectory() as folder:
        kept = keep or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        command = [
            *(valgrind, "--quiet", "--tool=callgrind"),
            f"--callgrind-out-file={kept}/callgrind.%p",
            *(sys.executable, "-m", counted.__name__, path, str(number)),
        ]
        # The order of sets, and so the number of comparisons, must be the same in each run.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        given = [way] if way else []
        done = subprocess.run(
            [*command, *given], env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            return done.returncode
        found = counted.read(done.stdout, kept)
    print("| way | instructions |")
    print("| --- | ---: |")
    for name, instructions in found.items():
        print(f"| {name} | {instructions:,.0f} |")
    return 0


def _timed(run: Run, seconds: float) -> None:
    number = _number(run, seconds)
    profile = cProfile.Profile()
    profile.enable()
    run(number)
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(SHOWN)
    print(f"{number} operations", text.getvalue())


def _sampled(run: Run, seconds: float) -> None:
    from pyinstrument import Profiler

    number = _number(run, seconds)
    # All of it happens in this thread, on an event loop or not.
    profiler = Profiler(interval=INTERVAL_SECONDS, async_mode="disabled")
    with profiler:
        run(number)
    print(f"{number} operations", profiler.output_text(unicode=True, show_all=True))


def _number(run: Run, seconds: float) -> int:
    began = time.perf_counter()
    run(WARM)
    return max(WARM, round(seconds * WARM / (time.perf_counter() - began)))


def _has_pyinstrument() -> bool:
    try:
        import pyinstrument
    except ModuleNotFoundError:
        return False
    return bool(pyinstrument)


def _chosen(ways: Mapping[str, Run], way: str | None) -> list[str]:
    if way is not None and way not in ways:
        raise SystemExit(f"no way is named {way!r}; there are {', '.join(map(repr, ways))}")
    return list(ways) if way is None else [way]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.profile",
        description="Find where the time of one path goes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", choices=list(PATHS), help="what to profile")
    parser.add_argument(
        "--tool", choices=TOOLS, help="by default callgrind, or cprofile where servers are needed"
    )
    parser.add_argument("--way", help="one way to use the path instead of all")
    parser.add_argument(
        "--number",
        type=int,
        default=500,
        help="operations that callgrind counts, over as many others (default %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="for the other tools (default %(default)s)"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep callgrind's files, for callgrind_annotate"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
