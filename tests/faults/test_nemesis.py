"""
The nemesis run in short: nothing stale, nothing lost, nothing stuck while faults come and go.

The long one is ``python -m tests.faults.soak --minutes 20``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lsn_consistency._observation import Observation
from tests.faults.page import markdown
from tests.faults.run import Options, soak
from tests.faults.soak import main
from tests.faults.verdict import failures

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]

SEED = int(os.environ.get("NEMESIS_SEED", "91"))
"""Its first faults hit a replica, the primary, and who the primary is."""

PATIENCE = 4.0
"""Other tests run beside this one, often on few processors."""


def test_nothing_is_stale_lost_or_stuck_under_faults() -> None:
    """
    A minute of reads and writes under faults of every sort meets every criterion.

    No violation, no write lost that must not be, no read that waits twice for a lost position, the
    reads answered within the router's limits, and by replicas while one of them has a fault.
    """
    options = Options(minutes=1.0, seed=SEED, pace=0.4)
    outcome = soak(options)

    page = f"{markdown(outcome.summary)}\n{options.command}"
    assert [] == failures(outcome.summary, patience=PATIENCE), page
    assert 500 < outcome.summary.judged_reads
    met = {fault.scope for episode in outcome.episodes for fault in episode.faults}
    assert {"replica", "primary", "failover"} == met


def test_a_router_that_trusts_every_replica_is_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """
    With the comparison of positions taken out, the same run finds violations.

    The command returns 1, and leaves the history of what was violated.
    """
    monkeypatch.setattr(Observation, "reaches", lambda seen, required: True)
    left = tmp_path / "run.json"
    arguments = ["--minutes", "0.2", "--seed", "5", "--faults", "pause_replay,apply_delay"]

    assert 1 == main([*arguments, "--json", str(left)])
    found = json.loads(left.read_text())
    assert found["summary"]["violations"]
    assert found["history"]
