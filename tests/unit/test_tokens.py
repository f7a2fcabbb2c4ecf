"""
`Token` and `TokenCodec`, by example.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import math
import pickle
import struct
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from itsdangerous import BadSignature, Signer, TimestampSigner
from itsdangerous.encoding import base64_encode, int_to_bytes
from starlette.datastructures import CommaSeparatedStrings, Secret

from lsn_consistency._signing import TokenSigner
from lsn_consistency.exceptions import (
    BadSignatureError,
    ConfigurationError,
    MalformedTokenError,
    TokenError,
    TokenExpiredError,
)
from lsn_consistency.lsn import Lsn, Position
from lsn_consistency.tokens import (
    MAX_SYSTEMS,
    MAX_TOKEN_LENGTH,
    Token,
    TokenCodec,
)

KEY = "a key for tests only"
NOW = 1_800_000_000
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
some_token = Token([Position.of(7, 1, 0x16_B374D848)])
full_token = Token([Position.of(system, 2, 2**64 - 1) for system in range(8)], 1.75e9)


def at(codec: TokenCodec, now: float) -> TokenCodec:
    """
    Stop the clock of a codec at a Unix time.
    """
    vars(codec._signer)["get_timestamp"] = lambda: int(now)
    return codec


def signed(codec: TokenCodec, payload: bytes) -> str:
    """
    Sign what a forger with the key, or another version, could have written.
    """
    return codec._signer.sign(base64_encode(payload)).decode()


def signed_parts(codec: TokenCodec, *parts: bytes) -> str:
    """
    Sign a text part by part, the time included.
    """
    return Signer.sign(codec._signer, b".".join(parts)).decode()


def packed(*positions: tuple[int, int, int], version: int = 1, flags: int = 0) -> bytes:
    """
    Write a payload by the documented format, not by the code under test.
    """
    head = struct.pack(">BB", version, flags)
    return head + b"".join(struct.pack(">QIQ", *position) for position in positions)


@pytest.fixture
def codec() -> TokenCodec:
    """
    A codec whose clock stands still.
    """
    return at(TokenCodec(KEY), NOW)


@pytest.fixture
def count_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Signer], str], list[Any]]:
    """
    Record the calls of a method of a signer, which goes on to do its work.
    """

    def record(signer: type[Signer], name: str) -> list[Any]:
        calls: list[Any] = []
        original = getattr(signer, name)

        def recording(self: Signer, *args: Any, **options: Any) -> Any:
            calls.append(args)
            return original(self, *args, **options)

        monkeypatch.setattr(signer, name, recording)
        return calls

    return record


class TestToken:
    def test_empty_token_is_false(self) -> None:
        """
        Only a token that asks for nothing is false.
        """
        assert not Token()
        assert Token(pin_until=0.0)
        assert Token([Position.of(0, 1, 0)])

    @pytest.mark.parametrize(
        ("positions", "greatest"),
        [
            ([(7, 1, 5), (7, 1, 9)], (7, 1, 9)),
            ([(7, 1, 9), (7, 1, 5)], (7, 1, 9)),
            ([(7, 2, 1), (7, 1, 9)], (7, 2, 1)),
            ([(7, 1, 0x9_0000_0000), (7, 1, 0x10_0000_0000)], (7, 1, 0x10_0000_0000)),
        ],
    )
    def test_greatest_position_of_a_system_stays(
        self, positions: list[tuple[int, int, int]], greatest: tuple[int, int, int]
    ) -> None:
        """
        One position a system: the later timeline, then the greater number, in any order.
        """
        token = Token(Position.of(*position) for position in positions)

        assert {7: Position.of(*greatest)} == token.positions
        assert Position.of(*greatest) == token.get(7)

    def test_get_of_a_system_it_does_not_know(self) -> None:
        """
        A system without a position is None, not an error.
        """
        assert some_token.get(8) is None

    def test_newest_systems_stay(self) -> None:
        """
        Beyond the limit the greatest identifiers stay, which are the newest systems.
        """
        positions = [Position.of(system, 1, 0) for system in (5, 1, 9, 3, 7, 2, 8, 6, 4)]
        expected = [2, 3, 4, 5, 6, 7, 8, 9]

        token = Token(positions)

        assert expected == list(token.positions)
        assert len(expected) == MAX_SYSTEMS
        assert token.is_full

    def test_is_full_at_the_limit_only(self) -> None:
        """
        Below the limit nothing was left out.
        """
        assert not Token(Position.of(system, 1, 0) for system in range(7)).is_full
        assert Token(Position.of(system, 1, 0) for system in range(8)).is_full

    @pytest.mark.parametrize("given", [(7, 1, 5), [7, 1, 5], 7, "7", None, Lsn(5)])
    def test_refuses_what_is_no_position(self, given: Any) -> None:
        """
        A token is made of positions and nothing that looks like one.
        """
        with pytest.raises(TypeError, match="made of Position"):
            Token([given])

    @pytest.mark.parametrize(
        "given",
        [
            (2**64, 1, Lsn(0)),
            (None, 1, Lsn(0)),
            (7, 0, Lsn(0)),
            (7, 2**32, Lsn(0)),
            (7, True, Lsn(0)),
            (7, 1, -1),
            (7, 1, 2**64),
            (7, 1, None),
            (7, 1, "0/0"),
        ],
    )
    def test_refuses_invalid_positions(self, given: tuple[Any, Any, Any]) -> None:
        """
        The unchecked constructor of Position does not carry rubbish into a token.
        """
        with pytest.raises(ValueError, match=r"64 bit|timeline|invalid LSN"):
            Token([Position(*given)])

    def test_checks_make_the_canonical_position(self) -> None:
        """
        A signed identifier and a bare number become what `Position.of` makes of them.
        """
        loose = Position(-1, 1, 5)  # type: ignore[arg-type]
        expected = Position.of(2**64 - 1, 1, 5)
        token = Token([loose])

        assert {expected.system_id: expected} == token.positions
        assert Lsn is type(token.positions[expected.system_id].lsn)

    @pytest.mark.parametrize(
        "pin_until",
        [
            math.nan,
            math.inf,
            -math.inf,
            True,
            "1.0",
            b"1",
            pytest.param(10**400, id="too large for a float"),
        ],
    )
    def test_refuses_other_times(self, pin_until: Any) -> None:
        """
        NaN would break every comparison, and infinity would pin a client for good.
        """
        with pytest.raises(ValueError, match="finite Unix time"):
            Token(pin_until=pin_until)

    def test_pin_until_is_a_float(self) -> None:
        """
        Equal times are one value, with one text.
        """
        whole, zero = Token(pin_until=5).pin_until, Token(pin_until=-0.0).pin_until
        assert whole is not None
        assert zero is not None

        assert (5.0, float) == (whole, type(whole))
        assert math.copysign(1, zero) > 0

    @pytest.mark.parametrize("name", ["positions", "pin_until", "is_full", "extra"])
    def test_attributes_cannot_be_set(self, name: str) -> None:
        """
        A token never changes: sessions share it.
        """
        with pytest.raises(AttributeError):
            setattr(some_token, name, None)
        with pytest.raises(AttributeError):
            delattr(some_token, name)

    def test_positions_are_read_only(self) -> None:
        """
        The mapping is a view that cannot be written through.
        """
        positions: Any = some_token.positions
        with pytest.raises(TypeError):
            positions[8] = Position.of(8, 1, 0)
        with pytest.raises(AttributeError):
            positions.clear()

    def test_does_not_follow_what_it_was_made_of(self) -> None:
        """
        Changing the list afterwards changes no token.
        """
        positions = [Position.of(7, 1, 5)]
        token = Token(positions)
        positions.append(Position.of(8, 1, 5))

        assert Token([Position.of(7, 1, 5)]) == token

    def test_equality_and_hash(self) -> None:
        """
        Tokens that ask for the same are equal, in whatever order they were built.
        """
        one, two = Position.of(1, 1, 5), Position.of(2, 1, 5)

        assert Token([one, two], 1) == Token([two, one], 1.0)
        assert hash(Token([one, two], 1)) == hash(Token([two, one], 1.0))
        assert Token([one]) != Token([two])
        assert Token([one]) != Token([one], 1)
        assert Token() != {}

    def test_repr_can_be_evaluated(self) -> None:
        """
        What a log shows is what builds the token again.
        """
        names = {"Token": Token, "Position": Position, "Lsn": Lsn.parse}
        for token in (Token(), some_token, full_token, Token(pin_until=1.5)):
            assert token == eval(repr(token), names)

    def test_survives_pickling_and_copying(self) -> None:
        """
        A token can travel in a job, and its copy equals it.
        """
        for token in (Token(), some_token, full_token):
            assert token == pickle.loads(pickle.dumps(token))
            assert token == copy.deepcopy(token)
            assert token == copy.copy(token)


class TestMerge:
    def test_takes_the_greater_of_each(self) -> None:
        """
        Each system keeps its later position, and the pin its later time.
        """
        left = Token([Position.of(1, 1, 9), Position.of(2, 1, 5)], 100)
        right = Token([Position.of(1, 2, 1), Position.of(3, 1, 5)], 50)
        expected = Token([Position.of(1, 2, 1), Position.of(2, 1, 5), Position.of(3, 1, 5)], 100)

        assert expected == left.merge(right)
        assert expected == right.merge(left)

    @pytest.mark.parametrize(
        "other",
        [
            Token(),
            Token([Position.of(7, 2, 9)]),
            Token([Position.of(7, 2, 8)]),
            Token([Position.of(7, 1, 99)]),
            Token(pin_until=100),
            Token(pin_until=-5),
            Token([Position.of(7, 2, 9)], 100),
        ],
    )
    def test_returns_itself_when_nothing_is_added(self, other: Token) -> None:
        """
        The same object tells that nothing changed: no new token need be sent.
        """
        token = Token([Position.of(7, 2, 9)], 100)

        assert token.merge(other) is token

    @pytest.mark.parametrize(
        "other",
        [
            Token([Position.of(7, 2, 10)]),
            Token([Position.of(7, 3, 1)]),
            Token([Position.of(6, 1, 1)]),
            Token(pin_until=100.5),
        ],
    )
    def test_returns_another_when_something_is_added(self, other: Token) -> None:
        """
        What was there stays unchanged, and what comes back says more.
        """
        token = Token([Position.of(7, 2, 9)], 100)
        before = copy.deepcopy(token)
        merged = token.merge(other)

        assert merged != token
        assert before == token

    def test_full_token_ignores_an_older_system(self) -> None:
        """
        What would be left out at once is no change.
        """
        full = Token(Position.of(system, 1, 5) for system in range(10, 18))

        assert full.merge(Token([Position.of(9, 1, 5)])) is full

    def test_full_token_takes_a_newer_system_for_its_oldest(self) -> None:
        """
        The newest systems stay, whichever side they came from.
        """
        full = Token(Position.of(system, 1, 5) for system in range(10, 18))
        newer = Token([Position.of(18, 1, 5), Position.of(9, 1, 5)])
        expected = list(range(11, 19))

        assert expected == list(full.merge(newer).positions)
        assert expected == list(newer.merge(full).positions)

    def test_a_pin_at_the_epoch_is_more_than_none(self) -> None:
        """
        Zero is a time.
        """
        pinned = Token(pin_until=0.0)

        assert pinned == Token().merge(pinned)


class TestRoundTrip:
    @pytest.mark.parametrize("token", [Token(), some_token, full_token, Token(pin_until=1.1)])
    def test_decode_reads_what_encode_writes(self, token: Token, codec: TokenCodec) -> None:
        """
        Nothing of a token is lost, the exact pin included.
        """
        decoded = codec.decode(codec.encode(token))

        assert token == decoded
        assert all(type(position.lsn) is Lsn for position in decoded.positions.values())

    def test_by_the_real_clock(self) -> None:
        """
        A codec as users make it reads its own texts.
        """
        codec = TokenCodec(KEY)

        assert some_token == codec.decode(codec.encode(some_token))

    @pytest.mark.parametrize("token", [Token(), some_token, full_token])
    def test_text_is_safe_in_cookies_and_headers(self, token: Token, codec: TokenCodec) -> None:
        """
        The text needs no quoting anywhere, and even a full token is short.
        """
        text = codec.encode(token)

        assert set(text) <= set(ALPHABET + ".")
        assert len(text) < 300 < MAX_TOKEN_LENGTH

    def test_format(self, codec: TokenCodec) -> None:
        """
        The payload is the documented one, so processes of different releases understand each other.
        """
        token = Token([Position.of(9, 2, 5), Position.of(7, 1, 6)], 1.5)
        expected = struct.pack(">BBdQIQQIQ", 1, 1, 1.5, 7, 1, 6, 9, 2, 5)

        assert token == codec.decode(signed(codec, expected))
        assert signed(codec, expected) == codec.encode(token)

    def test_encode_takes_tokens_only(self, codec: TokenCodec) -> None:
        """
        A text that is encoded twice is a mistake, not a token.
        """
        given: Any = "text"
        with pytest.raises(TypeError, match="takes a Token"):
            codec.encode(given)

    def test_str_subclass_is_read_as_its_text(self, codec: TokenCodec) -> None:
        """
        A framework's own text type is text.
        """

        class Text(str):
            __slots__ = ()

        assert some_token == codec.decode(Text(codec.encode(some_token)))

    def test_threads_share_a_codec(self) -> None:
        """
        Many threads that verify through a small memory all get the token of their own text.
        """
        codec = TokenCodec(KEY, cache_size=3)
        tokens = [Token([Position.of(7, 1, lsn)]) for lsn in range(20)] * 20
        texts = [codec.encode(token) for token in tokens]

        with ThreadPoolExecutor(8) as pool:
            assert tokens == list(pool.map(codec.decode, texts))


class Hostile:
    """
    Fail at whatever is asked of it.
    """

    def _fail(self, *args: Any) -> Any:
        raise RuntimeError("hostile")

    __len__ = __str__ = __repr__ = __bool__ = __iter__ = __getattribute__ = _fail
    __eq__ = __hash__ = __format__ = __contains__ = __bytes__ = _fail


class HostileText(str):
    """
    Be a text, but fail at whatever is asked of it.
    """

    __slots__ = ()

    def _fail(self, *args: Any) -> Any:
        raise RuntimeError("hostile")

    __len__ = __str__ = __repr__ = __iter__ = __getattribute__ = _fail
    __eq__ = __hash__ = __format__ = __contains__ = _fail


class HostileMeta(type):
    """
    Fail at whatever is asked of a class.
    """

    def _fail(cls, *args: Any) -> Any:
        raise RuntimeError("hostile")

    __repr__ = __getattribute__ = __eq__ = __hash__ = __subclasscheck__ = _fail


class OfHostileMeta(metaclass=HostileMeta):
    pass


class TestMalformed:
    @pytest.mark.parametrize(
        "given",
        [
            None,
            0,
            True,
            1.5,
            b"",
            b"AQA.aA.AAAA",
            bytearray(b"x"),
            [],
            {},
            object(),
            Token(),
            TokenCodec,
        ],
    )
    def test_other_types(self, given: Any, codec: TokenCodec) -> None:
        """
        What is not text is no token, whatever it is.
        """
        with pytest.raises(MalformedTokenError) as caught:
            codec.decode(given)

        assert caught.value.text_length is None

    def test_bytes_of_a_valid_text(self, codec: TokenCodec) -> None:
        """
        A raw header is decoded by whoever knows its encoding, not here.
        """
        given: Any = codec.encode(some_token).encode()
        with pytest.raises(MalformedTokenError):
            codec.decode(given)

    def test_hostile_objects(self, codec: TokenCodec) -> None:
        """
        No method of the given object runs.
        """
        hostile: list[Any] = [Hostile(), HostileText("x"), HostileText("x" * 600), OfHostileMeta()]
        for given in hostile:
            with pytest.raises(MalformedTokenError):
                codec.decode(given)

    def test_hostile_text_of_a_valid_token(self, codec: TokenCodec) -> None:
        """
        A text that would fail at everything is read by its characters alone.
        """
        assert some_token == codec.decode(HostileText(codec.encode(some_token)))

    @pytest.mark.parametrize(
        "text",
        [
            "",
            ".",
            "..",
            "...",
            "x",
            "NULL",
            "\x00",
            "\udcff\ud800",
            "\u0661\u0662",
            "AQA.aA",
            "AQA.aA." + "A" * 42,
            "AQA.aA." + "A" * 44,
            "AQA.aA." + "A" * 43 + "\n",
            "AQA.aA." + "A" * 43 + ".",
            "AQA.aA.aA." + "A" * 43,
            ".aA." + "A" * 43,
            "AQA.aAaAaAaAaAaA." + "A" * 43,
            "AQA=.aA." + "A" * 43,
            "AQ A.aA." + "A" * 43,
            "AQ/A.aA." + "A" * 43,
            "AQA.aA." + "\u00e9" * 43,
            '"AQA.aA.' + "A" * 43 + '"',
        ],
    )
    def test_shape(self, text: str, codec: TokenCodec) -> None:
        """
        Three parts of the right alphabet and lengths, or it is no token.
        """
        with pytest.raises(MalformedTokenError) as caught:
            codec.decode(text)

        assert len(text) == caught.value.text_length

    @pytest.mark.parametrize("length", [MAX_TOKEN_LENGTH + 1, 10_000_000])
    @pytest.mark.parametrize("character", ["A", ".", "\u0661"])
    def test_too_long(
        self,
        length: int,
        character: str,
        codec: TokenCodec,
        count_calls: Callable[[type[Signer], str], list[Any]],
    ) -> None:
        """
        A long text is refused by its length, before anything reads it.
        """
        calls = count_calls(TokenSigner, "verify")
        with pytest.raises(MalformedTokenError, match="at most 512 characters"):
            codec.decode(character * length)

        assert not calls

    def test_longest_text_is_still_verified(self, codec: TokenCodec) -> None:
        """
        The limit itself is within the limit.
        """
        tail = ".aA." + "A" * 43
        with pytest.raises(BadSignatureError):
            codec.decode("A" * (MAX_TOKEN_LENGTH - len(tail)) + tail)

    @pytest.mark.parametrize(
        "payload",
        [
            pytest.param(b"\x01", id="no flags"),
            pytest.param(packed(version=0), id="version 0"),
            pytest.param(packed((7, 1, 5), version=2), id="version of the future"),
            pytest.param(packed(flags=2), id="unknown flag"),
            pytest.param(packed(flags=0x80) + b"\0" * 8, id="another unknown flag"),
            pytest.param(packed(flags=1), id="pin missing"),
            pytest.param(packed(flags=1) + b"\0" * 7, id="pin cut"),
            pytest.param(packed() + b"\0" * 8, id="pin without its flag"),
            pytest.param(packed() + b"\0", id="trailing byte"),
            pytest.param(packed((7, 1, 5))[:-1], id="position cut"),
            pytest.param(packed((7, 1, 5)) + b"\0", id="trailing byte after a position"),
            pytest.param(packed((7, 1, 5), (6, 1, 5)), id="systems out of order"),
            pytest.param(packed((7, 1, 5), (7, 1, 5)), id="system twice"),
            pytest.param(packed((7, 1, 5), (7, 1, 6)), id="system twice, later position last"),
            pytest.param(packed((7, 0, 5)), id="timeline 0"),
            pytest.param(packed(*((n, 1, 5) for n in range(9))), id="too many systems"),
            pytest.param(packed(flags=1) + struct.pack(">d", math.nan), id="NaN"),
            pytest.param(packed(flags=1) + struct.pack(">d", math.inf), id="infinity"),
            pytest.param(packed(flags=1) + struct.pack(">d", -0.0), id="minus zero"),
        ],
    )
    def test_signed_payload(self, payload: bytes, codec: TokenCodec) -> None:
        """
        A right signature does not make a payload right.
        """
        with pytest.raises(MalformedTokenError):
            codec.decode(signed(codec, payload))

    @pytest.mark.parametrize(
        "parts",
        [
            pytest.param((b"AQB", b"aA"), id="unused bits of the payload"),
            pytest.param((b"AQABA", b"aA"), id="payload of an impossible length"),
            pytest.param((b"AQA", b"aB"), id="unused bits of the time"),
            pytest.param((b"AQA", b"a"), id="time of an impossible length"),
            pytest.param((b"AQA", b"AGg"), id="time with a leading zero"),
            pytest.param((b"AQA", b"AA"), id="time zero, written out"),
        ],
    )
    def test_signed_spelling(self, parts: tuple[bytes, ...], codec: TokenCodec) -> None:
        """
        A token and a time have one text: other spellings of the same bytes are refused.
        """
        with pytest.raises(MalformedTokenError):
            codec.decode(signed_parts(codec, *parts))

    def test_other_spellings_of_a_signature(self, codec: TokenCodec) -> None:
        """
        The unused bits of its last character are no way to make a second text of a token.
        """
        text = codec.encode(some_token)
        spellings = [text[:-1] + last for last in ALPHABET if last != text[-1]]
        verified = [other for other in spellings if TimestampSigner.validate(codec._signer, other)]

        assert verified, "itsdangerous alone takes them"
        for other in verified:
            with pytest.raises(BadSignatureError):
                codec.decode(other)


class TestSignature:
    def test_every_change_of_one_character(self, codec: TokenCodec) -> None:
        """
        No single character can be replaced, dropped or doubled.
        """
        text = codec.encode(some_token)
        changed = {
            text[:index] + replacement + text[index + 1 :]
            for index in range(len(text))
            for replacement in [*ALPHABET, ".", "", text[index] * 2]
        } - {text}
        accepted = []
        for other in changed:
            try:
                accepted.append(codec.decode(other))
            except TokenError:
                continue

        assert not accepted
        assert len(changed) > 60 * len(text)

    def test_parts_of_two_texts(self, codec: TokenCodec) -> None:
        """
        Payload, time and signature belong together.
        """
        first = codec.encode(some_token).split(".")
        second = at(codec, NOW + 1).encode(full_token).split(".")
        for mask in range(1, 7):
            mixed = [second[part] if mask >> part & 1 else first[part] for part in range(3)]
            with pytest.raises(BadSignatureError):
                codec.decode(".".join(mixed))

    @pytest.mark.parametrize("other_key", ["another key", KEY + " ", KEY.upper(), b"\x00"])
    def test_another_key(self, other_key: str | bytes, codec: TokenCodec) -> None:
        """
        A text of another key is a bad signature, and the error carries its length.
        """
        text = TokenCodec(other_key).encode(some_token)
        with pytest.raises(BadSignatureError) as caught:
            codec.decode(text)

        assert len(text) == caught.value.text_length

    @pytest.mark.parametrize(
        "options",
        [{}, {"key_derivation": "hmac", "digest_method": hashlib.sha256}],
        ids=["default", "same but for the salt"],
    )
    def test_other_signers_with_the_same_key(
        self, options: dict[str, Any], codec: TokenCodec
    ) -> None:
        """
        A text that the application signs elsewhere is no token, and a token is none of its texts.
        """
        other = TimestampSigner(KEY, **options)
        payload = codec.encode(some_token).split(".")[0]
        with pytest.raises(TokenError):
            codec.decode(other.sign(payload).decode())
        with pytest.raises(BadSignature):
            other.unsign(codec.encode(some_token))

    def test_salt_is_what_sets_it_apart(self, codec: TokenCodec) -> None:
        """
        The key derivation is the documented one, so other languages can read a token.
        """
        same = TimestampSigner(
            KEY,
            salt=b"lsn_consistency.token",
            key_derivation="hmac",
            digest_method=hashlib.sha256,
        )

        assert base64_encode(packed((7, 1, 0x16_B374D848))) == same.unsign(codec.encode(some_token))


class TestKeys:
    def test_last_key_signs_and_all_verify(self) -> None:
        """
        Keys are rotated without refusing a token: add the new one last, drop the old one later.
        """
        old, new = TokenCodec("old"), TokenCodec("new")
        both = TokenCodec(["old", "new"])

        assert some_token == both.decode(old.encode(some_token))
        assert some_token == both.decode(new.encode(some_token))
        assert some_token == new.decode(both.encode(some_token))
        with pytest.raises(BadSignatureError):
            old.decode(both.encode(some_token))
        with pytest.raises(BadSignatureError):
            new.decode(old.encode(some_token))

    @pytest.mark.parametrize(
        "secret_key",
        [
            KEY,
            KEY.encode(),
            Secret(KEY),
            [KEY],
            (b"older", KEY),
            [Secret("older"), Secret(KEY)],
            CommaSeparatedStrings(["older", KEY]),
        ],
    )
    def test_forms_of_a_key(self, secret_key: Any, codec: TokenCodec) -> None:
        """
        Text, bytes, Starlette's Secret and lists of these name the same key.
        """
        assert codec.encode(some_token) == at(TokenCodec(secret_key), NOW).encode(some_token)

    @pytest.mark.parametrize(
        ("secret_key", "advice"),
        [
            ("", "secrets.token_hex"),
            (b"", "secrets.token_hex"),
            ("  \n", "secrets.token_hex"),
            (Secret(""), "secrets.token_hex"),
            ([], "secrets.token_hex"),
            ((), "secrets.token_hex"),
            (["good", ""], "secrets.token_hex"),
            (["", "good"], "secrets.token_hex"),
            (None, "not NoneType"),
            (["good", None], "not NoneType"),
            (5, "not int"),
            (bytearray(b"key"), "not bytearray"),
            ({"good"}, "not set"),
            ({"good": 1}, "not dict"),
            (iter(["good"]), "oldest first"),
            ([["good"]], "not list"),
            (object(), "not object"),
            ("\ud800", "pass bytes"),
        ],
    )
    def test_refuses(self, secret_key: Any, advice: str) -> None:
        """
        A key that cannot protect anything stops the application at start, and says what to do.
        """
        with pytest.raises(ConfigurationError, match=advice):
            TokenCodec(secret_key)

    def test_masked_secret_is_no_key(self) -> None:
        """
        An object whose text hides the secret is refused, else its mask would be the key.
        """

        class Masked:
            def __str__(self) -> str:
                return "**********"

        given: Any = Masked()
        with pytest.raises(ConfigurationError, match="not Masked"):
            TokenCodec(given)

    def test_key_is_not_shown(self) -> None:
        """
        Neither a codec nor its errors print a key.
        """
        given: Any = ["a secret", 5]
        with pytest.raises(ConfigurationError) as caught:
            TokenCodec(given)

        assert "a secret" not in str(caught.value)
        assert "a secret" not in repr(TokenCodec("a secret"))

    def test_keys_are_derived_once(
        self, count_calls: Callable[[type[Signer], str], list[Any]]
    ) -> None:
        """
        Signing and verifying derive nothing: one derivation a key, when the codec is made.
        """
        derivations = count_calls(Signer, "derive_key")
        expected = [(b"one",), (b"two",), (b"three",)]
        codec = TokenCodec(["one", "two", "three"], cache_size=0)
        for _ in range(5):
            codec.decode(codec.encode(some_token))
            codec.decode(codec.encode(full_token))

        assert expected == derivations


class TestAge:
    @pytest.mark.parametrize("age", [0, 1, 59, 60, -1, -29, -30])
    def test_valid(self, age: int) -> None:
        """
        A token is valid for its whole age, and on hosts whose clock is a little behind.
        """
        codec = at(TokenCodec(KEY, max_age=60, clock_tolerance_seconds=30), NOW)
        text = codec.encode(some_token)

        assert some_token == at(codec, NOW + age).decode(text)

    @pytest.mark.parametrize("age", [61, 62, 10**6, -31, -(10**6)])
    def test_expired(self, age: int) -> None:
        """
        Older than allowed, or from further ahead than clocks differ: refused, with its age.
        """
        codec = at(TokenCodec(KEY, max_age=60, clock_tolerance_seconds=30), NOW)
        text = codec.encode(some_token)
        with pytest.raises(TokenExpiredError) as caught:
            at(codec, NOW + age).decode(text)

        expected = (age, 60, len(text))
        error = caught.value
        assert expected == (error.age_seconds, error.max_age_seconds, error.text_length)
        assert ("in the future" in str(error)) == (age < 0)

    @pytest.mark.parametrize("max_age", [0.1, 0.5, 1, 1.5, 60])
    def test_never_refused_early(self, max_age: float) -> None:
        """
        Times are cut to whole seconds, and still a token lives as long as promised.
        """
        codec = TokenCodec(KEY, max_age=max_age)
        for part in range(20):
            signed_at = NOW + part / 20
            text = at(codec, signed_at).encode(some_token)

            assert some_token == at(codec, signed_at + max_age).decode(text)
            with pytest.raises(TokenExpiredError):
                at(codec, signed_at + max_age + 2).decode(text)

    def test_no_tolerance(self) -> None:
        """
        The tolerance can be turned off.
        """
        codec = at(TokenCodec(KEY, clock_tolerance_seconds=0), NOW)
        text = codec.encode(some_token)

        assert some_token == codec.decode(text)
        with pytest.raises(TokenExpiredError):
            at(codec, NOW - 1).decode(text)

    @pytest.mark.parametrize("signed_at", [0, 1, 255, 256, 2**40, 2**63, 2**64 - 1])
    def test_any_time_of_signing(self, signed_at: int, codec: TokenCodec) -> None:
        """
        A time that no calendar holds is a time, and expired.
        """
        time = base64_encode(int_to_bytes(signed_at))
        text = signed_parts(codec, b"AQA", time)

        with pytest.raises(TokenExpiredError) as caught:
            codec.decode(text)

        assert NOW - signed_at == caught.value.age_seconds

    def test_max_age_can_be_read(self) -> None:
        """
        The middleware compares it with the lag that a token guards.
        """
        expected = 12.5

        assert expected == TokenCodec(KEY, max_age=expected).max_age

    @pytest.mark.parametrize("option", ["max_age", "clock_tolerance_seconds"])
    @pytest.mark.parametrize(
        "value",
        [
            -1,
            math.nan,
            math.inf,
            -math.inf,
            None,
            True,
            "3600",
            pytest.param(10**400, id="too large for a float"),
        ],
    )
    def test_refuses_other_durations(self, option: str, value: Any) -> None:
        """
        A duration is a finite number of seconds.
        """
        options: dict[str, Any] = {option: value}
        with pytest.raises(ConfigurationError, match=f"{option} must be a finite number"):
            TokenCodec(KEY, **options)

    def test_refuses_tokens_that_never_live(self) -> None:
        """
        A max_age of zero would refuse every token.
        """
        with pytest.raises(ConfigurationError, match="max_age must be"):
            TokenCodec(KEY, max_age=0)


class TestMemory:
    @pytest.fixture
    def verifications(
        self, count_calls: Callable[[type[Signer], str], list[Any]]
    ) -> Callable[[], list[str]]:
        """
        The texts whose signatures were verified.
        """
        calls = count_calls(TokenSigner, "verify")
        return lambda: [b".".join(call).decode() for call in calls]

    @staticmethod
    def texts(codec: TokenCodec, lsns: Iterable[int]) -> list[str]:
        return [codec.encode(Token([Position.of(7, 1, lsn)])) for lsn in lsns]

    def test_verified_once(self, codec: TokenCodec, verifications: Callable[[], list[str]]) -> None:
        """
        A text that comes again is not verified again, and gives the same token.
        """
        text = codec.encode(some_token)
        first = codec.decode(text)

        assert codec.decode(text) is first
        assert [text] == verifications()

    def test_remembered_text_expires(
        self, codec: TokenCodec, verifications: Callable[[], list[str]]
    ) -> None:
        """
        Remembering a signature does not prolong a token, in either direction of time.
        """
        text = codec.encode(some_token)
        codec.decode(text)
        for later in (NOW + 3601, NOW - 301):
            with pytest.raises(TokenExpiredError):
                at(codec, later).decode(text)

        assert some_token == at(codec, NOW).decode(text)
        assert [text] == verifications()

    def test_is_bounded(self, verifications: Callable[[], list[str]]) -> None:
        """
        Only the last texts are remembered: the least recently used goes.
        """
        codec = TokenCodec(KEY, cache_size=2)
        one, two, three = self.texts(codec, range(3))
        for text in (one, two, one, three, one, two):
            codec.decode(text)

        assert [one, two, three, two] == verifications()

    def test_can_be_turned_off(self, verifications: Callable[[], list[str]]) -> None:
        """
        A cache of size 0 verifies every time.
        """
        codec = TokenCodec(KEY, cache_size=0)
        text = codec.encode(some_token)
        for _ in range(3):
            codec.decode(text)

        assert [text] * 3 == verifications()

    def test_bad_texts_are_not_remembered(
        self, codec: TokenCodec, verifications: Callable[[], list[str]]
    ) -> None:
        """
        A client without a key cannot push good texts out.
        """
        codec = at(TokenCodec(KEY, cache_size=1), NOW)
        good, bad = codec.encode(some_token), TokenCodec("another").encode(some_token)
        codec.decode(good)
        for _ in range(3):
            with pytest.raises(BadSignatureError):
                codec.decode(bad)
        codec.decode(good)

        assert [good, bad, bad, bad] == verifications()

    def test_codecs_do_not_share_it(self) -> None:
        """
        A text verified under one key is not thereby verified under another.
        """
        one, other = TokenCodec("one"), TokenCodec("other")
        text = one.encode(some_token)
        one.decode(text)
        with pytest.raises(BadSignatureError):
            other.decode(text)

    def test_goes_with_its_codec(self) -> None:
        """
        A codec that nobody holds is freed at once, keys and all, without the garbage collector.
        """
        codec = TokenCodec(KEY)
        codec.decode(codec.encode(some_token))
        signer = weakref.ref(codec._signer)
        gc.disable()
        try:
            del codec
            assert signer() is None
        finally:
            gc.enable()

    @pytest.mark.parametrize("cache_size", [-1, None, True, 1.0, "10", math.inf])
    def test_refuses_other_sizes(self, cache_size: Any) -> None:
        """
        The memory has a limit: None would be none.
        """
        with pytest.raises(ConfigurationError, match="cache_size must be an int"):
            TokenCodec(KEY, cache_size=cache_size)
