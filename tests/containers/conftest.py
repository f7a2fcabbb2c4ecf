"""Fixtures of the container tests: a cluster whose nodes have networks, healed for each test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from lsn_consistency.testing import ContainerCluster, ContainersUnavailableError
from tests.cluster.harness import KINDS, App, Kind, make_table, open_router

REQUIRE_VARIABLE = "LSN_CONSISTENCY_REQUIRE_CONTAINERS"
OpenRouter = Callable[..., AbstractContextManager[App]]

START_SECONDS = 300
"""The first test may have to pull an image."""

USER_TIMEOUT_MS = 1500

OPTIONS: dict[str, Any] = {
    "max_lag_seconds": 3.0,
    "wait_seconds": 0.5,
    "poll_interval": 0.2,
    "probe_timeout": 1.0,
    "connect_timeout": 1.0,
    "open_timeout": 5.0,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder, before ``-m`` selects by marker."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.containers)
            item.add_marker(pytest.mark.timeout(START_SECONDS))


def missing(error: ContainersUnavailableError) -> None:
    """Skip the test with the reason; where containers are required, fail it."""
    if os.environ.get(REQUIRE_VARIABLE, "0") not in ("", "0"):
        pytest.fail(str(error), pytrace=False)
    pytest.skip(str(error))


@pytest.fixture(scope="session")
def container_cluster() -> Iterator[ContainerCluster]:
    """Offer a primary and two replicas in containers for the whole session."""
    cluster = ContainerCluster(replicas=2)
    try:
        cluster.start()
    except ContainersUnavailableError as error:
        missing(error)
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def pg(container_cluster: ContainerCluster) -> ContainerCluster:
    """Offer the session's cluster, healed from what the test before did to it."""
    container_cluster.heal()
    return container_cluster


@pytest.fixture
def table(pg: ContainerCluster) -> str:
    """Make an empty table that every replica has, and give its name."""
    return make_table(cast(Any, pg), "items")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Run the test with the blocking and with the async router."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def opened(kind: Kind, pg: ContainerCluster) -> OpenRouter:
    """Offer `open_router` for this kind, with connections that notice a host that is gone."""
    nodes = {
        name: node.conninfo_for(tcp_user_timeout=USER_TIMEOUT_MS) for name, node in pg.nodes.items()
    }
    primary = nodes.pop("primary")
    cluster: Any = pg
    return partial(open_router, kind, cluster, primary=primary, replicas=nodes, **OPTIONS)
