"""The reading of rows: text from a server becomes an observation, or stays unknown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from lsn_consistency import Position, _sql
from lsn_consistency._observation import Observation, Server
from lsn_consistency._sql import Identity, read_identity, read_observation, read_position
from lsn_consistency._steps import (
    Commit,
    Fetch,
    NodeFailure,
    Reply,
    ask_position,
    ask_timeline,
    commit_and_observe,
    identify,
    observe,
)
from lsn_consistency.exceptions import InvalidLsnError
from lsn_consistency.lsn import Lsn, TimelineHistory

IDENTITY = Identity(Server(7, "10.0.0.1", 5432, "1700000000.123456"), 8192, 16777216, 0.6)
STANDBY: dict[str, str | None] = {
    "pid": "42",
    "recovery": "t",
    "paused": "not paused",
    "lsn": "0/3000100",
    "other": "0/3000200",
    "timeline": "1",
    "received": "1",
    "streaming": "t",
    "delayed": "f",
    "age": "1.5",
    "switch": None,
}
PRIMARY: dict[str, str | None] = {
    **STANDBY,
    "recovery": "f",
    "paused": None,
    "other": "0/3000080",
    "timeline": "00000001",
    "received": None,
    "streaming": "f",
    "age": None,
}
TAIL = ("7", "10.0.0.1", "5432", "1700000000.123456", "8192", "16777216", "0.2", "42 now")


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
        timeline_is_certain=True,
        streaming=True,
        switch_point=None,
        begun_timeline=1,
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
    identity = read_identity((*PRIMARY.values(), *TAIL[:4], "1024", "1048576", *TAIL[6:]), 42)
    row = {**PRIMARY, "lsn": "0/3000418"}
    observed = read_observation(identity, tuple(row.values()), 42, 1.0, 1.1)
    assert Lsn(0x3000400) == observed.lsn
    row["lsn"] = "0/3100028"
    observed = read_observation(identity, tuple(row.values()), 42, 1.0, 1.1)
    assert Lsn(0x3100000) == observed.lsn


def test_null_stays_unknown() -> None:
    """Nothing is guessed for a column without a value."""
    observed = seen(STANDBY, lsn=None, timeline=None, received=None, age=None)
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


LIMITED_ROW = (
    *("42", "f", *[None] * 5, "f", "f", None, None),
    *("0", "a", "5432", "1", "8192", "16777216", "0", "42 now"),
)


def _reply(row: Any) -> Reply:
    return Reply(row, 42, 1.0, 1.1)


@pytest.mark.parametrize("state", ["0A000", "42501", "42883"])
def test_without_wal_functions_everything_is_unknown(state: str) -> None:
    """Aurora, or EXECUTE revoked: the role is known, no position ever is."""
    plan = identify("conn")
    assert Fetch("conn", _sql.IDENTIFY) == next(plan)
    failure = NodeFailure(PermissionError("no"), state=state)
    assert Fetch("conn", _sql.IDENTIFY_WITHOUT_WAL) == plan.throw(failure)
    with pytest.raises(StopIteration) as done:
        plan.send(_reply(LIMITED_ROW))
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


@pytest.mark.parametrize(
    "row",
    [
        (),
        ("42",),
        tuple({**PRIMARY, "recovery": None}.values()),
        tuple({**PRIMARY, "recovery": ""}.values()),
        tuple({**STANDBY, "lsn": "0/G"}.values()),
        tuple({**STANDBY, "timeline": "one"}.values()),
        tuple({**STANDBY, "age": "long"}.values()),
    ],
    ids=repr,
)
def test_what_cannot_be_read_is_a_failure_of_its_server(row: tuple[str | None, ...]) -> None:
    """A server, or something before it, that answers anything else has no role and no position."""
    standby = len(row) > 1 and row[1] == "t"
    for plan, answer in (
        (observe("conn", IDENTITY, in_recovery=standby), row),
        (identify("conn"), (*row, *TAIL) if row else ()),
    ):
        next(plan)
        with pytest.raises(NodeFailure, match="cannot be read") as failed:
            plan.send(_reply(answer))
        assert (True, None) == (failed.value.down, failed.value.state)


@pytest.mark.parametrize("kept", [{"pooled": True}, {"limited": True}, {}], ids=repr)
def test_a_known_server_is_only_probed(kept: dict[str, bool]) -> None:
    """Behind a pooler, or without positions, who answers is asked each time."""
    server = IDENTITY.server._replace(system_id=0 if kept.get("limited") else 7)
    identity = Identity(server, 8192, 16777216, 0.6, pooled=kept.get("pooled", False))
    for in_recovery, probe in ((True, _sql.PROBE_STANDBY), (False, _sql.PROBE_PRIMARY)):
        expected = _sql.IDENTIFY if kept else probe
        assert Fetch("conn", expected) == next(observe("conn", identity, in_recovery=in_recovery))


def test_a_standby_that_was_promoted_is_asked_as_a_primary() -> None:
    """Over the connection that it had before; nothing else of the first answer is believed."""
    plan = observe("conn", IDENTITY, in_recovery=True)
    assert Fetch("conn", _sql.PROBE_STANDBY) == next(plan)
    first = {**STANDBY, "recovery": "f", "lsn": "F/0", "timeline": "9"}
    assert Fetch("conn", _sql.PROBE_PRIMARY) == plan.send(_reply(tuple(first.values())))
    second = Reply(tuple({**PRIMARY, "timeline": "0000000A"}.values()), 42, 2.0, 2.1)
    with pytest.raises(StopIteration) as done:
        plan.send(second)
    observed: Observation = done.value.value
    assert (False, 10, Lsn(0x3000100), 2.0) == (
        observed.in_recovery,
        observed.timeline,
        observed.lsn,
        observed.sent_at,
    )


@pytest.mark.parametrize("promoted", [False, True])
def test_a_standby_cannot_answer_what_only_a_primary_can(promoted: bool) -> None:
    """Its columns would be read as what they are not: an insert position as replayed."""
    plan = observe("conn", IDENTITY, in_recovery=promoted)
    next(plan)
    if promoted:
        plan.send(_reply(tuple({**STANDBY, "recovery": "f"}.values())))
    with pytest.raises(NodeFailure, match="cannot be read"):
        plan.send(_reply(tuple({**PRIMARY, "recovery": "t"}.values())))


def test_a_primary_that_says_it_is_a_standby_is_another_server() -> None:
    """What the connection leads to is identified anew; other refusals are failures."""
    plan = observe("conn", IDENTITY, in_recovery=False)
    next(plan)
    failure = NodeFailure(ConnectionError("recovery is in progress"), state="55000")
    assert Fetch("conn", _sql.IDENTIFY) == plan.throw(failure)
    with pytest.raises(StopIteration) as done:
        plan.send(_reply((*STANDBY.values(), "8", *TAIL[1:])))
    observed: Observation = done.value.value
    assert (8, True) == (observed.server.system_id, observed.in_recovery)
    plan = observe("conn", IDENTITY, in_recovery=False)
    next(plan)
    with pytest.raises(NodeFailure):
        plan.throw(NodeFailure(ConnectionError("permission denied"), state="42501"))


@pytest.mark.parametrize("pooled", [True, False])
def test_a_refused_statement_does_not_end_a_transaction_behind_a_pooler(pooled: bool) -> None:
    """A server known to refuse its functions is asked without them where that would cost more."""
    identity = Identity(IDENTITY.server._replace(system_id=0), 8192, 16777216, 0.6, pooled=pooled)
    expected = _sql.IDENTIFY_WITHOUT_WAL if pooled else _sql.IDENTIFY
    plan = observe("conn", identity, in_recovery=True)
    assert Fetch("conn", expected) == next(plan)


def test_the_pause_state_stands_before_the_position() -> None:
    """Paused first, then read: the position covers all that was visible."""
    for probe in (_sql.PROBE_STANDBY, _sql.IDENTIFY):
        assert probe.index(b"pause_state") < probe.index(b"pg_last_wal_replay_lsn")
        assert probe.index(b"pg_last_wal_replay_lsn") < probe.index(b"pg_last_wal_receive_lsn")


# Timelines


@pytest.mark.parametrize(
    ("known", "received", "timeline", "certain"),
    [
        ("1", None, 1, False),
        ("1", "2", 2, True),
        ("2", "1", 2, True),
        ("2", "2", 2, True),
        (None, "2", 2, True),
        (None, None, None, False),
    ],
)
def test_the_timeline_of_a_standby(
    known: str | None, received: str | None, timeline: int | None, certain: bool
) -> None:
    """The greater of restartpoint and walreceiver; the restartpoint alone is a lower bound."""
    observed = seen(STANDBY, timeline=known, received=received)
    assert (timeline, certain) == (observed.timeline, observed.timeline_is_certain)


@pytest.mark.parametrize("known", ["1", "2", None])
def test_a_timeline_has_begun_with_a_restartpoint_on_it(known: str | None) -> None:
    """What is received or followed may still lie ahead; a restartpoint was replayed."""
    observed = seen(STANDBY, timeline=known, received="3")
    assert (3, known and int(known)) == (observed.timeline, observed.begun_timeline)
    assert 2 == seen(PRIMARY, timeline="2").begun_timeline


def test_the_timeline_of_a_primary_is_its_own() -> None:
    """Whatever a walreceiver that is about to end still says."""
    observed = seen(PRIMARY, timeline="2", received="3", streaming="t")
    assert (2, True, False) == (
        observed.timeline,
        observed.timeline_is_certain,
        observed.streaming,
    )


def test_without_a_walreceiver_a_standby_does_not_stream() -> None:
    """A row of the walreceiver is streaming, also where its columns may not be seen."""
    assert seen(STANDBY, received=None).streaming
    assert not seen(STANDBY, received=None, streaming="f").streaming


def test_where_a_promoted_server_ended_its_recovery() -> None:
    """The frozen replay position, padded or not; none of a server that never was a standby."""
    assert Lsn(0x2000100) == seen(PRIMARY, switch="0/02000100").switch_point
    assert seen(PRIMARY).switch_point is None


def test_the_position_of_a_primary_is_the_observed_one() -> None:
    """The same position as a whole observation gives, on the same timeline, in its own part."""
    whole = seen(PRIMARY, lsn="0/4000028", timeline="0000000A")
    position = read_position(IDENTITY, ("0/4000028", "0000000A"), 42, 1.0, 1.1)
    assert Position(7, 10, Lsn(0x4000000)) == whole.position == position.position
    assert whole.bound_position == position.bound_position
    assert (False, 10, 1.0, 1.1) == (
        position.in_recovery,
        position.begun_timeline,
        position.sent_at,
        position.received_at,
    )


@pytest.mark.parametrize(
    "row", [(), ("0/1",), (None, "00000001"), ("0/1", None), ("0/G", "00000001"), ("0/1", "x")]
)
def test_a_position_that_cannot_be_read_is_a_failure_of_its_server(row: tuple[Any, ...]) -> None:
    """With its commit it is unknown; asked alone, its server is not believed."""
    plan = ask_position("conn", IDENTITY, {})
    assert Fetch("conn", _sql.POSITION, prepared={}) == next(plan)
    with pytest.raises(NodeFailure, match="cannot be read"):
        plan.send(_reply(row))
    committing = commit_and_observe("conn", IDENTITY, in_recovery=False, prepared={})
    assert Commit("conn", _sql.POSITION, {}) == next(committing)
    with pytest.raises(StopIteration) as done:
        committing.send(_reply(row))
    assert done.value.value is None


def test_the_transaction_is_part_of_the_identity_only() -> None:
    """A probe says nothing of its transaction, and is never taken for one of another."""
    row = (*STANDBY.values(), *TAIL)
    assert "42 now" == read_observation(IDENTITY, row, 42, 1.0, 1.1).transaction
    assert seen(STANDBY).transaction is None


def test_every_column_is_read() -> None:
    """The statements and their rows are as wide as each other."""
    for statement, row in (
        (_sql.PROBE_STANDBY, tuple(STANDBY.values())),
        (_sql.PROBE_PRIMARY, tuple(PRIMARY.values())),
        (_sql.POSITION, ("0/3000100", "00000001")),
        (_sql.IDENTIFY, (*STANDBY.values(), *TAIL)),
        (_sql.IDENTIFY_WITHOUT_WAL, LIMITED_ROW),
    ):
        assert len(row) == _columns(statement.decode().removeprefix("select"))


def _columns(text: str) -> int:
    depth, commas = 0, 0
    for each in text:
        depth += (each == "(") - (each == ")")
        commas += each == "," and depth == 0
    return commas + 1


IDENTITY_ROW = (*STANDBY.values(), *TAIL)
SYSTEM_ROW = ("7", "3", "0/3000100", "postgres")
HISTORY_ROW = ("00000003.history", "1\t0/2000000\tno reason\n2\t0/3000000\tno reason\n")


def test_the_replication_commands() -> None:
    """As PostgreSQL's documentation of the streaming replication protocol names them."""
    assert b"IDENTIFY_SYSTEM" == _sql.IDENTIFY_SYSTEM
    assert b"TIMELINE_HISTORY 12" == _sql.timeline_history(12)
    assert 3 == _sql.read_system_timeline(SYSTEM_ROW)


