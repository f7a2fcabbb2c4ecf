"""Events are frozen records, and the core hands each to the hook once."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any, get_args

import pytest

from lsn_consistency import events
from lsn_consistency._core import Core
from lsn_consistency._observation import Observation, Server
from lsn_consistency._settings import Settings
from lsn_consistency.events import Event, NodeFailed, NodeRecovered, RoleChanged
from lsn_consistency.lsn import Lsn


def core() -> tuple[Core, list[Event], list[str]]:
    heard: list[Event] = []
    kicked: list[str] = []
    made = Core(
        ["primary", "a"],
        Settings.of({}),
        clock=lambda: 10.0,
        unix_clock=lambda: 1e9,
        emit=heard.append,
        kick=kicked.append,
        warn=lambda text: None,
    )
    return made, heard, kicked


def observed(at: float) -> Observation:
    return Observation(Server(7, "a", 5432, "1"), True, 1, Lsn(1), at, at)


@pytest.mark.parametrize("kind", get_args(Event))
def test_every_event_is_a_frozen_record(kind: Any) -> None:
    """A hook can keep what it gets, and it is documented."""
    assert kind.__doc__
    record = kind(*[None for _ in fields(kind)])
    with pytest.raises(FrozenInstanceError):
        setattr(record, fields(kind)[0].name, 1)
    assert record == kind(*[None for _ in fields(kind)])
    assert getattr(events, kind.__name__) is kind


def test_a_node_tells_of_its_role_its_failure_and_its_return() -> None:
    """One event for each change, none for what stays."""
    made, heard, _ = core()
    made.observed("a", observed(1.0))
    made.observed("a", observed(2.0))
    made.failed("a", ConnectionError("gone"))
    made.failed("a", ConnectionError(" "))
    made.observed("a", observed(11.0))
    assert [
        RoleChanged("a", None, "replica"),
        NodeFailed("a", "gone", 1),
        NodeFailed("a", "ConnectionError", 2),
        NodeRecovered("a"),
    ] == heard


def test_a_lost_connection_is_a_failure_once() -> None:
    """Ten connections that die with their server are one failure; the monitor looks each time."""
    made, heard, kicked = core()
    made.observed("a", observed(1.0))
    for _ in range(10):
        made.lost("a")
    assert [NodeFailed("a", "a connection in use was lost", 1)] == heard[1:]
    assert ["a"] * 10 == kicked


def test_a_node_that_is_well_again_is_looked_at_by_its_monitor() -> None:
    """A read's own connection may find it first, while the monitor sleeps on for seconds."""
    made, heard, kicked = core()
    made.observed("a", observed(1.0))
    made.failed("a", ConnectionError("gone"))
    assert [] == kicked
    made.observed("a", observed(11.0))
    made.observed("a", observed(12.0))
    assert NodeRecovered("a") in heard
    assert ["a"] == kicked
