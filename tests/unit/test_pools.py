"""What a router's own pools are made with, and what their connections are set to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lsn_consistency import AsyncRouter, Router
from lsn_consistency._base import RECONNECT_SECONDS

PRIMARY = "host=nowhere dbname=shop"


@pytest.mark.parametrize("router_type", [Router, AsyncRouter])
def test_a_pool_gives_an_attempt_to_connect_up_soon(router_type: Any) -> None:
    """Its own attempts come at times that double; a node that is well again would wait for them."""
    router = router_type(primary=PRIMARY)
    assert RECONNECT_SECONDS == router._pool_arguments("primary", print)["reconnect_timeout"]
    router = router_type(primary=PRIMARY, pool_options={"reconnect_timeout": 60.0})
    assert 60.0 == router._pool_arguments("primary", print)["reconnect_timeout"]


@pytest.mark.parametrize(
    ("pool_options", "pooled", "expected"),
    [
        ({}, True, None),
        ({}, False, 5),
        ({"kwargs": {"autocommit": True}}, True, None),
        ({"kwargs": {"prepare_threshold": 5}}, True, 5),
        ({"kwargs": lambda: {"prepare_threshold": 5}}, True, 5),
    ],
    ids=["pooler", "no pooler", "other option", "asked for", "callable"],
)
def test_behind_a_pooler_nothing_is_prepared_unless_it_is_asked_for(
    pool_options: dict[str, Any], pooled: bool, expected: int | None
) -> None:
    """The next transaction may be on a server that has not prepared it; newer poolers follow."""
    conn = SimpleNamespace(prepare_threshold=5)
    facts: Any = SimpleNamespace(pooled=pooled)
    Router(primary=PRIMARY, pool_options=pool_options)._fit_to_pooler(conn, facts)
    assert expected == conn.prepare_threshold
