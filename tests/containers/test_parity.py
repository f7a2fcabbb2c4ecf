"""Both kinds of cluster can be used alike, so that a test for one is a test for the other."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from lsn_consistency.testing import (
    ContainerCluster,
    ContainerNode,
    EmbeddedCluster,
    EmbeddedNode,
)

NETWORK_FAULTS = {"disconnect", "disconnected", "reconnect", "pause", "unpause", "kill", "run"}
"""What only machines with networks of their own can have."""


def _surface(kind: type[Any]) -> dict[str, Any]:
    """Return what every public name of a class is: its signature, or that it is a property."""
    found: dict[str, Any] = {}
    for name in dir(kind):
        if not name.startswith("_"):
            member = inspect.getattr_static(kind, name)
            found[name] = inspect.signature(member) if callable(member) else type(member)
    return found


@pytest.mark.parametrize(
    ("embedded", "contained", "only_contained"),
    [(EmbeddedNode, ContainerNode, NETWORK_FAULTS), (EmbeddedCluster, ContainerCluster, set())],
)
def test_a_container_has_every_method_of_its_embedded_twin(
    embedded: type[Any], contained: type[Any], only_contained: set[str]
) -> None:
    """The same names with the same arguments; containers add the faults of networks."""
    ours, theirs = _surface(embedded), _surface(contained)
    assert only_contained == theirs.keys() - ours.keys()
    assert ours == {name: theirs.get(name) for name in ours}


def test_both_clusters_are_made_with_the_same_arguments() -> None:
    """They differ only in where PostgreSQL comes from: a folder or an image."""

    def arguments(kind: type[Any]) -> dict[str, Any]:
        given = inspect.signature(kind).parameters
        return {name: value for name, value in given.items() if name not in ("bindir", "image")}

    assert arguments(EmbeddedCluster) == arguments(ContainerCluster)
