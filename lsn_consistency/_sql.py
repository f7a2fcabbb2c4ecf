"""
Every SQL statement that the package sends, and the reading of their rows.

A server is observed by the same columns in either role, as text. To plan such a statement takes the
server longer than to run it, so each role has one of its own, and functions are called outside of
FROM. Names are qualified, so that no schema of the user's stands before them. The pause state
stands before the replay position on purpose: paused first, then read, the position covers all that
was visible (see `_bound`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lsn_consistency._observation import Observation, Server
from lsn_consistency.lsn import (
    Lsn,
    TimelineHistory,
    normalize_insert_lsn,
    unsigned_system_id,
)

Row = Sequence[str | None]

_IN_RECOVERY: Final = "pg_catalog.pg_is_in_recovery()"

# What is asked of a standby, and what of a primary in the same place. The functions of the other
# role would raise. A standby can be promoted while it is asked, so what raises then has a guard.
_COLUMNS: Final = (
    (f"case when {_IN_RECOVERY} then pg_catalog.pg_get_wal_replay_pause_state() end", "null"),
    ("pg_catalog.pg_last_wal_replay_lsn()", "pg_catalog.pg_current_wal_insert_lsn()"),
    ("pg_catalog.pg_last_wal_receive_lsn()", "pg_catalog.pg_current_wal_flush_lsn()"),
    (
        "(pg_catalog.pg_control_checkpoint()).timeline_id::text",
        "pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 8)",
    ),
    ("(pg_catalog.pg_stat_get_wal_receiver()).received_tli", "null"),
    ("(pg_catalog.pg_stat_get_wal_receiver()).pid is not null", "false"),
    ("pg_catalog.current_setting('recovery_min_apply_delay') <> '0'", "false"),
    (
        "extract(epoch from"
        " pg_catalog.clock_timestamp() - pg_catalog.pg_last_xact_replay_timestamp())",
        "null",
    ),
    ("null", "pg_catalog.pg_last_wal_replay_lsn()"),
)
_ALWAYS: Final = f"select pg_catalog.pg_backend_pid(), {_IN_RECOVERY}"
_PROBE_WIDTH: Final = 2 + len(_COLUMNS)

_IDENTITY_COLUMNS: Final = """\
 (select system_identifier from pg_catalog.pg_control_system()),
 pg_catalog.host(pg_catalog.inet_server_addr()), pg_catalog.inet_server_port(),
 extract(epoch from pg_catalog.pg_postmaster_start_time()),
 pg_catalog.current_setting('wal_block_size'),
 pg_catalog.pg_size_bytes(pg_catalog.current_setting('wal_segment_size')),
 extract(epoch from pg_catalog.current_setting('wal_writer_delay')::interval),
 pg_catalog.pg_backend_pid() || ' ' || pg_catalog.transaction_timestamp()"""

PROBE_STANDBY: Final = ", ".join([_ALWAYS, *(standby for standby, _ in _COLUMNS)]).encode()
"""Observe a server that was a standby; if it is none any more the row only tells that."""

PROBE_PRIMARY: Final = ", ".join([_ALWAYS, *(primary for _, primary in _COLUMNS)]).encode()
"""Observe a server that was a primary, which it stays for as long as it runs."""

POSITION: Final = f"select {_COLUMNS[1][1]}, {_COLUMNS[3][1]}".encode()
"""Ask a primary how far it is: all that a session needs, in less time than to observe it."""

PREPARED_NAMES: Final = {
    POSITION: b"lsn_consistency_position",
    PROBE_STANDBY: b"lsn_consistency_standby",
    PROBE_PRIMARY: b"lsn_consistency_primary",
}
"""What a connection that is asked often keeps prepared: to plan takes longer than to answer."""

NOT_PREPARED: Final = frozenset({"26000", "42P05"})
"""SQLSTATEs of a statement that was deallocated, and of one that is there without being known."""

IDENTIFY: Final = ", ".join(
    [
        _ALWAYS,
        *(
            f"case when {_IN_RECOVERY} then {standby} else {primary} end"
            for standby, primary in _COLUMNS
        ),
        _IDENTITY_COLUMNS,
    ]
).encode()
"""Observe a server in either role, and learn which one it is."""

IDENTIFY_WITHOUT_WAL: Final = b"""select
 pg_catalog.pg_backend_pid(), pg_catalog.pg_is_in_recovery(),
 null, null, null, null, null, false, false, null, null,
 0, pg_catalog.host(pg_catalog.inet_server_addr()), pg_catalog.inet_server_port(),
 extract(epoch from pg_catalog.pg_postmaster_start_time()), 8192, 16777216, 0,
 pg_catalog.pg_backend_pid() || ' ' || pg_catalog.transaction_timestamp()"""
"""The same where the WAL functions are missing or forbidden: every position stays unknown."""

WAL_FUNCTIONS_UNAVAILABLE: Final = frozenset({"0A000", "42501", "42883"})
"""SQLSTATEs of a server that does not offer its WAL functions (Aurora, revoked EXECUTE)."""

IN_RECOVERY: Final = "55000"
"""SQLSTATE of a standby that is asked as a primary."""

BEGIN_READ_COMMITTED: Final = b"begin isolation level read committed read only"
"""Behind a pooler, check and read share one transaction, whose every statement is fresh."""

COMMIT: Final = b"COMMIT"
ROLLBACK: Final = b"rollback"

WAIT_FOR_VERSION: Final = 19_00_00
READ_COMMITTED: Final = b"set default_transaction_isolation = 'read committed'"
"""``WAIT FOR LSN`` must not run in a transaction that keeps its snapshot."""

REACHED: Final = "success"
"""The answer of `wait_for` when the position has been replayed."""

IDENTIFY_SYSTEM: Final = b"IDENTIFY_SYSTEM"
"""Ask for the timeline on a replication connection: exact on standbys too."""

READ_ONLY: Final = b"set session characteristics as transaction read only"
READ_WRITE: Final = b"set session characteristics as transaction read write"


@dataclass(frozen=True, slots=True)
class Identity:
    """
    Hold what does not change for as long as a connection lives.
    """

    server: Server
    block_size: int
    segment_size: int
    flush_delay_seconds: float
    pooled: bool = False

    @property
    def limited(self) -> bool:
        """
        Tell that the server does not offer its WAL functions: its system is unknown.
        """
        return self.server.system_id == 0


def read_identity(row: Row, backend_pid: int) -> Identity:
    """
    Read the identity of an `IDENTIFY` row. ``backend_pid`` is the one that the protocol reported.
    """
    system, address, port, started, block, segment, delay, _ = row[_PROBE_WIDTH:]
    server = Server(
        unsigned_system_id(int(system or 0)),
        address,
        None if port is None else int(port),
        started or "",
    )
    # An asynchronous commit is flushed within three times wal_writer_delay.
    flush_delay = 3 * float(delay or 0)
    pooled = int(row[0] or 0) != backend_pid
    return Identity(server, int(block or 0), int(segment or 0), flush_delay, pooled)


def read_observation(
    identity: Identity, row: Row, backend_pid: int, sent_at: float, received_at: float
) -> Observation:
    """
    Read the probe columns of a row that came from the server of ``identity``.

    Raises `ValueError` for a row that no server gives, such as one that leaves its role open.
    """
    pid, recovery, paused, lsn, other, timeline, received, streaming, delayed, age, switch = row[
        :_PROBE_WIDTH
    ]
    if recovery not in ("t", "f"):
        raise ValueError(f"pg_is_in_recovery() is {recovery!r}")
    in_recovery = recovery == "t"
    # A primary's is the beginning of the name of a WAL file.
    begun = None if timeline is None else int(timeline, 10 if in_recovery else 16)
    position = None if lsn is None else Lsn.parse(lsn)
    second = None if other is None else position if other == lsn else Lsn.parse(other)
    if position is not None and not in_recovery:
        position = normalize_insert_lsn(
            position, block_size=identity.block_size, segment_size=identity.segment_size
        )
    return Observation(
        server=identity.server,
        in_recovery=in_recovery,
        timeline=_timeline(begun, received if in_recovery else None),
        begun_timeline=begun,
        timeline_is_certain=not in_recovery or received is not None,
        streaming=in_recovery and streaming == "t",
        switch_point=None if switch is None else Lsn.parse(switch),
        lsn=position,
        sent_at=sent_at,
        received_at=received_at,
        bound=(
            _bound(position, second, paused == "paused" or delayed == "t", streaming == "t")
            if in_recovery
            else position
        ),
        flush_lsn=None if in_recovery else second,
        flush_delay_seconds=identity.flush_delay_seconds,
        replay_age_seconds=None if age is None else float(age),
        pooled=int(pid or 0) != backend_pid,
        transaction=row[-1] if len(row) > _PROBE_WIDTH else None,
    )


def read_position(
    identity: Identity, row: Row, backend_pid: int, sent_at: float, received_at: float
) -> Observation:
    """
    Read what `POSITION` gave, which is less than an observation has to tell of a node.

    Raises `ValueError` for a row that no primary gives.
    """
    if len(row) != 2 or row[0] is None or row[1] is None:
        raise ValueError(f"a primary gave {row!r} as its position")
    lsn = normalize_insert_lsn(
        Lsn.parse(row[0]), block_size=identity.block_size, segment_size=identity.segment_size
    )
    timeline = int(row[1], 16)
    return Observation(
        identity.server,
        False,
        timeline,
        lsn,
        sent_at,
        received_at,
        bound=lsn,
        begun_timeline=timeline,
    )


def is_in_recovery(row: Row) -> bool:
    """
    Tell which role the row of a probe names: what its other columns are depends on that.

    Raises `ValueError` for a row that no server gives.
    """
    if len(row) != _PROBE_WIDTH or row[1] not in ("t", "f"):
        raise ValueError(f"a probe gave {len(row)} columns, and {row[1:2]} as the role")
    return row[1] == "t"


def wait_for(lsn: Lsn, seconds: float) -> bytes:
    """
    Return the statement that waits for a replay position; it takes a literal only.
    """
    milliseconds = round(seconds * 1000)
    return f"wait for lsn '{lsn}' with (timeout '{milliseconds}ms', no_throw)".encode()


def timeline_history(timeline: int) -> bytes:
    """
    Return the replication command that asks for the history file of a timeline.
    """
    return b"TIMELINE_HISTORY %d" % timeline


def read_system_timeline(row: Row) -> int:
    """
    Read the timeline of an `IDENTIFY_SYSTEM` row.
    """
    return int(row[1] or 0)


def read_timeline_history(timeline: int, row: Row) -> TimelineHistory:
    """
    Read the row of `timeline_history`: a file's name and its content.

    Raises `ValueError` for a content that is no history.
    """
    return TimelineHistory.parse(timeline, row[1] or "")


def _timeline(begun: int | None, received: str | None) -> int | None:
    # A standby's control file names the timeline of its last restartpoint, and the walreceiver the
    # one that is received: replay follows it, and cannot be beyond the place where it begins.
    if begun is None or received is None:
        return begun if received is None else int(received)
    return max(begun, int(received))


def _bound(replay: Lsn | None, receive: Lsn | None, held: bool, streaming: bool) -> Lsn | None:
    # A commit is visible a moment before the replay position covers it (ApplyWalRecord in
    # xlogrecovery.c), and never before it was received. A replica that is held back on purpose
    # shows nothing of what it has received. WAL that comes from an archive is not received, so
    # without a walreceiver there is no bound.
    if held or replay is None:
        return replay
    if not streaming or receive is None:
        return None
    return max(replay, receive)
