"""
Operations for callgrind to count: ``valgrind ... python -m tests.benchmarks.counted PATH NUMBER``.

Each way runs in two children of this process, a number of times and twice that number. Both have
made the same start, so the difference of their totals is that of the operations alone.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import traceback
from pathlib import Path
from typing import Final

from lsn_consistency import _base
from tests.benchmarks.paths import PATHS, Run

WARM: Final = 50
SEED: Final = 1
_TOTALS: Final = "totals:"


def main() -> int:
    """
    Run the ways of a path, or the named one, and print the children that did.
    """
    path, number, *names = sys.argv[1:]
    with PATHS[path]() as ways:
        if unknown := [name for name in names if name not in ways]:
            known = ", ".join(map(repr, ways))
            print(f"no way is named {unknown[0]!r}; there are {known}", file=sys.stderr)
            return 2
        gc.disable()
        # Routers are closed in a child, as their connections are the parent's. These have none.
        _base._routers.clear()
        for name in names or list(ways):
            # The interpreter adapts itself to what runs often.
            ways[name](WARM)
            children = [_child(ways[name], times * int(number)) for times in (1, 2)]
            print(f"{number}\t{children[0]}\t{children[1]}\t{name}", flush=True)
            for child in children:
                _, status = os.waitpid(child, 0)
                if status:
                    return 1
    return 0


def _child(run: Run, number: int) -> int:
    child = os.fork()
    if child == 0:
        # Nothing that the parent has begun is ended here.
        try:
            # Replicas are drawn by chance.
            random.seed(SEED)
            run(number)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def read(printed: str, folder: Path) -> dict[str, float]:
    """
    Return the instructions of one operation by way, from what was printed and callgrind's files.
    """
    found = {}
    for line in printed.splitlines():
        number, once, twice, name = line.split("\t")
        totals = [_total(folder / f"callgrind.{pid}") for pid in (once, twice)]
        found[name] = (totals[1] - totals[0]) / int(number)
    return found


def _total(path: Path) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(_TOTALS):
            return int(line.removeprefix(_TOTALS).split()[0])
    raise ValueError(f"{path} has no totals")


if __name__ == "__main__":
    sys.exit(main())
