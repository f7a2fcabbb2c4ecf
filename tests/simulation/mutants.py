"""
Mutants: small wrong changes of what decides, each against one rule, and proof that each is found.

``python -m tests.simulation.mutants`` makes a copy of the package for each and plays seeds against
it until one fails; it prints which. A mutant that lives, or whose text has gone from the source,
fails the check. Further arguments name mutants.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import lsn_consistency
from tests.simulation.__main__ import BROKEN

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = Path(lsn_consistency.__file__).parent
SEEDS: Final = 250
LIMIT_SECONDS: Final = 240
LAG: Final = ("--faults", "lag,pause,hold,delay,freeze,slow link", "--fix", "max_lag_seconds=0.2")
CRASHES: Final = (
    "--faults",
    "crash,lag,pause,hold",
    "--fix",
    "pooled=False;silent=True;tick_seconds=0.15",
)
FAILOVERS: Final = ("--faults", "failover,zombie,follow,partition,stop,lag,hold")


Edit = tuple[str, str, str]
RULES_ONLY: Final[tuple[Edit, ...]] = (
    (
        "_cluster.py",
        "if primary is None or primary.in_recovery or self.conflict is not None:",
        "if True:",
    ),
)
"""The rules themselves decide about every read, and no shortlist."""


@dataclass(frozen=True)
class Mutant:
    """
    Name a wrong change and the rule that it breaks.

    ``arguments`` of the simulation make the worlds in which the rule matters frequent, ``also`` is
    what has to change beside it.
    """

    name: str
    rule: str
    module: str
    old: str
    new: str
    arguments: tuple[str, ...] = ()
    also: tuple[Edit, ...] = ()

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Return all changes: module, old and new text."""
        return ((self.module, self.old, self.new), *self.also)


@dataclass(frozen=True)
class Verdict:
    """Tell what killed a mutant; nothing did if ``killer`` is None."""

    mutant: Mutant
    killer: str | None
    seconds: float
    said: str = ""

    def __str__(self) -> str:
        fate = f"killed by {self.killer}" if self.killer else "LIVES"
        return f"{self.seconds:5.1f} s  {self.mutant.name}: {fate}  {self.said}"


