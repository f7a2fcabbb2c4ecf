"""Processes that fork: each has pools and monitors of its own, and none harms another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.forking import CHILDREN
from tests.cluster.harness import Kind

ROOT = Path(__file__).parents[2]
SCENARIO_SECONDS = 100.0


def run(pg: EmbeddedCluster, *scenario: str) -> dict[str, Any]:
    """Run a scenario of `forking` in a process of its own; it must not say a word on stderr."""
    nodes = {
        "primary": pg.primary.conninfo,
        "replicas": {name: node.conninfo for name, node in pg.replicas.items()},
    }
    # Python 3.12 and newer warn of a fork beside threads, which is what these scenarios are about.
    ignore = "ignore:This process:DeprecationWarning"
    done = subprocess.run(
        [sys.executable, "-W", ignore, "-m", "tests.cluster.forking", *scenario],
        input=json.dumps(nodes),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=SCENARIO_SECONDS,
        check=False,
    )
    assert ("", 0) == (done.stderr, done.returncode)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_child_gets_pools_and_monitors_of_its_own(pg: EmbeddedCluster, table: str) -> None:
    """An open blocking router works in children, and its connections work on in the parent."""
    found = run(pg, "blocking")
    before, after, children = found["before"], found["after"], found["children"]
    assert [1, 1, 1, 1] == [each["rows"] for each in (before, *children, after)]
    for child in children:
        assert set() == set(child["pools"]) & set(before["pools"])
        # The parent's three monitors, and three more.
        assert (6, True) == (
            len(child["monitors"]),
            set(before["monitors"]) < set(child["monitors"]),
        )
    assert (before["pools"], before["monitors"]) == (after["pools"], after["monitors"])


def test_a_child_that_forks_and_closes_harms_nobody(pg: EmbeddedCluster, table: str) -> None:
    """Grandchildren work too, and close() ends what belongs to its own process."""
    found = run(pg, "blocking_grandchild")
    assert {"children": [1, 1], "parent": 1} == found


def test_a_given_pool_belongs_to_its_process(pg: EmbeddedCluster, table: str) -> None:
    """In a child, a router with the application's own pool says what to do instead."""
    found = run(pg, "given_pool")
    assert (1, 3, 1) == (found["before"], len(found["said"]), found["after"])
    for said in found["said"]:
        assert "primary" in said
        assert "was opened before a fork and belongs to the parent process" in said
        assert "give the router a conninfo, or make pool and router in each process" in said


def test_a_pool_that_a_child_opens_is_the_childs(pg: EmbeddedCluster, table: str) -> None:
    """A given pool made at import and not opened serves each process that opens it."""
    found = run(pg, "given_pool_not_open")
    assert {"children": [1, 1], "parent": 1} == found


def test_a_fork_beside_reading_threads_does_not_hang(pg: EmbeddedCluster, table: str) -> None:
    """Whatever lock a thread held in the moment of the fork, the child reads and writes."""
    found = run(pg, "under_load")
    assert ([1] * CHILDREN, 1) == ([child["rows"] for child in found["children"]], found["parent"])
    shared = [set(child["pools"]) & set(found["before"]) for child in found["children"]]
    assert [set()] * CHILDREN == shared


def test_an_open_async_router_is_opened_anew_in_a_child(pg: EmbeddedCluster, table: str) -> None:
    """A child says that it is not open there, opens it, and ends nothing of the parent's."""
    found = run(pg, "open_async")
    assert [1, 1] == [child["rows"] for child in found["children"]]
    assert (1, found["before"]) == (found["parent"], found["after"])
    for child in found["children"]:
        assert "the router is not open" in child["said"]
        assert "open()" in child["said"]


def test_a_router_made_before_the_fork_is_opened_after(
    kind: Kind, pg: EmbeddedCluster, table: str
) -> None:
    """A preloading server: made once at import, opened by each of three workers at once."""
    found = run(pg, "opened_in_children", kind)
    assert {"codes": [0, 0, 0], "rows": [1, 1, 1]} == found
