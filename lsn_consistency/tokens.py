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

import math
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias, final

from itsdangerous.encoding import bytes_to_int, int_to_bytes

from lsn_consistency._signing import TokenSigner, checked_keys, from_base64, to_base64
from lsn_consistency.exceptions import (
    ConfigurationError,
    MalformedTokenError,
    TokenExpiredError,
)
from lsn_consistency.lsn import Lsn, Position

if TYPE_CHECKING:
    from starlette.datastructures import Secret

SecretKey: TypeAlias = "str | bytes | Secret"

MAX_SYSTEMS: Final = 8
"""How many systems a token can hold positions of."""

MAX_TOKEN_LENGTH: Final = 512
"""How many characters a token text may have; `TokenCodec.encode` writes fewer than 300."""

_VERSION: Final = 1
_HAS_PIN: Final = 1
_PLAIN: Final = bytes([_VERSION, 0])
_PINNED: Final = bytes([_VERSION, _HAS_PIN])
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

    __slots__ = ("_positions", "pin_until")

    _positions: dict[int, Position]
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
        object.__setattr__(self, "_positions", positions)
        object.__setattr__(self, "pin_until", pin_until)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Token is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Token is immutable: cannot delete {name!r}")

    @property
    def positions(self) -> MappingProxyType[int, Position]:
        """
        The position of each system, by its unsigned identifier.
        """
        return MappingProxyType(self._positions)

    @property
    def is_full(self) -> bool:
        """
        Tell whether positions of further systems may have been left out.

        A system missing from a full token is unknown, not unneeded.
        """
        return len(self._positions) == MAX_SYSTEMS

    def get(self, system_id: int) -> Position | None:
        """
        Return the position of one system (unsigned identifier), or None.
        """
        return self._positions.get(system_id)

    def merge(self, other: Token) -> Token:
        """
        Return the token that asks for all that either of the two asks for.

        Commutative, associative and idempotent; a position is lost only beyond `MAX_SYSTEMS`.
        Returns this very object when the other adds nothing, so `is` tells whether anything
        changed.
        """
        if other is self:
            return self
        mine, pin_until = self._positions, self.pin_until
        if not mine and pin_until is None:
            return other or self
        gained: dict[int, Position] = {}
        for system_id, position in other._positions.items():
            held = mine.get(system_id)
            if held is None or position > held:
                gained[system_id] = position
        if other.pin_until is not None and (pin_until is None or other.pin_until > pin_until):
            pin_until = other.pin_until
        if not gained and pin_until is self.pin_until:
            return self
        known = mine | gained
        merged = _newest(known)
        # What was gained can be older than all systems of a full token, and so have gone at once.
        if len(known) > MAX_SYSTEMS and pin_until is self.pin_until and merged == mine:
            return self
        return Token._trusted(merged, pin_until)

    def without(self, system_id: int) -> Token:
        """
        Return the token without the position of one system.
        """
        kept = {key: held for key, held in self._positions.items() if key != system_id}
        return Token._trusted(kept, self.pin_until)

    def __bool__(self) -> bool:
        return bool(self._positions) or self.pin_until is not None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Token):
            return NotImplemented
        return self._positions == other._positions and self.pin_until == other.pin_until

    def __hash__(self) -> int:
        return hash((tuple(self._positions.values()), self.pin_until))

    def __reduce__(self) -> tuple[type[Token], tuple[tuple[Position, ...], float | None]]:
        return Token, (tuple(self._positions.values()), self.pin_until)

    def __repr__(self) -> str:
        arguments = []
        if self._positions:
            arguments.append(repr(list(self._positions.values())))
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
        self._signer = TokenSigner(checked_keys(secret_key))
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
        signed_at = int_to_bytes(self._signer.get_timestamp())
        return self._signer.signed(_content(_pack(token), signed_at)).decode("ascii")

    def decode(self, text: str) -> Token:
        """
        Return the token of a text that `encode` wrote with one of the keys.

        Raises only `TokenError`, for any object at all: `MalformedTokenError`, `BadSignatureError`
        or `TokenExpiredError`. Bytes are malformed: decode a raw header as latin-1 first.
        """
        if type(text) is not str:
            text = _plain(text)
        if len(text) > MAX_TOKEN_LENGTH:
            raise MalformedTokenError(
                f"a token text has at most {MAX_TOKEN_LENGTH} characters", len(text)
            )
        token, signed_at = self._verify(text)
        age = self._signer.get_timestamp() - signed_at
        if not -self._future_limit <= age <= self._past_limit:
            raise TokenExpiredError(age, self._max_age, len(text))
        return token