MUTANTS: Final = (
    Mutant(
        "caught up without the LSN",
        "CAUGHT_UP: a replica's replay LSN has reached every position of this system in the token",
        "_observation.py",
        "return self.timeline == required.timeline and self.lsn >= required.lsn",
        "return self.timeline == required.timeline",
        also=RULES_ONLY,
    ),
    Mutant(
        "timelines are not compared",
        "LSNs of different timelines are compared only through the history",
        "_observation.py",
        "return self.timeline == required.timeline and self.lsn >= required.lsn",
        "return self.lsn >= required.lsn",
        (*FAILOVERS, "--fix", "privilege=stats;processes=3"),
        also=RULES_ONLY,
    ),
    Mutant(
        "the age of an observation does not count",
        "The bound counts the age of the observation too",
        "_observation.py",
        "return now - self.moment_of(seen)",
        "return seen.received_at - self.moment_of(seen)",
        LAG,
        RULES_ONLY,
    ),
    Mutant(
        "flush positions count at once",
        "Lag is measured, not guessed: asynchronous commits are flushed late",
        "_observation.py",
        "if seen.sent_at - self._still_since >= seen.flush_delay_seconds:",
        "if True:",
        (*LAG, "--fix", "max_lag_seconds=0.4;asynchronous=0.5"),
    ),
    Mutant(
        "samples are taken when they arrive",
        "The time of an observation is when its query was sent",
        "_observation.py",
        "self._inserts.add(seen.sent_at, seen.lsn)",
        "self._inserts.add(seen.received_at, seen.lsn)",
        LAG,
    ),
    Mutant(
        "positions never go down",
        "A new observation replaces the old one, also downwards",
        "_nodes.py",
        "self.newest = seen\n        self.role",
        "self.newest = max(self.newest or seen, seen, key=lambda each: each.lsn or 0)\n"
        "        self.servers[seen.server.place] = self.newest\n        self.role",
        CRASHES,
    ),
    Mutant(
        "a pooler is trusted",
        "Behind a pooler every read checks inside its own READ COMMITTED transaction",
        "_core.py",
        "if facts.pooled:\n            return None",
        "if False:\n            return None",
        ("--fix", "pooled=True;replicas=3;stranger=False"),
    ),
    Mutant(
        "a former primary stays one",
        "Two primaries at once: the higher timeline",
        "_cluster.py",
        "and (seen.timeline or 0) >= self.timeline",
        "",
        FAILOVERS,
    ),
    Mutant(
        "two primaries of one timeline are no conflict",
        "Two primaries at once: the higher timeline, else an error",
        "_cluster.py",
        "if len(servers) > 1:",
        "if False:",
        ("--faults", "failover,same timeline,follow"),
    ),
    Mutant(
        "any system is ours",
        "An LSN means nothing without the cluster that it was read on",
        "_decision.py",
        "return seen.server.system_id == system_id",
        "return True",
        ("--fix", "stranger=True;replicas=3"),
        also=RULES_ONLY,
    ),
    Mutant(
        "pins are ignored",
        "PRIMARY_REQUIRED: STRONG, a write, pin_until, or a sticky window",
        "_decision.py",
        "return until is not None and until > unix_now",
        "return False",
        also=RULES_ONLY,
    ),
    Mutant(
        "a full token has every position",
        "A full token may have lost the position of this system: unknown goes to the primary",
        "_lineage.py",
        "if required is None and read.token.is_full:",
        "if False:",
        ("--faults", "full token,lag,pause"),
        also=RULES_ONLY,
    ),
    Mutant(
        "lag is decided once",
        "max_lag_seconds is a promise about the data on the connection that is used",
        "_decision.py",
        "return cluster.lag_seconds(seen, now) <= read.lag_limit",
        "return True",
        LAG,
        also=RULES_ONLY,
    ),
    Mutant(
        "the history is not asked",
        "A position (t, X) is on timeline T if t is an ancestor with switch point >= X",
        "lsn.py",
        "return position.lsn <= end",
        "return True",
        FAILOVERS,
    ),
    Mutant(
        "the switch point itself is lost",
        "An ancestor's switch point >= X: the switch point itself is on both",
        "lsn.py",
        "return position.lsn <= end",
        "return position.lsn < end",
        FAILOVERS,
    ),
    Mutant(
        "unknown history is proof",
        "TIMELINE_CHANGED: its position cannot be proven to be on the primary's timeline",
        "lsn.py",
        "return False if self.complete or position.timeline > self.timeline else None",
        "return True",
        (*FAILOVERS, "--fix", "privilege=stats"),
    ),
    Mutant(
        "a newer timeline is not looked for",
        "A promotion that another process has seen: the primary known here is a former one",
        "_decision.py",
        "if known is None or known >= named:\n        return None",
        "return None",
        FAILOVERS,
    ),
    Mutant(
        "what is received is not covered",
        "After a replica read the upper bound is greatest(replay, receive)",
        "_sql.py",
        "return max(replay, receive)",
        "return replay",
    ),
    Mutant(
        "the insert position as it is",
        "The insert position, normalised: an idle primary's page header is never replayed",
        "lsn.py",
        "return Lsn(page_start) if offset <= header_size else lsn",
        "return lsn",
    ),
    Mutant(
        "an unknown position is nothing",
        "If the primary is unreachable after COMMIT the session is pinned: fail closed",
        "_positions.py",
        "session.pin(until)",
        "pass",
    ),
    Mutant(
        "lost positions are kept",
        "A token beyond the switch point is reported, and re-issued at once",
        "session.py",
        "kept = held.without(lost.system_id) if still_held else held",
        "kept = held",
    ),
    Mutant(
        "the flush position is the token",
        "pg_current_wal_insert_lsn, not what is written or flushed, covers asynchronous commits",
        "_sql.py",
        "            else position\n        ),\n        flush_lsn",
        "            else second\n        ),\n        flush_lsn",
        ("--fix", "asynchronous=0.5"),
    ),
    Mutant(
        "at once without the LSN",
        "CAUGHT_UP: a replica's replay LSN has reached every position of this system in the token",
        "_decision.py",
        "if found is None or found.lsn < lsn or now > found.until:",
        "if found is None or now > found.until:",
        also=(("_shortlist.py", "return self.lsn >= lsn and now", "return now"),),
    ),
    Mutant(
        "at once whatever the lag",
        "max_lag_seconds is a promise about the data on the connection that is used",
        "_shortlist.py",
        "self.until = moment + max_lag_seconds",
        "self.until = math.inf",
        LAG,
    ),
    Mutant(
        "at once on any timeline",
        "LSNs of different timelines are compared only through the history",
        "_decision.py",
        "elif required[1] == shortlist.timeline:",
        "elif True:",
        FAILOVERS,
        (
            (
                "_shortlist.py",
                "timeline == self.timeline\n        return ours",
                "True\n        return ours",
            ),
        ),
    ),
    Mutant(
        "at once despite a pin",
        "PRIMARY_REQUIRED: STRONG, a write, pin_until, or a sticky window",
        "_decision.py",
        "if not level.uses_token or token.pin_until is not None:",
        "if not level.uses_token:",
    ),
    Mutant(
        "at once for a full token",
        "A full token may have lost the position of this system: unknown goes to the primary",
        "_decision.py",
        "        if token.is_full:\n            return None\n        lsn = -1",
        "        lsn = -1",
        ("--faults", "full token,lag,pause"),
    ),
    Mutant(
        "at once over any connection",
        "A node is an endpoint: the server behind a connection may have restarted in the past",
        "_connections.py",
        "seen = core.usable(facts, now)",
        "seen = core.cluster.nodes[facts.node].newest",
        CRASHES,
    ),
)


