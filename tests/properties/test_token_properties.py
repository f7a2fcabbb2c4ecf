"""
What holds for every token and every text.
"""

from __future__ import annotations

import re
import struct
from itertools import chain
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from itsdangerous.encoding import base64_decode, base64_encode

from lsn_consistency.exceptions import TokenError, TokenExpiredError
from lsn_consistency.lsn import Position
from lsn_consistency.tokens import MAX_SYSTEMS, MAX_TOKEN_LENGTH, Token, TokenCodec

KEYS = ("the older key", "the newer key")
CODEC = TokenCodec(KEYS)
SAFE_TEXT = re.compile(r"[A-Za-z0-9_.-]+")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."

# Few systems and small numbers, so that tokens overlap, mixed with the extremes.
system_ids = st.integers(0, 11) | st.integers(0, 2**64 - 1)
timelines = st.integers(1, 3) | st.integers(1, 2**32 - 1)
lsns = st.integers(0, 3) | st.integers(0, 2**64 - 1)
pins = st.none() | st.floats(allow_nan=False, allow_infinity=False)


def positions_of(systems: st.SearchStrategy[int]) -> st.SearchStrategy[Position]:
    return st.builds(Position.of, systems, timelines, lsns)


def tokens_of(systems: st.SearchStrategy[int]) -> st.SearchStrategy[Token]:
    return st.builds(Token, st.lists(positions_of(systems), max_size=12), pins)


tokens = tokens_of(system_ids)
small_tokens = tokens_of(st.integers(1, MAX_SYSTEMS))


@given(tokens, tokens)
def test_merge_is_commutative(a: Token, b: Token) -> None:
    """
    It does not matter which side asks.
    """
    assert a.merge(b) == b.merge(a)


@given(tokens, tokens, tokens)
def test_merge_is_associative(a: Token, b: Token, c: Token) -> None:
    """
    It does not matter in which order tokens arrive, even when systems are left out.
    """
    assert a.merge(b).merge(c) == a.merge(b.merge(c))


@given(tokens, tokens)
def test_merge_is_idempotent_and_absorbs(a: Token, b: Token) -> None:
    """
    What a token already holds adds nothing, and the same object says so.
    """
    merged = a.merge(b)

    assert a.merge(a) is a
    assert merged.merge(a) is merged
    assert merged.merge(b) is merged
    assert a.merge(Token()) is a
    assert a == Token().merge(a)


@given(tokens, tokens)
def test_merge_returns_itself_exactly_when_nothing_changed(a: Token, b: Token) -> None:
    """
    Identity and equality tell the same.
    """
    merged = a.merge(b)

    assert (merged == a) == (merged is a)


@given(small_tokens, small_tokens)
def test_merge_loses_nothing(a: Token, b: Token) -> None:
    """
    As long as the systems fit, each position is there or a later one of its system.
    """
    merged = a.merge(b)
    for position in chain(a.positions.values(), b.positions.values()):
        kept = merged.get(position.system_id)
        assert kept is not None
        assert kept >= position
    for pin in (a.pin_until, b.pin_until):
        assert pin is None or (merged.pin_until is not None and merged.pin_until >= pin)


@given(tokens, system_ids)
def test_without_takes_one_system_and_nothing_else(token: Token, system_id: int) -> None:
    """
    The others and the pin stay as they are; the token itself is not changed.
    """
    before = dict(token.positions)
    rest = token.without(system_id)
    held = token.get(system_id)

    assert rest.get(system_id) is None
    assert rest.pin_until == token.pin_until
    assert {key: each for key, each in before.items() if key != system_id} == rest.positions
    assert before == token.positions
    assert token == (rest if held is None else rest.merge(Token([held])))


@given(tokens, tokens)
def test_merge_invents_nothing(a: Token, b: Token) -> None:
    """
    Every position and the pin come from one of the two.
    """
    merged = a.merge(b)

    assert set(merged.positions.values()) <= {*a.positions.values(), *b.positions.values()}
    assert merged.pin_until in (a.pin_until, b.pin_until)
    assert bool(merged) == (bool(a) or bool(b))


@given(tokens, tokens)
def test_merge_is_the_token_of_all_positions(a: Token, b: Token) -> None:
    """
    The fast way gives what building a token from scratch gives, in the same order.
    """
    set_pins = [pin for pin in (a.pin_until, b.pin_until) if pin is not None]
    expected = Token([*a.positions.values(), *b.positions.values()], max(set_pins, default=None))

    merged = a.merge(b)
    assert expected == merged
    assert hash(expected) == hash(merged)
    assert list(expected.positions) == list(merged.positions)


