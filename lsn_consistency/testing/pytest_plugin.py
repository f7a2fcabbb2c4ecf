"""
Fixtures for pytest: a real cluster, and a replica that lags.

::

    def test_the_order_is_there_at_once(pg_cluster, lagging_replica):
        app = make_app(pg_cluster.primary.conninfo, lagging_replica.conninfo)
        ...

`pg_cluster` is one `EmbeddedCluster` for the whole session. Each test that uses it, directly or
through other fixtures, finds it healed: all nodes run, replay runs, nothing is delayed and all
replicas have caught up, whatever the test before did to it. Data stays.

`lagging_replica` is its first replica with replay paused for the time of the test.

==================  ==================  ==========================================================
command line        ini file
==================  ==================  ==========================================================
``--lsn-bindir``    ``lsn_bindir``      the folder of PostgreSQL's programs
``--lsn-replicas``  ``lsn_replicas``    how many replicas (2)
``--lsn-require``   ``lsn_require``     fail instead of skip where there is no PostgreSQL
==================  ==================  ==========================================================

Without PostgreSQL these tests are skipped; with ``--lsn-require`` or the environment variable
``LSN_CONSISTENCY_REQUIRE_CLUSTER=1`` they fail, and also if a folder was named that holds none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

# Every run of pytest loads this module where the package is installed; what is heavy is imported
# when a test asks for a cluster.
if TYPE_CHECKING:
    from lsn_consistency.testing.cluster import EmbeddedCluster
    from lsn_consistency.testing.embedded import EmbeddedNode

REQUIRE_VARIABLE = "LSN_CONSISTENCY_REQUIRE_CLUSTER"

_DEFAULT_REPLICAS = "2"
_cluster_key: pytest.StashKey[EmbeddedCluster] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """
    Add the options to the command line and to the ini file.
    """
    bindir = "folder of PostgreSQL's programs (default: found by itself)"
    replicas = f"replicas of the fixture pg_cluster (default: {_DEFAULT_REPLICAS})"
    require = "fail instead of skip where there is no PostgreSQL"
    group = parser.getgroup("lsn_consistency", "clusters of lsn_consistency")
    group.addoption("--lsn-bindir", metavar="FOLDER", help=bindir)
    group.addoption("--lsn-replicas", metavar="N", type=int, help=replicas)
    group.addoption("--lsn-require", action="store_true", help=require)
    parser.addini("lsn_bindir", bindir, default="")
    parser.addini("lsn_replicas", replicas, default=_DEFAULT_REPLICAS)
    parser.addini("lsn_require", require, type="bool", default=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """
    Heal the cluster before the fixtures of a test that uses it are made.
    """
    cluster = item.config.stash.get(_cluster_key, None)
    if cluster is not None and "pg_cluster" in getattr(item, "fixturenames", ()):
        cluster.heal()


@pytest.fixture(scope="session")
def pg_cluster(pytestconfig: pytest.Config) -> Iterator[EmbeddedCluster]:
    """
    Offer a PostgreSQL primary with replicas for the whole session, healed before each test.
    """
    from lsn_consistency.testing._errors import ProgramsNotFoundError
    from lsn_consistency.testing.cluster import EmbeddedCluster

    cluster = EmbeddedCluster(_replicas(pytestconfig), bindir=_bindir(pytestconfig))
    try:
        cluster.start()
    except ProgramsNotFoundError as error:
        if _required(pytestconfig):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    pytestconfig.stash[_cluster_key] = cluster
    try:
        yield cluster
    finally:
        del pytestconfig.stash[_cluster_key]
        cluster.stop()


@pytest.fixture
def lagging_replica(pg_cluster: EmbeddedCluster) -> Iterator[EmbeddedNode]:
    """
    Offer a replica of `pg_cluster` that has what was committed so far, and applies nothing more.

    It is healed after the test.
    """
    replica = next(iter(pg_cluster.replicas.values()), None)
    if replica is None:
        pytest.fail("lagging_replica needs --lsn-replicas (ini: lsn_replicas) of at least 1")
    pg_cluster.wait_caught_up()
    replica.pause_replay()
    yield replica
    pg_cluster.heal()


def _bindir(config: pytest.Config) -> str | None:
    """Return the folder that was asked for, if any."""
    return config.getoption("--lsn-bindir") or config.getini("lsn_bindir") or None


def _replicas(config: pytest.Config) -> int:
    """Return the number of replicas; the command line counts more than the file."""
    given = config.getoption("--lsn-replicas")
    if given is not None:
        return int(given)
    try:
        return int(config.getini("lsn_replicas"))
    except ValueError:
        raise pytest.UsageError("lsn_replicas must be a whole number") from None


def _required(config: pytest.Config) -> bool:
    """Return whether a missing PostgreSQL is a failure; a wrong order is one as well."""
    from lsn_consistency.testing.programs import BINDIR_VARIABLE

    return bool(
        config.getoption("--lsn-require")
        or config.getini("lsn_require")
        or os.environ.get(REQUIRE_VARIABLE, "0") not in ("", "0")
        or _bindir(config)
        or os.environ.get(BINDIR_VARIABLE)
    )
