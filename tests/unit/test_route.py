"""A route says where and why, in words that logs and metrics can keep."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from lsn_consistency import Reason, Route


def test_reasons_are_their_lower_case_names() -> None:
    """The values are part of the public contract: they end up in logs and labels."""
    assert {
        "caught_up",
        "within_lag",
        "forced",
        "primary_required",
        "not_caught_up",
        "lag_exceeded",
        "timeline_changed",
        "no_replica",
        "primary_down",
    } == {str(reason) for reason in Reason}
    assert [reason.name.lower() for reason in Reason] == [reason.value for reason in Reason]
    assert f"{Reason.CAUGHT_UP}" == "caught_up"


def test_a_route_is_frozen_and_knows_the_primary() -> None:
    """`is_primary` follows the role, and nobody changes a route."""
    route = Route("eu", "replica", Reason.CAUGHT_UP)
    assert (False, 0.0, None, False) == (
        route.is_primary,
        route.waited_seconds,
        route.lag_seconds,
        route.stale,
    )
    assert Route("primary", "primary", Reason.NO_REPLICA).is_primary
    with pytest.raises(FrozenInstanceError):
        route.name = "us"  # type: ignore[misc]
    assert route == Route("eu", "replica", Reason.CAUGHT_UP)