@given(st.lists(positions_of(system_ids), max_size=20), st.randoms(use_true_random=False))
def test_order_of_positions_does_not_matter(positions: list[Position], random: Any) -> None:
    """
    A token is a set: at most one position a system, in the order of identifiers, newest kept.
    """
    shuffled = list(positions)
    random.shuffle(shuffled)
    systems = sorted({position.system_id for position in positions})[-MAX_SYSTEMS:]

    token = Token(positions)
    assert token == Token(shuffled)
    assert systems == list(token.positions)
    for system_id in systems:
        of_system = [position for position in positions if position.system_id == system_id]
        assert max(of_system) == token.get(system_id)


@given(tokens)
def test_codec_reads_what_it_writes(token: Token) -> None:
    """
    Every token survives its text, which is short and needs no quoting.
    """
    text = CODEC.encode(token)

    assert token == CODEC.decode(text)
    assert SAFE_TEXT.fullmatch(text) is not None
    assert len(text) <= MAX_TOKEN_LENGTH


@given(tokens, st.sampled_from(KEYS))
def test_every_key_verifies(token: Token, key: str) -> None:
    """
    A text of any of the keys is read.
    """
    assert token == CODEC.decode(TokenCodec(key).encode(token))


@given(tokens, st.data())
def test_changed_text_is_refused(token: Token, data: st.DataObject) -> None:
    """
    A text with one character replaced, added or dropped is no token, least of all another one.
    """
    text = CODEC.encode(token)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(start + 1, len(text))))
    changed = text[:start] + data.draw(st.text(ALPHABET, max_size=2) | st.text()) + text[end:]
    if changed != text:
        assert raises_token_error(changed)


@given(
    st.text()
    | st.text(ALPHABET, max_size=600)
    | st.from_regex(r"\A[A-Za-z0-9_-]{1,40}\.[A-Za-z0-9_-]{0,11}\.[A-Za-z0-9_-]{43}\Z")
)
def test_any_text_is_refused_as_a_bad_token(text: str) -> None:
    """
    Whatever a client sends ends in a TokenError.
    """
    assert raises_token_error(text)


@given(
    st.binary()
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.lists(st.text())
    | st.dictionaries(st.text(), st.text())
    | tokens
)
def test_any_object_is_refused_as_a_bad_token(given_object: Any) -> None:
    """
    Whatever code passes in by mistake ends in a TokenError too.
    """
    assert raises_token_error(given_object)


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: b"\x01\x00" + tail))
def test_signed_payload_has_one_meaning(payload: bytes) -> None:
    """
    What is signed is refused, or it is exactly what encode would have written.
    """
    text = CODEC._signer.sign(base64_encode(payload)).decode()
    if not raises_token_error(text):
        assert payload == base64_decode(CODEC.encode(CODEC.decode(text)).split(".")[0])


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(0, 3)), max_size=10)
    | st.sets(st.integers(0, 9)).map(lambda systems: [(each, 1, 5) for each in sorted(systems)]),
    st.none() | st.floats(),
)
def test_signed_positions_are_read_as_encode_writes_them(
    positions: list[tuple[int, int, int]], pin_until: float | None
) -> None:
    """
    Positions in another order, twice or too many, no timeline, no time: all that is not the one
    payload of a token is refused, and nothing else is.
    """
    pin = b"" if pin_until is None else struct.pack(">d", pin_until)
    packed = [struct.pack(">QIQ", *each) for each in positions]
    payload = b"".join([bytes([1, len(pin) // 8]), pin, *packed])
    try:
        token = Token([Position.of(*each) for each in positions], pin_until)
        is_written = payload == base64_decode(CODEC.encode(token).split(".")[0])
    except ValueError:
        is_written = False
    text = CODEC._signer.sign(base64_encode(payload)).decode()

    assert is_written is not raises_token_error(text)


@given(
    st.integers(0, 2**40),
    st.integers(-(10**5), 10**5),
    st.integers(1, 10**4),
    st.integers(0, 10**4),
)
def test_age_is_within_its_limits(signed_at: int, age: int, max_age: int, tolerance: int) -> None:
    """
    A token is read exactly from the tolerance before its signing to its age after it.
    """
    codec = TokenCodec(KEYS, max_age=max_age, clock_tolerance_seconds=tolerance)
    clock = vars(codec._signer)
    clock["get_timestamp"] = lambda: signed_at
    text = codec.encode(Token())
    clock["get_timestamp"] = lambda: signed_at + age
    try:
        codec.decode(text)
    except TokenExpiredError:
        assert not -tolerance <= age <= max_age
    else:
        assert -tolerance <= age <= max_age


def raises_token_error(given_object: Any) -> bool:
    try:
        CODEC.decode(given_object)
    except TokenError:
        return True
    return False
