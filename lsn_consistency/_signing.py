"""
The signatures of tokens: itsdangerous' keys and format, with HMACs that are prepared once.
"""

from __future__ import annotations

import hashlib
import hmac
from binascii import a2b_base64, b2a_base64
from collections.abc import Sequence
from typing import Final

from itsdangerous import TimestampSigner

from lsn_consistency.exceptions import BadSignatureError, ConfigurationError

_HINT: Final = 'python -c "import secrets; print(secrets.token_hex(32))"'
_SALT: Final = b"lsn_consistency.token"
_TO_URL_SAFE: Final = bytes.maketrans(b"+/", b"-_")
_FROM_URL_SAFE: Final = bytes.maketrans(b"-_", b"+/")


class TokenSigner(TimestampSigner):
    """
    Sign as itsdangerous does, but with keys that are derived once and already put into their HMAC.

    Signatures are compared as texts, so another spelling of the same bytes does not verify.
    """

    def __init__(self, secret_keys: list[bytes]) -> None:
        super().__init__(
            secret_keys, salt=_SALT, key_derivation="hmac", digest_method=hashlib.sha256
        )
        macs = [hmac.new(self.derive_key(key), digestmod=hashlib.sha256) for key in secret_keys]
        # The newest first: it signs, and most texts are of its making.
        self._macs = macs[::-1]

    def signed(self, content: bytes) -> bytes:
        """
        Return the text of a content.
        """
        return b"%b.%b" % (content, _signature(self._macs[0], content))

    def verify(self, content: bytes, signature: bytes) -> None:
        """
        Raise `BadSignatureError` unless one of the keys made this signature.
        """
        for mac in self._macs:
            if hmac.compare_digest(_signature(mac, content), signature):
                return
        raise BadSignatureError(text_length=len(content) + 1 + len(signature))


def _signature(keyed: hmac.HMAC, content: bytes) -> bytes:
    mac = keyed.copy()
    mac.update(content)
    return to_base64(mac.digest())


def to_base64(content: bytes) -> bytes:
    """
    Write bytes as unpadded URL-safe base64.
    """
    return b2a_base64(content, newline=False).translate(_TO_URL_SAFE, b"=")


def from_base64(text: bytes) -> bytes:
    """
    Read unpadded URL-safe base64; raises `ValueError` for what is none.
    """
    return a2b_base64(text.translate(_FROM_URL_SAFE) + b"=" * (-len(text) % 4))


def checked_keys(secret_key: object) -> list[bytes]:
    """
    Return the keys as bytes, oldest first; raises `ConfigurationError` for what cannot be one.
    """
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
