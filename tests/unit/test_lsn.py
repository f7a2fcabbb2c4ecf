"""
`Lsn`, `Position` and the page-header rule, by example.
"""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from lsn_consistency.exceptions import InvalidLsnError
from lsn_consistency.lsn import Lsn, Position, normalize_insert_lsn, unsigned_system_id

SEGMENT = 16 * 1024 * 1024


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0/0", 0),
        ("0/1", 1),
        ("16/B374D848", 0x16_B374D848),
        ("16/b374d848", 0x16_B374D848),
        ("0/0301F780", 0x301F780),
        ("00000000/0301F780", 0x301F780),
        ("FFFFFFFF/FFFFFFFF", 2**64 - 1),
    ],
)
def test_parse(text: str, expected: int) -> None:
    """
    PostgreSQL's form is read, padded with zeros as by version 19 or not.
    """
    assert expected == Lsn.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "0",
        "0/",
        "/0",
        "0//0",
        "0/0/0",
        "0/0\n",
        "\n0/0",
        " 0/0",
        "0/0 ",
        "0 /0",
        "0/0\x00",
        "+0/0",
        "-1/0",
        "0/-1",
        "0x1/0",
        "0/0x1",
        "1_0/0",
        "0/1_0",
        "G/0",
        "0/G",
        "123456789/0",
        "0/123456789",
        "000000000/0",
        "16\\B374D848",
        "16-B374D848",
        "1.0/0",
        "1e1/0.",
        "\u0661/\u0662",
        "\uff11/0",
        "0\u20440",
        "0/0\u200b",
        "\udcff/0",
        "NULL",
        "97500059720",
        pytest.param("0/" + "0" * 1_000_000, id="a million digits"),
    ],
)
def test_parse_refuses(text: str) -> None:
    """
    Anything that PostgreSQL would not print is refused, and the error carries the text.
    """
    with pytest.raises(InvalidLsnError) as caught:
        Lsn.parse(text)

    assert text == caught.value.text


@pytest.mark.parametrize("value", [None, 0, 1.5, True, b"0/0", ["0/0"], Lsn(1), object()])
def test_parse_refuses_other_types(value: Any) -> None:
    """
    Only text is parsed: a NULL of SQL must not become a position.
    """
    with pytest.raises(InvalidLsnError):
        Lsn.parse(value)


@pytest.mark.parametrize(
    "value",
    [
        -1,
        2**64,
        pytest.param(10**5000, id="more digits than str() takes"),
        pytest.param(-(10**5000), id="the same below zero"),
    ],
)
def test_constructor_refuses_numbers_out_of_range(value: int) -> None:
    """
    A number that 64 unsigned bits cannot hold is no LSN, however large.
    """
    with pytest.raises(InvalidLsnError, match="unsigned 64 bit"):
        Lsn(value)


@pytest.mark.parametrize("value", [None, True, False, "0/0", "5", b"5", 5.0, object()])
def test_constructor_refuses_other_types(value: Any) -> None:
    """
    Neither text nor a truth value nor a float is silently taken for a number.
    """
    with pytest.raises(InvalidLsnError, match="made of an int"):
        Lsn(value)


def test_invalid_lsn_error_is_a_value_error() -> None:
    """
    Code that knows nothing of this package catches a bad LSN as ValueError.
    """
    with pytest.raises(ValueError, match="invalid LSN 'nonsense'"):
        Lsn.parse("nonsense")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0/0"),
        (0x301F780, "0/301F780"),
        (0x16_B374D848, "16/B374D848"),
        (2**64 - 1, "FFFFFFFF/FFFFFFFF"),
    ],
)
def test_text_forms(number: int, expected: str) -> None:
    """
    `str` and f-strings give PostgreSQL's form; `repr` shows it too.
    """
    lsn = Lsn(number)

    assert expected == str(lsn)
    assert expected == f"{lsn}"
    assert f"Lsn('{expected}')" == repr(lsn)


def test_lsns_compare_as_numbers() -> None:
    """
    9/0 is below 10/0, although its text is not.
    """
    assert Lsn.parse("9/0") < Lsn.parse("10/0")
    assert Lsn.parse("0/9") < Lsn.parse("0/10")
    assert Lsn.parse("0/FFFFFFFF") < Lsn.parse("1/0")


def test_difference_is_bytes() -> None:
    """
    Arithmetic leaves `Lsn`: a difference is a plain count of bytes, negative ones too.
    """
    earlier, later = Lsn.parse("0/FFFFFFFF"), Lsn.parse("1/1")

    assert (2, int) == (later - earlier, type(later - earlier))
    assert (-2, int) == (earlier - later, type(earlier - later))
    assert int is type(later + 1)


def test_comparing_and_hashing_are_those_of_int() -> None:
    """
    Comparing costs what it costs for int: nothing is overridden.
    """
    assert (int.__lt__, int.__eq__, int.__hash__) == (Lsn.__lt__, Lsn.__eq__, Lsn.__hash__)
    assert {Lsn(5)} == {5}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_lsn_and_position_survive_pickling(protocol: int) -> None:
    """
    Positions travel in job queues: value and types come back.
    """
    position = Position.of(2**64 - 1, 2**32 - 1, Lsn(2**64 - 1))
    restored = pickle.loads(pickle.dumps(position, protocol))

    assert position == restored
    assert (Position, Lsn) == (type(restored), type(restored.lsn))


