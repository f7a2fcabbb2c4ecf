"""The reading of rows: text from a server becomes an observation, or stays unknown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from lsn_consistency import Position, _sql
from lsn_consistency._observation import Observation, Server
from lsn_consistency._sql import Identity, read_identity, read_observation
from lsn_consistency._steps import Fetch, NodeFailure, Reply, identify, observe
from lsn_consistency.lsn import Lsn

IDENTITY = Identity(Server(7, "10.0.0.1", 5432, "1700000000.123456"), 8192, 16777216, 0.6)
COLUMNS = ("pid", "recovery", "paused", "lsn", "other", "timeline", "streaming", "delayed", "age")
STANDBY = dict(
    zip(
        COLUMNS,
        ("42", "t", "not paused", "0/3000100", "0/3000200", "1", "t", "f", "1.5"),
        strict=True,
    )
)
PRIMARY = dict(
    zip(COLUMNS, ("42", "f", None, "0/3000100", "0/3000080", "1", "f", "f", None), strict=True)
)
TAIL = ("7", "10.0.0.1", "5432", "1700000000.123456", "8192", "16777216", "0.2")


def seen(row: Mapping[str, str | None], *, pid: int = 42, **changed: str | None) -> Observation:
    return read_observation(IDENTITY, tuple({**row, **changed}.values()), pid, 1.0, 1.1)


def test_a_standby() -> None:
    """Replay is the position, the greater of replay and receive the bound."""
    expected = Observation(
        server=IDENTITY.server,
        in_recovery=True,
        timeline=1,
        lsn=Lsn(0x3000100),
        sent_at=1.0,
        received_at=1.1,
        bound=Lsn(0x3000200),
        flush_lsn=None,
        flush_delay_seconds=0.6,
        replay_age_seconds=1.5,
        pooled=False,
    )
    assert expected == seen(STANDBY)


def test_a_primary() -> None:
    """The insert position is position and bound, the flush position beside it."""
    observed = seen(PRIMARY)
    assert (False, Lsn(0x3000100), Lsn(0x3000100), Lsn(0x3000080)) == (
        observed.in_recovery,
        observed.lsn,
        observed.bound,
        observed.flush_lsn,
    )
    assert observed.replay_age_seconds is None


@pytest.mark.parametrize(
    ("changed", "bound"),
    [
        ({}, 0x3000200),
        ({"other": "0/3000080"}, 0x3000100),
        ({"paused": "paused"}, 0x3000100),
        ({"paused": "pause requested"}, 0x3000200),
        ({"delayed": "t"}, 0x3000100),
        ({"streaming": "f"}, None),
        ({"streaming": "f", "paused": "paused"}, 0x3000100),
        ({"other": None}, None),
        ({"lsn": None}, None),
    ],
    ids=repr,
)
def test_the_bound_of_a_standby(changed: dict[str, Any], bound: int | None) -> None:
    """Held back it shows its replay, else up to what it received; from an archive nobody knows."""
    assert (None if bound is None else Lsn(bound)) == seen(STANDBY, **changed).bound


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0/3002018", 0x3002000),
        ("0/3002019", 0x3002019),
        ("0/3002028", 0x3002028),
        ("0/4000028", 0x4000000),
        ("0/4000029", 0x4000029),
        ("0/3002000", 0x3002000),
    ],
)
def test_an_insert_position_past_a_header_is_the_start_of_its_page(
    text: str, expected: int
) -> None:
    """24 bytes on a page, 40 on the first of a segment; replay positions are left as they are."""
    assert Lsn(expected) == seen(PRIMARY, lsn=text).lsn
    assert Lsn(expected) == seen(PRIMARY, lsn=text).bound
    assert Lsn.parse(text) == seen(STANDBY, lsn=text).lsn


def test_the_servers_own_sizes_count() -> None:
    """A server may be built with other pages and made with other segments."""
    identity = read_identity((*PRIMARY.values(), *TAIL[:4], "1024", "1048576", "0.2"), 42)
    row = {**PRIMARY, "lsn": "0/3000418"}
    observed = read_observation(identity, tuple(row.values()), 42, 1.0, 1.1)
    assert Lsn(0x3000400) == observed.lsn
    row["lsn"] = "0/3100028"
    observed = read_observation(identity, tuple(row.values()), 42, 1.0, 1.1)
    assert Lsn(0x3100000) == observed.lsn


def test_null_stays_unknown() -> None:
    """Nothing is guessed for a column without a value."""
    observed = seen(STANDBY, lsn=None, timeline=None, age=None)
    assert (None, None, None, None) == (
        observed.lsn,
        observed.timeline,
        observed.replay_age_seconds,
        observed.bound,
    )
    assert seen(PRIMARY, other=None).flush_lsn is None
    assert observed.reaches(Position(7, 1, Lsn(0))) is None


def test_padded_lsns_are_read() -> None:
    """PostgreSQL 19 pads with zeros."""
    assert Lsn(0x301F780) == seen(STANDBY, lsn="0/0301F780").lsn
    assert Lsn(0x301F780) == seen(STANDBY, lsn="00000000/0301F780").lsn


def test_the_identity() -> None:
    """A server is its system, address, port and start; the flush delay is three writer delays."""
    identity = read_identity((*STANDBY.values(), *TAIL), 42)
    assert Identity(IDENTITY.server, 8192, 16777216, pytest.approx(0.6)) == identity  # type: ignore[arg-type]
    assert not identity.limited


def test_a_negative_system_identifier_is_the_unsigned_number() -> None:
    """``pg_control_system()`` shows clusters of 2038 and later as negative."""
    identity = read_identity((*STANDBY.values(), "-1", *TAIL[1:]), 42)
    assert identity.server.system_id == 2**64 - 1


def test_a_socket_has_no_address() -> None:
    """Behind a socket file address and port are unknown, and no part of the comparison fails."""
    identity = read_identity((*STANDBY.values(), "7", None, None, *TAIL[3:]), 42)
    assert Server(7, None, None, "1700000000.123456") == identity.server


def test_another_backend_than_the_protocols_is_a_pooler() -> None:
    """A pooler keeps the client's connection and changes the server's."""
    assert not read_identity((*STANDBY.values(), *TAIL), 42).pooled
    assert read_identity((*STANDBY.values(), *TAIL), 43).pooled
    assert not seen(STANDBY).pooled
    assert seen(STANDBY, pid=43).pooled


def _reply(row: Any) -> Reply:
    return Reply(row, 42, 1.0, 1.1)


@pytest.mark.parametrize("state", ["0A000", "42501", "42883"])
def test_without_wal_functions_everything_is_unknown(state: str) -> None:
    """Aurora, or EXECUTE revoked: the role is known, no position ever is."""
    plan = identify("conn")
    assert Fetch("conn", _sql.IDENTIFY) == next(plan)
    failure = NodeFailure(PermissionError("no"), state=state)
    assert Fetch("conn", _sql.IDENTIFY_WITHOUT_WAL) == plan.throw(failure)
    row = ("42", "f", *[None] * 4, "f", "f", None, "0", "a", "5432", "1", "8192", "16777216", "0")
    with pytest.raises(StopIteration) as done:
        plan.send(_reply(row))
    identity, observed = done.value.value
    assert identity.limited
    assert (None, None, None, False) == (
        observed.lsn,
        observed.timeline,
        observed.bound_position,
        observed.in_recovery,
    )


def test_other_errors_of_a_probe_are_failures() -> None:
    """Only missing functions have another way; the rest fails the probe."""
    plan = identify("conn")
    next(plan)
    with pytest.raises(NodeFailure):
        plan.throw(NodeFailure(ConnectionError("lost"), state="57P01"))


@pytest.mark.parametrize("kept", [{"pooled": True}, {"limited": True}, {}], ids=repr)
def test_a_known_server_is_only_probed(kept: dict[str, bool]) -> None:
    """Behind a pooler, or without positions, who answers is asked each time."""
    server = IDENTITY.server._replace(system_id=0 if kept.get("limited") else 7)
    identity = Identity(server, 8192, 16777216, 0.6, pooled=kept.get("pooled", False))
    expected = _sql.IDENTIFY if kept else _sql.PROBE
    assert Fetch("conn", expected) == next(observe("conn", identity))


def test_the_pause_state_stands_before_the_position() -> None:
    """Paused first, then read: the position covers all that was visible."""
    probe = _sql.PROBE
    assert probe.index(b"pause_state") < probe.index(b"pg_last_wal_replay_lsn")
    assert probe.index(b"pg_last_wal_replay_lsn") < probe.index(b"pg_last_wal_receive_lsn")
    assert _sql.IDENTIFY.startswith(_sql.PROBE)