def test_a_history_is_read_or_refused() -> None:
    """What is no history raises `ValueError`, and nothing is learned from it."""
    expected = {1: Lsn(0x2000000), 2: Lsn(0x3000000)}
    history = _sql.read_timeline_history(3, HISTORY_ROW)
    assert (3, expected, True) == (history.timeline, history.switch_points, history.complete)
    with pytest.raises(ValueError, match="has the line"):
        _sql.read_timeline_history(3, ("00000003.history", "nonsense"))
    with pytest.raises(InvalidLsnError):
        _sql.read_timeline_history(3, ("00000003.history", "1 0-2000000"))


def ask() -> Any:
    """Ask for a timeline, up to the answer about the server's identity."""
    plan = ask_timeline("conn", IDENTITY.server)
    assert Fetch("conn", _sql.IDENTIFY, simple=True) == next(plan)
    return plan


def test_a_replication_connection_tells_timeline_and_history() -> None:
    """Who answers, on which timeline, with which history: each by a simple query."""
    plan = ask()
    assert Fetch("conn", b"IDENTIFY_SYSTEM", simple=True) == plan.send(_reply(IDENTITY_ROW))
    assert Fetch("conn", b"TIMELINE_HISTORY 3", simple=True) == plan.send(_reply(SYSTEM_ROW))
    with pytest.raises(StopIteration) as done:
        plan.send(_reply(HISTORY_ROW))
    timeline, history = done.value.value
    assert 3 == timeline
    assert isinstance(history, TimelineHistory)
    assert {1: Lsn(0x2000000), 2: Lsn(0x3000000)} == history.switch_points


def test_the_first_timeline_has_no_history_to_ask_for() -> None:
    """There is no file 00000001.history."""
    plan = ask()
    plan.send(_reply(IDENTITY_ROW))
    with pytest.raises(StopIteration) as done:
        plan.send(_reply(("7", "1", "0/3000100", None)))
    assert (1, None) == done.value.value


@pytest.mark.parametrize("column", range(4), ids=["system", "address", "port", "started"])
def test_a_replication_connection_of_another_server_tells_nothing(column: int) -> None:
    """Behind one endpoint there may be several: what another one says is not believed."""
    tail = list(TAIL)
    tail[column] = "9"
    plan = ask()
    with pytest.raises(NodeFailure, match="another server"):
        plan.send(_reply((*STANDBY.values(), *tail)))
