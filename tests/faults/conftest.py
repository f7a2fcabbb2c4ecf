"""The cluster of the negative controls: a crash sets its replicas far back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lsn_consistency.testing import EmbeddedCluster
from tests.faults.workload import make_table

BULK_ROWS = 1_000_000
SETTINGS = {
    # Pages are hardly written back and no restartpoints are made, so after a crash a replica
    # begins where its base backup ended, before the bulk, and serves reads from there on.
    "shared_buffers": "256MB",
    "bgwriter_lru_maxpages": "0",
    "checkpoint_timeout": "1h",
    "max_wal_size": "8GB",
    "wal_keep_size": "4GB",
    "autovacuum": "off",
}


@pytest.fixture(scope="module")
def controlled() -> Iterator[EmbeddedCluster]:
    """Run a cluster that holds the table of the workload, and a bulk of others after it."""
    with EmbeddedCluster(replicas=2, settings=SETTINGS) as cluster:
        make_table(cluster.primary)
        cluster.primary.execute("CREATE TABLE bulk (id int)")
        cluster.primary.execute(f"INSERT INTO bulk SELECT generate_series(1, {BULK_ROWS})")
        cluster.wait_caught_up()
        yield cluster


@pytest.fixture
def pg(controlled: EmbeddedCluster) -> Iterator[EmbeddedCluster]:
    """Offer that cluster, and heal it after the test."""
    yield controlled
    controlled.heal()
