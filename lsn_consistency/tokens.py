"""
What a client has to see, and its signed text: `Token` and `TokenCodec`.

A token says "my reads must include everything up to here". It leaves the process as text and comes
back from a client that may have changed it, so nothing of a text is looked at before its signature
is verified, apart from its length and alphabet. Pure values: this module knows no server, and the
clock only through the signer.

A text is three parts of unpadded URL-safe base64, joined by dots: payload, time of signing
(seconds, as itsdangerous writes it), HMAC-SHA-256. The payload is a version byte (1), a flags byte
(bit 0: `pin_until` follows), `pin_until` as a big-endian double if there is one, and 20 bytes a
position in the order of their system identifiers: system identifier (8), timeline (4), LSN (8), all
big-endian. There is exactly one payload for a token.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias, final

from itsdangerous import BadData, BadSignature, Signer, TimestampSigner
from itsdangerous.encoding import base64_decode, base64_encode, bytes_to_int, int_to_bytes

from lsn_consistency.exceptions import (
    BadSignatureError,
    ConfigurationError,
    MalformedTokenError,
    TokenExpiredError,
)
from lsn_consistency.lsn import Position

if TYPE_CHECKING:
    from starlette.datastructures import Secret

SecretKey: TypeAlias = "str | bytes | Secret"

MAX_SYSTEMS: Final = 8
"""How many systems a token can hold positions of."""

MAX_TOKEN_LENGTH: Final = 512
"""How many characters a token text may have; `TokenCodec.encode` writes fewer than 300."""

_HINT: Final = 'python -c "import secrets; print(secrets.token_hex(32))"'
_SALT: Final = b"lsn_consistency.token"
_VERSION: Final = 1
_HAS_PIN: Final = 1
_HEADER: Final = struct.Struct(">BB")
_PIN: Final = struct.Struct(">d")
_POSITION: Final = struct.Struct(">QIQ")
_TEXT_PATTERN: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{0,11}\.[A-Za-z0-9_-]{43}")


@final
class Token:
    """
    Hold, immutably, the positions that a client has to see, one for each system.

    `positions` may name a system several times: the greatest by timeline and LSN stays. Of more
    than `MAX_SYSTEMS` systems the newest stay, which are the greatest identifiers, since PostgreSQL
    puts the time of initdb into their upper bits (`BootStrapXLOG` in xlog.c). `pin_until` is the
    Unix time until which reads must go to the primary.

    Raises `TypeError` for anything but positions, `ValueError` for a position out of range and for
    a `pin_until` that is no finite number.
    """

    __slots__ = ("pin_until", "positions")

    positions: Mapping[int, Position]
    pin_until: float | None

    def __init__(self, positions: Iterable[Position] = (), pin_until: float | None = None) -> None:
        greatest: dict[int, Position] = {}
        for given in positions:
            if not isinstance(given, Position):
                raise TypeError("a token is made of Position values")
            position = Position.of(*given)
            held = greatest.get(position.system_id)
            if held is None or position > held:
                greatest[position.system_id] = position
        self._fill(_newest(greatest), None if pin_until is None else _finite(pin_until))

    @classmethod
    def _trusted(cls, positions: dict[int, Position], pin_until: float | None) -> Token:
        token = object.__new__(cls)
        token._fill(positions, pin_until)
        return token

    def _fill(self, positions: dict[int, Position], pin_until: float | None) -> None:
        object.__setattr__(self, "positions", MappingProxyType(positions))
        object.__setattr__(self, "pin_until", pin_until)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Token is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Token is immutable: cannot delete {name!r}")

    @property
    def is_full(self) -> bool:
        """
        Tell whether positions of further systems may have been left out.

        A system missing from a full token is unknown, not unneeded.
        """
        return len(self.positions) == MAX_SYSTEMS

    def get(self, system_id: int) -> Position | None:
        """
        Return the position of one system (unsigned identifier), or None.
        """
        return self.positions.get(system_id)

    def merge(self, other: Token) -> Token:
        """
        Return the token that asks for all that either of the two asks for.

        Commutative, associative and idempotent; a position is lost only beyond `MAX_SYSTEMS`.
        Returns this very object when the other adds nothing, so `is` tells whether anything
        changed.
        """
        mine, pin_until = self.positions, self.pin_until
        gained: dict[int, Position] = {}
        for system_id, position in other.positions.items():
            held = mine.get(system_id)
            if held is None or position > held:
                gained[system_id] = position
        if other.pin_until is not None and (pin_until is None or other.pin_until > pin_until):
            pin_until = other.pin_until
        if not gained and pin_until is self.pin_until:
            return self
        merged = _newest({**mine, **gained})
        # What was gained can be older than all systems of a full token, and so have gone at once.
        if pin_until is self.pin_until and merged == mine:
            return self
        return Token._trusted(merged, pin_until)

    def without(self, system_id: int) -> Token:
        """
        Return the token without the position of one system.
        """
        kept = {key: held for key, held in self.positions.items() if key != system_id}
        return Token._trusted(kept, self.pin_until)

    def __bool__(self) -> bool:
        return bool(self.positions) or self.pin_until is not None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Token):
            return NotImplemented
        return self.positions == other.positions and self.pin_until == other.pin_until

    def __hash__(self) -> int:
        return hash((tuple(self.positions.values()), self.pin_until))

    def __reduce__(self) -> tuple[type[Token], tuple[tuple[Position, ...], float | None]]:
        return Token, (tuple(self.positions.values()), self.pin_until)

    def __repr__(self) -> str:
        arguments = []
        if self.positions:
            arguments.append(repr(list(self.positions.values())))
        if self.pin_until is not None:
            arguments.append(f"pin_until={self.pin_until!r}")
        return f"Token({', '.join(arguments)})"


class TokenCodec:
    """
    Write tokens as signed text and read them back.

    `secret_key` is one key or a sequence of keys, oldest first: the last signs, all verify. A text
    is valid for `max_age` seconds after its signing, and not much longer: its time is in whole
    seconds, and a token is never refused early. A text dated at most `clock_tolerance_seconds` in
    the future is valid, for the clocks of hosts differ. Up to `cache_size` verified texts are
    remembered; their age is judged anew each time.

    One codec may be shared by threads. Raises `ConfigurationError` for options that cannot work.
    """

    __slots__ = ("_future_limit", "_max_age", "_past_limit", "_signer", "_verify")

    def __init__(
        self,
        secret_key: SecretKey | Sequence[SecretKey],
        *,
        max_age: float = 3600,
        clock_tolerance_seconds: float = 300,
        cache_size: int = 4096,
    ) -> None:
        if not _is_number(max_age) or max_age <= 0:
            raise ConfigurationError("max_age must be a finite number of seconds above 0")
        if not _is_number(clock_tolerance_seconds) or clock_tolerance_seconds < 0:
            raise ConfigurationError(
                "clock_tolerance_seconds must be a finite number of seconds, 0 or more"
            )
        if type(cache_size) is not int or cache_size < 0:
            raise ConfigurationError(
                "cache_size must be an int, 0 or more; 0 remembers no verified text"
            )
        self._max_age = max_age
        # Both times are cut to whole seconds: a difference of 1 can be an age of a millisecond.
        self._past_limit = math.ceil(max_age)
        self._future_limit = math.ceil(clock_tolerance_seconds)
        self._signer = _TokenSigner(_keys(secret_key))
        self._verify = _remembering(self._signer, cache_size)

    @property
    def max_age(self) -> float:
        """
        For how many seconds a text is valid.
        """
        return self._max_age

    def encode(self, token: Token) -> str:
        """
        Return the signed text of a token, safe as a cookie value and a header value as it stands.
        """
        if not isinstance(token, Token):
            raise TypeError("encode takes a Token")
        return self._signer.sign(base64_encode(_pack(token))).decode("ascii")

    def decode(self, text: str) -> Token:
        """
        Return the token of a text that `encode` wrote with one of the keys.

        Raises only `TokenError`, for any object at all: `MalformedTokenError`, `BadSignatureError`
        or `TokenExpiredError`. Bytes are malformed: decode a raw header as latin-1 first.
        """
        text = _checked(text)
        token, signed_at = self._verify(text)
        age = self._signer.get_timestamp() - signed_at
        if not -self._future_limit <= age <= self._past_limit:
            raise TokenExpiredError(age, self._max_age, len(text))
        return token


class _TokenSigner(TimestampSigner):
    """
    Sign with keys that are derived once; itsdangerous derives them again for each signature.
    """

    def __init__(self, secret_keys: list[bytes]) -> None:
        super().__init__(
            secret_keys, salt=_SALT, key_derivation="hmac", digest_method=hashlib.sha256
        )
        self._derived = {key: super(_TokenSigner, self).derive_key(key) for key in secret_keys}

    def derive_key(self, secret_key: str | bytes | None = None) -> bytes:
        if not isinstance(secret_key, bytes):
            secret_key = self.secret_key
        return self._derived[secret_key]


def _remembering(signer: _TokenSigner, cache_size: int) -> Callable[[str], tuple[Token, int]]:
    # The closure holds the signer and not the codec: no reference cycle keeps what it remembers.
    @lru_cache(maxsize=cache_size)
    def verify(text: str) -> tuple[Token, int]:
        return _verified(signer, text)

    return verify


def _checked(text: str) -> str:
    kind = type(text)
    # isinstance() would ask the object for its class, and a hostile one answers with an exception.
    if not issubclass(kind, str):
        raise MalformedTokenError("a token text is a str")
    length = str.__len__(text)
    if length > MAX_TOKEN_LENGTH:
        raise MalformedTokenError(f"a token text has at most {MAX_TOKEN_LENGTH} characters", length)
    exact = text if kind is str else str.__str__(text)
    if _TEXT_PATTERN.fullmatch(exact) is None:
        raise MalformedTokenError("a token text is three base64 parts joined by dots", length)
    return exact


def _verified(signer: _TokenSigner, text: str) -> tuple[Token, int]:
    """
    Return token and time of signing of a text of the right alphabet, whatever its age.
    """
    try:
        # The unsign of TimestampSigner fails on a date that datetime cannot hold.
        Signer.unsign(signer, text)
    except BadSignature:
        raise BadSignatureError(text_length=len(text)) from None
    payload_text, time_text, signature_text = text.encode("ascii").split(b".")
    try:
        token = _unpack(base64_decode(payload_text))
        signed_at = bytes_to_int(base64_decode(time_text))
        rewritten = (_pack(token), int_to_bytes(signed_at), base64_decode(signature_text))
    except (BadData, ValueError, struct.error):
        raise MalformedTokenError("the signed content is no token", len(text)) from None
    # One key writes one text for a token and a time: other spellings of the same are refused.
    if b".".join(map(base64_encode, rewritten)) != text.encode("ascii"):
        raise MalformedTokenError("the signed content is not in canonical form", len(text))
    return token, signed_at


def _pack(token: Token) -> bytes:
    parts = [_HEADER.pack(_VERSION, 0 if token.pin_until is None else _HAS_PIN)]
    if token.pin_until is not None:
        parts.append(_PIN.pack(token.pin_until))
    parts.extend(_POSITION.pack(*position) for position in token.positions.values())
    return b"".join(parts)


def _unpack(payload: bytes) -> Token:
    """
    Read a payload, canonical or not; raises ValueError or struct.error for what is none.
    """
    version, flags = _HEADER.unpack_from(payload)
    if version != _VERSION:
        raise ValueError("unknown version")
    start, pin_until = _HEADER.size, None
    if flags & _HAS_PIN:
        (pin_until,) = _PIN.unpack_from(payload, start)
        start += _PIN.size
    positions = (Position.of(*fields) for fields in _POSITION.iter_unpack(payload[start:]))
    return Token(positions, pin_until)


def _newest(positions: dict[int, Position]) -> dict[int, Position]:
    return dict(sorted(positions.items())[-MAX_SYSTEMS:])


def _finite(seconds: float) -> float:
    if not _is_number(seconds):
        raise ValueError("pin_until is a finite Unix time in seconds, or None")
    # Adding zero turns -0.0, which equals 0.0 but is written otherwise, into 0.0.
    return float(seconds) + 0.0


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _keys(secret_key: object) -> list[bytes]:
    if not isinstance(secret_key, Sequence) or isinstance(secret_key, str | bytes | bytearray):
        return [_key(secret_key)]
    if not secret_key:
        raise ConfigurationError(f"secret_key is an empty list; make a key: {_HINT}")
    return [_key(key) for key in secret_key]


def _key(secret_key: object) -> bytes:
    if not isinstance(secret_key, str | bytes):
        secret_key = _revealed(secret_key)
    try:
        key = secret_key.encode() if isinstance(secret_key, str) else secret_key
    except UnicodeEncodeError:
        raise ConfigurationError("secret_key is text that UTF-8 cannot hold; pass bytes") from None
    if not key.strip():
        raise ConfigurationError(f"secret_key is empty; make one: {_HINT}")
    return key


def _revealed(secret_key: object) -> str:
    # Imported here only: a plain key needs nothing of a web framework.
    from starlette.datastructures import Secret

    if not isinstance(secret_key, Secret):
        raise ConfigurationError(
            "secret_key must be str, bytes, Starlette's Secret or a list of these, oldest first,"
            f" not {type(secret_key).__name__}"
        )
    return str(secret_key)
