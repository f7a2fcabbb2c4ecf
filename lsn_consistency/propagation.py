"""
The token in and out of any mapping: HTTP headers, job headers, message attributes.

Integrations are built on the two functions of this module; it knows no framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from lsn_consistency.exceptions import ConfigurationError, TokenError
from lsn_consistency.session import current_session
from lsn_consistency.tokens import Token, TokenCodec

_EMPTY = Token()


def inject(
    carrier: MutableMapping[str, Any],
    *,
    codec: TokenCodec | None = None,
    header_name: str | None = None,
) -> None:
    """
    Put the current session's token into ``carrier``; an empty token puts nothing.

    ``codec`` and ``header_name`` default to those of the session, which the middleware sets for
    every request. Send the carrier only to services that share the secret key.

    Raises `ConfigurationError` when neither the call nor the session has a codec.
    """
    session = current_session()
    # Asked for first: a missing codec shows at the first call, not at the first write.
    codec = _codec(codec)
    if session.token:
        carrier[header_name or session.header_name] = codec.encode(session.token)


def extract(
    carrier: Mapping[str, Any],
    *,
    codec: TokenCodec | None = None,
    header_name: str | None = None,
    on_error: Callable[[TokenError], None] | None = None,
) -> Token:
    """
    Take the token out of ``carrier``, advance the current session by it, and return it.

    The name is looked up without regard to case; text and bytes are understood. A carrier
    without a token gives the empty token. A token that does not verify gives the empty token
    too and is handed to ``on_error``, so that a forged job header cannot stop a worker.

    Raises `ConfigurationError` when neither the call nor the session has a codec.
    """
    session = current_session()
    codec = _codec(codec)
    text = _find(carrier, header_name or session.header_name)
    if text is None:
        return _EMPTY
    try:
        token = codec.decode(text)
    except TokenError as error:
        if on_error is not None:
            on_error(error)
        return _EMPTY
    session.advance(token)
    return token


def _codec(given: TokenCodec | None) -> TokenCodec:
    codec = given or current_session().codec
    if codec is None:
        raise ConfigurationError(
            "no TokenCodec: pass codec=TokenCodec(secret_key), or open the session with "
            "Session(codec=...); inside a request ConsistencyMiddleware does it"
        )
    return codec


def _find(carrier: Mapping[str, Any], name: str) -> Any:
    value = carrier.get(name)
    if value is None:
        wanted = name.lower()
        for key, candidate in carrier.items():
            if isinstance(key, str) and key.lower() == wanted:
                value = candidate
                break
    if isinstance(value, bytes):
        try:
            return value.decode("ascii")
        except UnicodeDecodeError:
            return value
    return value
