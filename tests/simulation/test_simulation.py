"""Seeds of the simulation: no promise is broken, and everything that it is for does happen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from tests.simulation.__main__ import BROKEN, replay_command
from tests.simulation.world import World, play

ROOT: Final = Path(__file__).parents[2]
PARTS: Final = 6
IN_CI: Final = os.environ.get("HYPOTHESIS_PROFILE") == "ci"
SEEDS: Final = int(os.environ.get("LSN_SIMULATION_SEEDS", "2000" if IN_CI else "240"))

# How often each thing happens at least, in a hundred seeds.
OFTEN: Final = {
    "cancelled operations": 20,
    "commits": 1000,
    "commits that a failover or a crash lost": 60,
    "crashes with loss": 3,
    "events LostWrite": 10,
    "events PositionUnknown": 20,
    "faults: cut replication": 20,
    "faults: delay": 20,
    "faults: freeze": 20,
    "faults: full pool": 20,
    "faults: hand over": 60,
    "faults: hold": 20,
    "faults: kill connection": 20,
    "faults: lag": 20,
    "faults: partition": 20,
    "faults: pause": 20,
    "faults: restore": 10,
    "faults: revoke": 5,
    "faults: slow link": 20,
    "faults: zombie": 5,
    "old primaries that came back as standbys": 20,
    "promotions": 30,
    "promotions with loss": 8,
    "reads caught_up": 800,
    "reads no_replica": 50,
    "reads not_caught_up": 50,
    "reads on a replica of a new timeline": 150,
    "reads primary_down": 1,
    "reads primary_required": 100,
    "reads timeline_changed": 20,
    "reads within_lag": 100,
    "requests with two threads": 50,
    "timelines asked for over replication": 20,
    "writes refused": 20,
}
# What is rare is asked for in all seeds together.
SOMETIMES: Final = (
    "commits that the primary does not show yet",
    "exceptions from a replica to the primary",
    "faults: full token",
    "faults: same timeline",
    "reads lag_exceeded",
    "stale reads, said to be",
)


@cache
def played(part: int) -> tuple[Counter[str], tuple[str, ...]]:
    """Return what happened in one part of the seeds, and what was broken there."""
    counts: Counter[str] = Counter()
    broken: list[str] = []
    for seed in range(part, SEEDS, PARTS):
        try:
            counts += play(seed).counts
        except AssertionError as error:
            broken.append(f"{error}\n  replay: {replay_command(seed)}")
    return counts, tuple(broken)


@cache
def everything() -> Counter[str]:
    counts: Counter[str] = Counter()
    for part in range(PARTS):
        counts += played(part)[0]
    return counts


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("part", range(PARTS))
def test_no_seed_breaks_a_promise(part: int) -> None:
    """Whatever fails, reads see what they must, and all is well again after it."""
    _, broken = played(part)
    assert not broken, "\n".join(broken)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("what", OFTEN)
def test_the_seeds_are_not_empty(what: str) -> None:
    """A simulation in which nothing happens would prove nothing."""
    assert everything()[what] >= OFTEN[what] * SEEDS // 100


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("what", SOMETIMES)
def test_what_is_rare_happens_too(what: str) -> None:
    """The rare cases are among the seeds as well."""
    assert everything()[what] > 0


@pytest.mark.parametrize("seed", [3, 11])
def test_a_seed_is_a_run(seed: int) -> None:
    """The same seed plays the same run, to the last operation."""
    first, second = World(seed), World(seed)
    first.run()
    second.run()
    assert first.history == second.history
    assert first.counts == second.counts


def test_the_command_plays_seeds() -> None:
    """The command says how many seeds it played, and ends well when none is broken."""
    command = [sys.executable, "-m", "tests.simulation", "--seeds", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr
    assert "2 seeds in" in done.stdout


def test_a_broken_promise_names_its_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A seed that fails says how to play it again."""
    from tests.simulation import __main__ as command

    def fail(seed: int, **_: object) -> World:
        raise AssertionError("stale")

    monkeypatch.setattr(command, "play", fail)
    monkeypatch.setattr(sys, "argv", ["simulation", "--seed", "42"])
    assert BROKEN == command.main()
    assert "python -m tests.simulation --seed 42" in capsys.readouterr().out
