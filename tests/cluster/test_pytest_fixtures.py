"""The fixtures of the pytest plugin on real servers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lsn_consistency
from lsn_consistency.testing._reaper import process_table

pytest_plugins = ["pytester"]

ROOT = Path(next(iter(lsn_consistency.__path__))).parent
LOAD_PLUGIN = ("-p", "no:lsn_consistency", "-p", "lsn_consistency.testing.pytest_plugin")

TESTS = """
import pytest

@pytest.fixture(scope="session")
def table(pg_cluster):
    pg_cluster.primary.execute("CREATE TABLE numbers (n int)")
    print("folder", pg_cluster.primary.datadir.parent)

def counts(pg_cluster):
    return [node.value("SELECT count(*) FROM numbers") for node in pg_cluster.nodes.values()]

def test_a_replica_lags(table, pg_cluster, lagging_replica):
    pg_cluster.primary.execute("INSERT INTO numbers VALUES (1)")
    pg_cluster.wait_caught_up()
    assert lagging_replica.paused
    assert counts(pg_cluster) == [1, 0, 1]

def test_it_has_caught_up_afterwards(table, pg_cluster):
    assert counts(pg_cluster) == [1, 1, 1]

def test_faults_are_left_behind(table, pg_cluster):
    pg_cluster.replicas["replica_1"].freeze()
    pg_cluster.replicas["replica_2"].promote()
    pg_cluster.primary.crash()

def test_the_next_test_finds_it_healed(table, pg_cluster):
    assert counts(pg_cluster) == [1, 1, 1]
    assert [node.role for node in pg_cluster.nodes.values()] == ["primary", "replica", "replica"]

def test_a_lagging_replica_that_crashed(lagging_replica):
    lagging_replica.crash()

def test_fixtures_of_a_test_find_it_healed_too(table, pg_cluster, lagging_replica):
    assert lagging_replica.running and lagging_replica.paused
"""


def test_each_test_finds_the_cluster_healed(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cluster serves the session, whatever its tests do to it, and is gone afterwards."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess(*LOAD_PLUGIN, "-W", "error", "-s", "--lsn-require")
    result.assert_outcomes(passed=6)
    (folder,) = re.findall(r"folder (\S+)", result.stdout.str())
    left = [row for row in process_table().values() if folder in " ".join(row.argv)]
    assert (False, []) == (Path(folder).exists(), left)
