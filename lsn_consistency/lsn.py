"""
Log sequence numbers and where they count: `Lsn`, `Position`, `TimelineHistory`, page headers.

Pure values: this module knows no server, no clock and no token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final, NamedTuple, Self

from lsn_consistency.exceptions import InvalidLsnError

DEFAULT_BLOCK_SIZE: Final = 8192
"""`wal_block_size` of a server that was built without `--with-wal-blocksize`, in bytes."""

DEFAULT_SEGMENT_SIZE: Final = 16 * 1024 * 1024
"""`wal_segment_size` of a cluster made without `initdb --wal-segsize`, in bytes."""

_MAX_UINT64: Final = 2**64 - 1
_MAX_UINT32: Final = 2**32 - 1
_MIN_INT64: Final = -(2**63)
_LSN_PATTERN: Final = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")

# SizeOfXLogShortPHD and SizeOfXLogLongPHD in PostgreSQL's access/xlog_internal.h.
_PAGE_HEADER_SIZE: Final = 24
_SEGMENT_HEADER_SIZE: Final = 40


class Lsn(int):
    """
    Count the bytes of write-ahead log before a point, as an unsigned 64 bit integer.

    It is an `int` in every respect but its text: comparing and hashing cost what they cost for
    `int`, the difference of two is a plain `int` of bytes, and so is the result of any other
    arithmetic (wrap it in `Lsn` to go on). Raises `InvalidLsnError` for values out of range and for
    anything but an integer; `bool` is none.
    """

    __slots__ = ()

    def __new__(cls, value: int) -> Self:
        """
        Check and keep a number.
        """
        if not _is_integer(value):
            raise InvalidLsnError(_shown(value), "an LSN is made of an int; Lsn.parse reads text")
        if not 0 <= value <= _MAX_UINT64:
            raise InvalidLsnError(hex(value), "an LSN is an unsigned 64 bit number")
        return super().__new__(cls, value)

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Read PostgreSQL's text form: two hexadecimal numbers of 1 to 8 digits around a slash.

        The zero padded form of PostgreSQL 19 (`0/0301F780`) reads the same as the short one. All
        else raises `InvalidLsnError`: whitespace, signs, digits outside ASCII, types other than
        `str`.
        """
        if not isinstance(text, str):
            raise InvalidLsnError(_shown(text), "the text form of an LSN is a str")
        match = _LSN_PATTERN.fullmatch(text)
        if match is None:
            raise InvalidLsnError(text)
        high, low = match.groups()
        # Eight digits at most on either side: the number is in range.
        return super().__new__(cls, int(high, 16) << 32 | int(low, 16))

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & _MAX_UINT32:X}"

    def __repr__(self) -> str:
        return f"Lsn('{self}')"


class Position(NamedTuple):
    """
    Name a point in the write-ahead log of one cluster: an LSN means nothing without the other two.

    Positions of one system order by timeline, then LSN; across systems the order is that of the
    identifiers and says nothing about time. The plain constructor checks nothing, for it runs on
    every observation: use `Position.of` for values from outside. A `Token` checks what it is given.
    """

    system_id: int
    timeline: int
    lsn: Lsn

    @classmethod
    def of(cls, system_id: int, timeline: int, lsn: int) -> Position:
        """
        Make a checked position.

        `system_id` may be the signed bigint of `pg_control_system()` or the unsigned number of
        `IDENTIFY_SYSTEM`: both give the same position. Raises `ValueError` for a system identifier
        or a timeline out of range, `InvalidLsnError` (also a `ValueError`) for the LSN.
        """
        if not _is_integer(timeline) or not 1 <= timeline <= _MAX_UINT32:
            raise ValueError(f"a timeline is an int from 1 to {_MAX_UINT32}")
        return cls(unsigned_system_id(system_id), timeline, lsn if type(lsn) is Lsn else Lsn(lsn))


