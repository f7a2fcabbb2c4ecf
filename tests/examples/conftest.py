"""A database for each test, since examples and documents choose their tables' names freely."""

from __future__ import annotations

import re

import pytest

from lsn_consistency.testing import EmbeddedCluster


@pytest.fixture
def database(pg_cluster: EmbeddedCluster, request: pytest.FixtureRequest) -> str:
    """The name of an empty database, which is on every node."""
    name = re.sub(r"\W", "_", str(request.node.name))
    pg_cluster.primary.execute(f'CREATE DATABASE "{name}"')
    pg_cluster.wait_caught_up()
    return name