def _remembering(signer: TokenSigner, cache_size: int) -> Callable[[str], tuple[Token, int]]:
    # It holds the signer and not the codec: no reference cycle keeps what it remembers. What
    # raises is not remembered, so only verified texts take its places.
    return lru_cache(maxsize=cache_size)(partial(_verified, signer))


def _plain(text: object) -> str:
    kind = type(text)
    # isinstance() would ask the object for its class, and a hostile one answers with an exception.
    if not issubclass(kind, str):
        raise MalformedTokenError("a token text is a str")
    return str.__str__(text)


def _verified(signer: TokenSigner, text: str) -> tuple[Token, int]:
    """
    Return token and time of signing of a text, whatever its age.
    """
    if _TEXT_PATTERN.fullmatch(text) is None:
        raise MalformedTokenError("a token text is three base64 parts joined by dots", len(text))
    content, _, signature = text.encode("ascii").rpartition(b".")
    signer.verify(content, signature)
    payload_text, time_text = content.split(b".")
    try:
        payload, signed_at = from_base64(payload_text), from_base64(time_text)
        # One key writes one text for a token and a time: other spellings of the same are refused.
        if signed_at.startswith(b"\0") or content != _content(payload, signed_at):
            raise ValueError("not the spelling that encode writes")
        return _unpack(payload), bytes_to_int(signed_at)
    except (ValueError, struct.error):
        raise MalformedTokenError("the signed content is no token", len(text)) from None


def _content(payload: bytes, signed_at: bytes) -> bytes:
    """
    Return what is signed: payload and time as text.
    """
    return b"%b.%b" % (to_base64(payload), to_base64(signed_at))


def _pack(token: Token) -> bytes:
    parts = [_POSITION.pack(*position) for position in token._positions.values()]
    if token.pin_until is None:
        return b"".join([_PLAIN, *parts])
    return b"".join([_PINNED, _PIN.pack(token.pin_until), *parts])


def _unpack(payload: bytes) -> Token:
    """
    Read a payload; raises ValueError or struct.error for all that `_pack` never writes.
    """
    header, start, pin_until = payload[: len(_PLAIN)], len(_PLAIN), None
    if header == _PINNED:
        packed = payload[start : start + _PIN.size]
        (pin_until,) = _PIN.unpack(packed)
        if _PIN.pack(_finite(pin_until)) != packed:
            raise ValueError("zero has no sign")
        start += _PIN.size
    elif header != _PLAIN:
        raise ValueError("unknown version or flags")
    positions: dict[int, Position] = {}
    last = -1
    for system_id, timeline, lsn in _POSITION.iter_unpack(payload[start:]):
        # The unsigned numbers themselves cannot be out of range, but for a timeline of 0.
        if system_id <= last or timeline == 0:
            raise ValueError("a system out of order, or no timeline")
        positions[system_id] = Position(system_id, timeline, Lsn(lsn))
        last = system_id
    if len(positions) > MAX_SYSTEMS:
        raise ValueError("too many systems")
    return Token._trusted(positions, pin_until)


def _newest(positions: dict[int, Position]) -> dict[int, Position]:
    if len(positions) < 2:
        return positions
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
