"""
What holds for every LSN.
"""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from lsn_consistency.exceptions import InvalidLsnError
from lsn_consistency.lsn import Lsn, Position, normalize_insert_lsn, unsigned_system_id

numbers = st.integers(0, 2**64 - 1)
block_sizes = st.sampled_from([2**power for power in range(10, 17)])
segment_sizes = st.sampled_from([2**power for power in range(20, 31)])
segment_starts = st.integers(0, 2**34 - 1).map(lambda count: count << 30)
VALID = re.compile(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}", re.ASCII)


@given(numbers)
def test_parse_reads_what_str_writes(number: int) -> None:
    """
    The text form loses nothing, in the forms of PostgreSQL 18 and 19.
    """
    lsn = Lsn(number)

    assert lsn == Lsn.parse(str(lsn))
    assert lsn == Lsn.parse(f"{number >> 32:X}/{number & 0xFFFFFFFF:08X}")
    assert lsn == Lsn.parse(str(lsn).lower())


@given(numbers, numbers)
def test_order_and_difference_are_those_of_the_numbers(one: int, other: int) -> None:
    """
    LSNs that went through text compare as their numbers do.
    """
    first, second = Lsn.parse(str(Lsn(one))), Lsn.parse(str(Lsn(other)))

    assert (one < other, one == other) == (first < second, first == second)
    assert one - other == first - second
    assert hash(one) == hash(first)


@given(st.text() | st.text("0123456789abcdefABCDEFxX/+-_ \n\u0660\u0661", max_size=20))
def test_parse_takes_valid_texts_only(text: str) -> None:
    """
    A text is read, or refused with the one error; nothing in between.
    """
    try:
        lsn = Lsn.parse(text)
    except InvalidLsnError:
        assert VALID.fullmatch(text) is None
    else:
        assert VALID.fullmatch(text) is not None
        assert text.upper().replace("0", "") == str(lsn).replace("0", "")


@given(st.integers())
def test_constructor_takes_64_unsigned_bits(number: int) -> None:
    """
    Every number is kept as it is, or refused.
    """
    try:
        lsn = Lsn(number)
    except InvalidLsnError:
        assert not 0 <= number < 2**64
    else:
        assert number == lsn


def test_normalize_at_every_offset_of_a_page() -> None:
    """
    Within a page, only what lies in its header moves, and it moves to the page start.
    """
    segment_start, page_start = 0x4000000, 0x4002000
    for start, header_size in ((segment_start, 40), (page_start, 24)):
        expected = [start if offset <= header_size else start + offset for offset in range(8192)]
        assert expected == [normalize_insert_lsn(Lsn(start + offset)) for offset in range(8192)]


@given(segment_starts, st.integers(0, 2**30 - 1), st.integers(0, 64), block_sizes, segment_sizes)
def test_normalize_moves_back_by_a_header_at_most(
    start: int, within: int, offset: int, block_size: int, segment_size: int
) -> None:
    """
    The result is never above the input nor more than a header below it, and it is stable.
    """
    near_a_page_start = start + within // block_size * block_size + offset
    for number in (near_a_page_start, start + within, start + offset):
        lsn = Lsn(number)
        result = normalize_insert_lsn(lsn, block_size=block_size, segment_size=segment_size)
        again = normalize_insert_lsn(result, block_size=block_size, segment_size=segment_size)

        assert 0 <= lsn - result <= 40
        assert result == again
        assert result == lsn or result % block_size == 0


@given(segment_starts, st.integers(1, 2**17 - 1), st.integers(25, 40))
def test_normalize_keeps_ends_of_records_on_ordinary_pages(
    start: int, page: int, offset: int
) -> None:
    """
    Between the lengths of the two headers, only a segment's first page maps to its start.
    """
    page_start = start + page * 8192
    first_of_segment = page_start % (16 * 1024 * 1024) == 0

    expected = page_start if first_of_segment else page_start + offset
    assert expected == normalize_insert_lsn(Lsn(page_start + offset))


@given(numbers, numbers)
def test_normalize_keeps_the_order(one: int, other: int) -> None:
    """
    A later position never becomes the earlier one.
    """
    low, high = sorted((Lsn(one), Lsn(other)))

    assert normalize_insert_lsn(low) <= normalize_insert_lsn(high)


@given(numbers, st.integers(1, 2**32 - 1), numbers)
def test_a_system_is_the_same_signed_or_not(system_id: int, timeline: int, lsn: int) -> None:
    """
    A position read through SQL equals the same one read through the replication protocol.
    """
    signed = int.from_bytes(system_id.to_bytes(8, "big"), "big", signed=True)

    assert Position.of(system_id, timeline, lsn) == Position.of(signed, timeline, lsn)
    assert system_id == unsigned_system_id(signed)