def judge(mutant: Mutant) -> Verdict:
    """Say what kills a mutant: a seed of worlds that are made for it, or of any worlds."""
    started = time.perf_counter()
    with _patched(mutant) as folder:
        for arguments in dict.fromkeys((mutant.arguments, ())):
            found = _play(folder, arguments)
            if found is not None:
                return Verdict(mutant, found[0], time.perf_counter() - started, found[1])
    return Verdict(mutant, None, time.perf_counter() - started)


@contextmanager
def _patched(mutant: Mutant) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lsn-mutant-") as name:
        folder = Path(name)
        left_out = shutil.ignore_patterns("__pycache__", "demo", "cli", "integrations")
        shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=left_out)
        for module, old, new in mutant.edits:
            _change(folder / PACKAGE.name / module, old, new, mutant.name)
        shutil.copytree(ROOT / "tests/simulation", folder / "tests/simulation", ignore=left_out)
        shutil.copy(ROOT / "tests/__init__.py", folder / "tests/__init__.py")
        yield folder


def _change(path: Path, old: str, new: str, name: str) -> None:
    text = path.read_text("utf-8")
    if text.count(old) != 1:
        raise LookupError(
            f"the mutant {name!r} changes {old!r}, which is in {path.name} {text.count(old)} "
            "times: bring the list up to date"
        )
    path.write_text(text.replace(old, new), "utf-8")


def _play(folder: Path, arguments: tuple[str, ...]) -> tuple[str, str] | None:
    """Play seeds until one fails; return which, and what it said."""
    command = ["-m", "tests.simulation", "--first", "--seeds", str(SEEDS), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    out = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    if not out.returncode:
        return None
    found = re.search(r"--seed (\d+)", out.stdout)
    # A mutant that cannot even run is no proof of anything.
    if found is None or out.returncode != BROKEN:
        raise RuntimeError(f"the simulation ended otherwise: {out.stdout}{out.stderr}")
    return shlex.join(["--seed", found[1], *arguments]), out.stdout.splitlines()[0][:120]


def judge_all(mutants: Iterable[Mutant], *, workers: int = 2) -> Iterator[Verdict]:
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(judge, mutants)


def main(names: list[str]) -> int:
    chosen = [each for each in MUTANTS if not names or any(name in each.name for name in names)]
    alive = 0
    for verdict in judge_all(chosen):
        print(verdict, flush=True)
        alive += verdict.killer is None
    print(f"{len(chosen)} mutants, {alive} of them live")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
