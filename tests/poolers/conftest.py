"""Fixtures of the pooler tests: PgBouncer before every node, in each pool mode that can work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from lsn_consistency.testing import EmbeddedCluster, PgBouncer, ProgramsNotFoundError
from lsn_consistency.testing.pgbouncer import PoolMode, find_pgbouncer
from lsn_consistency.testing.pytest_plugin import REQUIRE_VARIABLE

# Fixtures of the cluster tests are fixtures here as well.
from tests.cluster.conftest import _healed, kind, pg, table
from tests.cluster.harness import App, Kind
from tests.poolers.pgbouncer import SETTINGS, OpenThrough, open_through

__all__ = ["_healed", "kind", "pg", "table"]

MODES: tuple[PoolMode, ...] = ("transaction", "session")
HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder as a test of real servers."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session", autouse=True)
def _program(pytestconfig: pytest.Config) -> None:
    """Skip without PgBouncer; fail where real servers are required."""
    try:
        find_pgbouncer()
    except ProgramsNotFoundError as error:
        ordered = os.environ.get(REQUIRE_VARIABLE, "0") not in ("", "0")
        if ordered or pytestconfig.getoption("--lsn-require"):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> PoolMode:
    """Run the test in transaction and in session mode."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def pooler(mode: PoolMode, pg: EmbeddedCluster) -> Iterator[PgBouncer]:
    """Run a PgBouncer before every node of the session's cluster, under the nodes' names."""
    with PgBouncer(pg.nodes, mode, settings=SETTINGS) as running:
        yield running


@pytest.fixture
def through(kind: Kind, pg: EmbeddedCluster, pooler: PgBouncer) -> OpenThrough:
    """Offer `open_through` for this kind of router, the session's cluster and its pooler."""

    def opened(*pooled: str, **options: Any) -> AbstractContextManager[App]:
        return open_through(kind, pg, pooler, pooled or tuple(pg.nodes), **options)

    return opened