@dataclass(frozen=True, slots=True)
class TimelineHistory:
    """
    Tell where the log of a timeline left each of its ancestors.

    ``switch_points`` maps each known ancestor to the LSN at which its part of this log ends.
    ``complete`` says that no ancestor is missing there.
    """

    timeline: int
    switch_points: Mapping[int, Lsn]
    complete: bool = True

    @classmethod
    def parse(cls, timeline: int, text: str) -> TimelineHistory:
        """
        Read the content of a history file, as ``TIMELINE_HISTORY`` gives it.

        A line is an ancestor, the LSN at which it was left, and a reason; empty lines and those
        that begin with ``#`` count for nothing (`readTimeLineHistory` in PostgreSQL's timeline.c).
        Raises `ValueError` for anything else and where no ancestor is named, `InvalidLsnError`
        (a `ValueError` too) for an LSN.
        """
        switch_points: dict[int, Lsn] = {}
        for line in text.split("\n"):
            fields = line.split(maxsplit=2)
            if not fields or fields[0].startswith("#"):
                continue
            if len(fields) < 2 or not re.fullmatch(r"[0-9]{1,10}", fields[0]):
                raise ValueError(f"the history of timeline {timeline} has the line {line!r}")
            ancestor = int(fields[0])
            if not max(switch_points, default=0) < ancestor < timeline:
                raise ValueError(
                    f"the history of timeline {timeline} names {ancestor} out of order"
                )
            switch_points[ancestor] = Lsn.parse(fields[1])
        if not switch_points:
            raise ValueError(f"the history of timeline {timeline} names no ancestor")
        return cls(timeline, MappingProxyType(_clamped(switch_points)))

    def continued(self, timeline: int, switch_point: Lsn) -> TimelineHistory:
        """
        Return the history of a timeline that left this one at ``switch_point``.
        """
        switch_points = _clamped({**self.switch_points, self.timeline: switch_point})
        return TimelineHistory(timeline, MappingProxyType(switch_points), self.complete)

    def contains(self, position: Position) -> bool | None:
        """
        Tell whether the log of this timeline has a position: yes, no, or None for unknown.

        A position of timeline t is in it if t is this timeline, or an ancestor that was left at
        or after that LSN (`tliInHistory` and `tliSwitchPoint` in PostgreSQL's timeline.c).
        """
        if position.timeline == self.timeline:
            return True
        end = self.switch_points.get(position.timeline)
        if end is not None:
            return position.lsn <= end
        return False if self.complete or position.timeline > self.timeline else None


def _clamped(switch_points: Mapping[int, Lsn]) -> dict[int, Lsn]:
    # A standby can be promoted while its replay is still on the log before an earlier switch point
    # that it knows of already. So no ancestor's part reaches beyond the end of its descendants'.
    clamped: dict[int, Lsn] = {}
    end = Lsn(_MAX_UINT64)
    for timeline in sorted(switch_points, reverse=True):
        end = min(end, switch_points[timeline])
        clamped[timeline] = end
    return dict(sorted(clamped.items()))


def unsigned_system_id(system_id: int) -> int:
    """
    Turn a system identifier as SQL shows it into the unsigned number that it is.

    `pg_control_system()` casts the unsigned 64 bit identifier to bigint, which is negative for
    clusters made in 2038 and later. Raises `ValueError` for what fits neither form.
    """
    if not _is_integer(system_id) or not _MIN_INT64 <= system_id <= _MAX_UINT64:
        raise ValueError("a system identifier is a 64 bit int")
    return system_id & _MAX_UINT64


def normalize_insert_lsn(
    lsn: Lsn,
    *,
    block_size: int = DEFAULT_BLOCK_SIZE,
    segment_size: int = DEFAULT_SEGMENT_SIZE,
) -> Lsn:
    """
    Map an insert position just past a page header back to the start of that page.

    When the last record ends exactly where a page ends, `pg_current_wal_insert_lsn()` reports the
    place of the *next* record, after the header of the next page (`XLogBytePosToRecPtr` in
    PostgreSQL's xlog.c). Ends of records, and so the flush and replay positions, are the page start
    (`XLogBytePosToEndRecPtr`): a standby would reach the raw value only with the next record, on an
    idle primary never. Nothing is lost, since no record ends inside a header.

    `block_size` and `segment_size` are the server's `wal_block_size` and `wal_segment_size` in
    bytes. Raises `ValueError` for sizes that PostgreSQL cannot have.
    """
    _require_power_of_two("block_size", block_size, 1024, 64 * 1024)
    _require_power_of_two("segment_size", segment_size, 1024**2, 1024**3)
    offset = lsn & (block_size - 1)
    page_start = lsn - offset
    # The long header stands only on the first page of a segment: elsewhere a record may end at
    # offset 32 or 40.
    starts_segment = page_start & (segment_size - 1) == 0
    header_size = _SEGMENT_HEADER_SIZE if starts_segment else _PAGE_HEADER_SIZE
    return Lsn(page_start) if offset <= header_size else lsn


def _shown(value: object) -> str:
    return value if isinstance(value, str) else type(value).__name__


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# A server's sizes never change, and each observation of a primary needs them.
@lru_cache(maxsize=16, typed=True)
def _require_power_of_two(name: str, value: int, low: int, high: int) -> None:
    if not _is_integer(value) or not low <= value <= high or value & (value - 1):
        raise ValueError(f"{name} must be a power of two from {low} to {high} bytes")
