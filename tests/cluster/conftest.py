"""Fixtures of the cluster tests: both kinds of router, and a cluster that is healed after use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import pytest

from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.harness import KINDS, App, Kind, make_table, open_router

OpenRouter = Callable[..., AbstractContextManager[App]]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Run the test with the blocking and with the async router."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _healed(request: pytest.FixtureRequest) -> Iterator[None]:
    """
    Start and thaw servers right after the test that stopped or froze them.

    All else the plugin undoes before the next test.
    """
    yield
    if "pg_cluster" not in request.fixturenames:
        return
    cluster: EmbeddedCluster = request.getfixturevalue("pg_cluster")
    if any(node.frozen or not node.running for node in cluster.nodes.values()):
        cluster.heal()


@pytest.fixture
def pg(pg_cluster: EmbeddedCluster) -> EmbeddedCluster:
    """Offer the session's cluster under a short name."""
    return pg_cluster


@pytest.fixture
def opened(kind: Kind, pg_cluster: EmbeddedCluster) -> OpenRouter:
    """Offer `open_router` for this kind and the session's cluster."""
    return partial(open_router, kind, pg_cluster)


@pytest.fixture
def table(pg_cluster: EmbeddedCluster) -> str:
    """Make an empty table that every replica has, and give its name."""
    return make_table(pg_cluster, "items")
