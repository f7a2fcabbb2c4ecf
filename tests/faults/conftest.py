"""The cluster of the negative controls: a crash sets its replicas far back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.test_crashes import SETTINGS as CRASH_SETTINGS
from tests.faults.workload import make_table

# Pages are hardly written back and no restartpoints are made, so after a crash a replica opens for
# reads where its base backup ended, and has all that came later before it.
SETTINGS = {**CRASH_SETTINGS, "bgwriter_lru_maxpages": "0"}


@pytest.fixture(scope="module")
def controlled() -> Iterator[EmbeddedCluster]:
    """Run a cluster that holds the table of the workload."""
    with EmbeddedCluster(replicas=2, settings=SETTINGS) as cluster:
        make_table(cluster.primary)
        # A new copy of the primary has the table, however far back a crash sets it.
        cluster.replicas["replica_1"].rebuild()
        cluster.wait_caught_up()
        yield cluster


@pytest.fixture
def pg(controlled: EmbeddedCluster) -> Iterator[EmbeddedCluster]:
    """Offer that cluster, and heal it after the test."""
    yield controlled
    controlled.heal()
