"""What an observation proves: yes, no, or unknown."""

from __future__ import annotations

import pytest

from lsn_consistency import Position
from lsn_consistency._observation import Observation, Server
from lsn_consistency.lsn import Lsn

SEEN = Observation(Server(7, "a", 5432, "1"), True, 2, Lsn(1000), 1.0, 1.1, bound=Lsn(1200))


@pytest.mark.parametrize(
    ("required", "expected"),
    [
        (Position(7, 2, Lsn(999)), True),
        (Position(7, 2, Lsn(1000)), True),
        (Position(7, 2, Lsn(1001)), False),
        (Position(7, 1, Lsn(1)), False),
        (Position(7, 3, Lsn(1)), False),
        (Position(8, 2, Lsn(1)), False),
    ],
)
def test_reaches(required: Position, expected: bool) -> None:
    """Reached is: the same system, the same timeline, and at least that far."""
    assert expected is SEEN.reaches(required)


def test_what_is_unknown_is_neither_reached_nor_not() -> None:
    """NULL gives None, except where another system makes it a plain no."""
    required = Position(7, 2, Lsn(1))
    assert SEEN._replace(lsn=None).reaches(required) is None
    assert SEEN._replace(timeline=None).reaches(required) is None
    assert SEEN._replace(lsn=None).reaches(Position(8, 2, Lsn(1))) is False


def test_positions_are_whole_or_none() -> None:
    """A position with a part missing is no position."""
    assert SEEN.position == Position(7, 2, Lsn(1000))
    assert SEEN.bound_position == Position(7, 2, Lsn(1200))
    assert SEEN._replace(lsn=None).position is None
    assert SEEN._replace(bound=None).bound_position is None
    assert SEEN._replace(timeline=None).position is None
    assert SEEN._replace(timeline=None).bound_position is None


def test_the_place_outlives_a_restart() -> None:
    """The address stays, the server does not."""
    restarted = Server(7, "a", 5432, "2")
    assert SEEN.server.place == restarted.place
    assert SEEN.server != restarted
    assert SEEN.server.place != Server(7, "a", 5433, "1").place
