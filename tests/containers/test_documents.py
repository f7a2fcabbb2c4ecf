"""What docs/testing.md shows of containers is so."""

from __future__ import annotations

import re

from lsn_consistency.testing import ContainerCluster, ContainerNode
from tests.examples.documents import ROOT, python_blocks

TESTING = ROOT / "docs" / "testing.md"


def test_the_block_with_containers_runs(pg: ContainerCluster) -> None:
    """It runs as it stands there, on whatever image these tests use."""
    (block,) = [each for each in python_blocks(TESTING) if "with ContainerCluster(" in each.text]
    exec(block.text, {})


def test_the_faults_of_hosts_exist() -> None:
    """Every fault that the table names is one of a container."""
    named = set(re.findall(r"`host\.(\w+)", TESTING.read_text("utf-8")))
    assert {"disconnect", "reconnect", "pause", "unpause", "kill", "start", "run"} == named
    assert [] == [name for name in named if not hasattr(ContainerNode, name)]