def test_lsn_can_be_copied_and_written_as_json() -> None:
    """
    A copy is an `Lsn`, and JSON has the number.
    """
    lsn = Lsn(0x16_B374D848)

    assert (lsn, Lsn) == (copy.deepcopy(lsn), type(copy.deepcopy(lsn)))
    assert str(int(lsn)) == json.dumps(lsn)


def test_lsn_has_no_room_for_attributes() -> None:
    """
    An LSN is as immutable as a number.
    """
    with pytest.raises(AttributeError):
        Lsn(1).note = "x"  # type: ignore[attr-defined]


def test_position_of_keeps_what_it_is_given() -> None:
    """
    A valid position is made of its three parts, with the LSN as `Lsn`.
    """
    position = Position.of(7, 2, 5)

    assert (7, 2, Lsn(5)) == position
    assert Lsn is type(position.lsn)


def test_position_of_takes_both_forms_of_a_system_identifier() -> None:
    """
    The signed bigint of SQL and the unsigned number of the replication protocol are one system.
    """
    unsigned = 0xF234_5678_9ABC_DEF0

    assert Position.of(unsigned, 1, 0) == Position.of(unsigned - 2**64, 1, 0)
    assert unsigned == unsigned_system_id(unsigned - 2**64)
    assert unsigned == unsigned_system_id(unsigned)


@pytest.mark.parametrize(
    "arguments",
    [
        (2**64, 1, 0),
        (-(2**63) - 1, 1, 0),
        (True, 1, 0),
        ("7", 1, 0),
        (None, 1, 0),
        (7.0, 1, 0),
        (7, 0, 0),
        (7, -1, 0),
        (7, 2**32, 0),
        (7, True, 0),
        (7, "00000001", 0),
        (7, None, 0),
        (7, 1, -1),
        (7, 1, 2**64),
        (7, 1, "0/0"),
        (7, 1, None),
    ],
)
def test_position_of_refuses(arguments: tuple[Any, Any, Any]) -> None:
    """
    No part of a checked position is out of range or of another type; NULL is none.
    """
    with pytest.raises(ValueError, match=r"64 bit|timeline|invalid LSN"):
        Position.of(*arguments)


def test_position_is_immutable_and_hashable() -> None:
    """
    A position can be a key, and nobody changes it.
    """
    position = Position.of(7, 1, 5)

    assert {position: 1} == {Position.of(7, 1, 5): 1}
    with pytest.raises(AttributeError):
        position.lsn = Lsn(6)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("lsn", "expected"),
    [
        # Measured: an insert position after a page header, and one after a segment header.
        ("0/31C8018", "0/31C8000"),
        ("0/4000028", "0/4000000"),
        # The raw position that an idle standby did not reach within 75 s.
        ("0/3002018", "0/3002000"),
        ("0/31C8000", "0/31C8000"),
        ("0/4000000", "0/4000000"),
        ("0/0", "0/0"),
        ("FFFFFFFF/FFFFE018", "FFFFFFFF/FFFFE000"),
    ],
)
def test_normalize_maps_headers_to_the_page_start(lsn: str, expected: str) -> None:
    """
    A position just past a header is the start of its page, which replay does reach.
    """
    assert expected == str(normalize_insert_lsn(Lsn.parse(lsn)))


@pytest.mark.parametrize(
    "lsn",
    [
        # Ends of records can stand here: only a segment starts with the long header.
        "0/31C8019",
        "0/31C8020",
        "0/31C8028",
        "0/31C8029",
        "0/4000029",
        "0/4000030",
        "0/4002020",
        "0/4002028",
        "0/31C9FFF",
        "FFFFFFFF/FFFFFFFF",
    ],
)
def test_normalize_leaves_ends_of_records_alone(lsn: str) -> None:
    """
    A position that a record may end at stays, else a standby without that record would serve.
    """
    assert lsn == str(normalize_insert_lsn(Lsn.parse(lsn)))


def test_normalize_follows_the_sizes_of_the_server() -> None:
    """
    Whether a page starts here, and whether a segment does, is for the server's own sizes to say.
    """
    small_page, small_segment = 4096, 2 * 1024 * 1024
    in_page, in_segment = Lsn(small_page + 24), Lsn(small_segment + 40)

    assert in_page == normalize_insert_lsn(in_page)
    assert small_page == normalize_insert_lsn(in_page, block_size=4096)
    assert in_segment == normalize_insert_lsn(in_segment)
    assert small_segment == normalize_insert_lsn(in_segment, segment_size=1024 * 1024)


def test_normalize_returns_an_lsn() -> None:
    """
    The result prints as an LSN, changed or not.
    """
    assert Lsn is type(normalize_insert_lsn(Lsn(8192 + 24)))
    assert Lsn is type(normalize_insert_lsn(Lsn(8192 + 25)))


@pytest.mark.parametrize("size", [0, -8192, 1, 512, 1023, 8191, 12288, 131072, 8192.0, True, None])
def test_normalize_refuses_other_block_sizes(size: Any) -> None:
    """
    A block size is a power of two from 1 to 64 kB.
    """
    with pytest.raises(ValueError, match="block_size must be a power of two"):
        normalize_insert_lsn(Lsn(0), block_size=size)


@pytest.mark.parametrize("size", [0, -SEGMENT, 8192, 2**19, SEGMENT + 1, 3 * 2**20, 2**31, "16MB"])
def test_normalize_refuses_other_segment_sizes(size: Any) -> None:
    """
    A segment size is a power of two from 1 MB to 1 GB, in bytes and not as SHOW prints it.
    """
    with pytest.raises(ValueError, match="segment_size must be a power of two"):
        normalize_insert_lsn(Lsn(0), segment_size=size)
