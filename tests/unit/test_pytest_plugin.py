"""What the pytest plugin says and does without a PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lsn_consistency
from lsn_consistency.testing.programs import BINDIR_VARIABLE
from lsn_consistency.testing.pytest_plugin import REQUIRE_VARIABLE

pytest_plugins = ["pytester"]

ROOT = Path(next(iter(lsn_consistency.__path__))).parent

# The plugin is named, and its entry point blocked: so it does not matter whether the package is
# installed or only on the path.
LOAD_PLUGIN = ("-p", "no:lsn_consistency", "-p", "lsn_consistency.testing.pytest_plugin")

NO_POSTGRESQL = """
from lsn_consistency.testing import programs

programs._candidates = lambda: iter(())
"""

TWO_TESTS = """
def test_cluster(pg_cluster):
    pg_cluster.primary.execute("SELECT 1")

def test_lagging(lagging_replica):
    lagging_replica.execute("SELECT 1")
"""

SHOW_OPTIONS = """
from lsn_consistency.testing import cluster

class Recorder:
    replicas = {}

    def __init__(self, replicas, *, bindir):
        print("asked for", replicas, bindir)

    def start(self):
        pass

    stop = heal = start

cluster.EmbeddedCluster = Recorder
"""


@pytest.fixture
def machine(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Give a folder with tests that want a cluster, on a machine without PostgreSQL."""
    monkeypatch.delenv(REQUIRE_VARIABLE, raising=False)
    monkeypatch.delenv(BINDIR_VARIABLE, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeconftest(NO_POSTGRESQL)
    pytester.makepyfile(TWO_TESTS)
    return pytester


def test_without_postgresql_the_tests_are_skipped_with_the_reason(machine: pytest.Pytester) -> None:
    """The reason of the skip says how to get PostgreSQL."""
    result = machine.runpytest_subprocess(*LOAD_PLUGIN, "-rs")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(
        ["SKIPPED*no PostgreSQL programs found: pip install 'lsn-consistency?test?'*"]
    )


@pytest.mark.parametrize("how", ["option", "ini", "variable"])
def test_where_a_cluster_is_required_its_lack_is_an_error(
    machine: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Nothing is skipped when a run without PostgreSQL proves nothing."""
    if how == "ini":
        machine.makeini("[pytest]\nlsn_require = true\n")
    if how == "variable":
        monkeypatch.setenv(REQUIRE_VARIABLE, "1")
    options = ["--lsn-require"] if how == "option" else []
    result = machine.runpytest_subprocess(*LOAD_PLUGIN, *options)
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*no PostgreSQL programs found: pip install*"])


def test_the_variable_can_be_switched_off(
    machine: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable of 0 requires nothing."""
    monkeypatch.setenv(REQUIRE_VARIABLE, "0")
    machine.runpytest_subprocess(*LOAD_PLUGIN).assert_outcomes(skipped=2)


@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_folder_without_programs_is_an_error(
    machine: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Who names a folder is not left with skipped tests if it is the wrong one."""
    folder = str(machine.path)
    if how == "variable":
        monkeypatch.setenv(BINDIR_VARIABLE, folder)
    options = [f"--lsn-bindir={folder}"] if how == "option" else []
    result = machine.runpytest_subprocess(*LOAD_PLUGIN, *options)
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines([f"*{folder} holds no initdb and no postgres*"])


def test_options_reach_the_cluster(machine: pytest.Pytester) -> None:
    """The number of replicas and the folder are those of the ini file, then of the command line."""
    machine.makeconftest(SHOW_OPTIONS)
    machine.makeini("[pytest]\nlsn_replicas = 3\nlsn_bindir = here\n")
    machine.makepyfile("def test_one(pg_cluster): pass")
    told = [
        machine.runpytest_subprocess(*LOAD_PLUGIN, "-s", *options).stdout.str()
        for options in ([], ["--lsn-replicas=1", "--lsn-bindir=there"])
    ]
    assert [True, True] == ["asked for 3 here" in told[0], "asked for 1 there" in told[1]]


def test_a_lagging_replica_needs_a_replica(machine: pytest.Pytester) -> None:
    """Without replicas the fixture says which option is missing."""
    machine.makeconftest(SHOW_OPTIONS)
    machine.makepyfile("def test_one(lagging_replica): pass")
    result = machine.runpytest_subprocess(*LOAD_PLUGIN)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*lagging_replica needs --lsn-replicas*at least 1*"])


def test_a_wrong_number_of_replicas_is_an_error(machine: pytest.Pytester) -> None:
    """An ini value that is no number is named."""
    machine.makeini("[pytest]\nlsn_replicas = many\n")
    result = machine.runpytest_subprocess(*LOAD_PLUGIN)
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*lsn_replicas must be a whole number*"])


def test_tests_without_a_cluster_are_left_alone(machine: pytest.Pytester) -> None:
    """The plugin starts nothing and skips nothing of its own accord, doctests included."""
    machine.makepyfile('def test_one():\n    """\n    >>> 1\n    1\n    """\n')
    result = machine.runpytest_subprocess(*LOAD_PLUGIN, "--lsn-require", "--doctest-modules")
    result.assert_outcomes(passed=2)


def test_the_plugin_loads_nothing_heavy_of_the_kit() -> None:
    """Every run of pytest loads the plugin: the cluster is imported when a test wants one."""
    script = (
        "import sys, lsn_consistency.testing.pytest_plugin;"
        "print([name for name in sys.modules if name.startswith('lsn_consistency.testing')])"
    )
    command = [sys.executable, "-c", script]
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    expected = ["lsn_consistency.testing", "lsn_consistency.testing.pytest_plugin"]
    assert f"{expected}\n" == told.stdout
