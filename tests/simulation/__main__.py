"""
Play seeds: ``python -m tests.simulation --seeds 5000``, or one again with ``--seed N --verbose``.
"""

from __future__ import annotations

import argparse
import ast
import sys
import time
import traceback
from collections import Counter
from typing import Any, Final

from tests.simulation.world import BUSY_SECONDS, play

BROKEN: Final = 1
"""The status of a run in which a promise was broken."""
CRASHED: Final = 3
"""The status of a run that an error of another kind ended."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds to play")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="play this one only")
    parser.add_argument("--fix", default="", help="part of the shape, as in pooled=True;clients=2")
    parser.add_argument("--faults", help="only these kinds, with commas")
    parser.add_argument("--first", action="store_true", help="stop at the first that fails")
    parser.add_argument("--seconds", type=float, default=BUSY_SECONDS, help="of virtual time")
    parser.add_argument("--verbose", action="store_true", help="print what happens")
    given = parser.parse_args()
    seeds = (
        [given.seed] if given.seed is not None else range(given.start, given.start + given.seeds)
    )
    fixed = dict(part.split("=") for part in given.fix.split(";") if part)
    fixed = {name: _value(text) for name, text in fixed.items()}
    if given.faults is not None:
        fixed["faults"] = frozenset(given.faults.split(","))
    counts: Counter[str] = Counter()
    failed: list[int] = []
    status = 0
    started = time.process_time()
    for seed in seeds:
        try:
            world = play(seed, fixed=fixed, seconds=given.seconds, verbose=given.verbose)
            counts += world.counts
        except Exception as error:
            failed.append(seed)
            status = max(status, BROKEN if isinstance(error, AssertionError) else CRASHED)
            if given.verbose or not isinstance(error, AssertionError):
                traceback.print_exc()
            print(f"{type(error).__name__}: {error}\n  replay: {replay_command(seed)}")
            if given.first:
                break
    took = time.process_time() - started
    for what, number in sorted(counts.items()):
        print(f"{number:9d}  {what}")
    speed = len(seeds) / took
    print(f"{len(seeds)} seeds in {took:.1f} s of CPU, {speed:.1f} a second; failed: {failed}")
    return status


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


def replay_command(seed: int) -> str:
    return f"python -m tests.simulation --seed {seed} --verbose"


if __name__ == "__main__":
    sys.exit(main())
