"""
The cookies that carry tokens: their names, how they are read, how they are written.

A browser keeps the cookie that arrives last. Were there one name, the earlier of two overlapping
writes could replace the later's position if it is answered last. So every response that carries a
token writes it under a name made from the token's content, and deletes the cookies that came with
its request, whose positions its token includes. In whatever order responses arrive, none takes away
a position that it does not bring, and equal tokens take one place in the browser's jar.

Pure text: this module knows no session, no request and no server.
"""

from __future__ import annotations

import math
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, Literal, get_args

from lsn_consistency.exceptions import ConfigurationError

SameSite = Literal["lax", "strict", "none"]

_SUFFIX_BYTES = 9
"""Bytes of the content's digest in a cookie's name: 12 URL-safe characters."""

_BLANKS = " \t"
# RFC 9110, section 5.6.2: what a header's or a cookie's name may consist of.
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# RFC 6265, section 4.1.1: any character but control characters and the semicolon.
_ATTRIBUTE = re.compile(r"[ -:<-~]+")


class TokenCookies:
    """
    Read the token cookies of a request, and write those of a response.

    Cookies named ``name`` are read as well as ``name-`` with a suffix, for clients that keep a
    token under a fixed name.

    Raises `ConfigurationError` for names and attributes that no browser would keep.
    """

    __slots__ = ("_https_only", "_insecure", "_name", "_pattern", "_secure")

    def __init__(
        self,
        name: str,
        *,
        max_age: float,
        path: str,
        domain: str | None,
        same_site: SameSite,
        https_only: bool | None,
    ) -> None:
        self._name = check_name("cookie_name", name)
        # A suffix is taken only as it is written, because deleting the cookie repeats its name.
        self._pattern = re.compile(
            rf"({re.escape(name)}(?:-[A-Za-z0-9_-]{{1,64}})?)=[ \t]*(.*)", re.DOTALL
        )
        attributes = _attributes(path, domain, same_site)
        self._insecure = _endings(max_age, attributes)
        self._secure = _endings(max_age, f"{attributes}; Secure")
        # Browsers drop SameSite=None cookies that are not Secure.
        self._https_only = True if https_only is None and same_site == "none" else https_only
        if self._https_only is False and same_site == "none":
            raise ConfigurationError(
                'same_site="none" needs a Secure cookie, which https_only=False forbids: leave '
                "https_only out or set it to True"
            )

    def find(self, header_value: bytes, limit: int) -> list[tuple[str, str]]:
        """
        Return name and value of the first ``limit`` token cookies of a ``Cookie`` header.
        """
        found: list[tuple[str, str]] = []
        cookies = header_value.decode("latin-1")
        if self._name not in cookies:
            return found
        for cookie in cookies.split(";"):
            if match := self._pattern.match(cookie.strip(_BLANKS)):
                found.append((match[1], match[2]))
                if len(found) == limit:
                    break
        return found

    def headers(
        self, text: str | None, replaced: Iterable[str], *, https: bool
    ) -> list[tuple[bytes, bytes]]:
        """
        Return the headers that delete the cookies ``replaced`` and store ``text`` under a new name.
        """
        secure = https if self._https_only is None else self._https_only
        stored, deleted = self._secure if secure else self._insecure
        written = None if text is None else f"{self._name}-{_digest(text)}"
        lines: list[tuple[bytes, bytes]] = []
        for name in dict.fromkeys(replaced):
            if name != written:
                lines.append((b"set-cookie", (name + deleted).encode("ascii")))
        if written is not None:
            lines.append((b"set-cookie", f"{written}={text}{stored}".encode("ascii")))
        return lines


def check_name(option: str, name: Any) -> str:
    """
    Return ``name`` if it can be the name of a header or cookie; raise `ConfigurationError` if not.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{option} takes letters, digits and !#$%&'*+-.^_`|~ as in RFC 9110, not {name!r}"
        )
    return name


def _digest(text: str) -> str:
    # The first part of a token's text is its content; the others are its time and its signature.
    content = text.partition(".")[0].encode("ascii")
    return urlsafe_b64encode(blake2b(content, digest_size=_SUFFIX_BYTES).digest()).decode("ascii")


def _endings(max_age: float, attributes: str) -> tuple[str, str]:
    """
    Return what follows the value of a cookie that is stored, and the name of one that is deleted.
    """
    return f"; Max-Age={math.ceil(max_age)}{attributes}", f"=; Max-Age=0{attributes}"


def _attributes(path: str, domain: str | None, same_site: SameSite) -> str:
    if not _is_attribute(path) or not path.startswith("/"):
        raise ConfigurationError(f'path takes a cookie path such as "/" or "/shop", not {path!r}')
    if domain is not None and not _is_attribute(domain):
        raise ConfigurationError(f'domain takes a host such as "example.org", not {domain!r}')
    if same_site not in get_args(SameSite):
        raise ConfigurationError(f'same_site takes "lax", "strict" or "none", not {same_site!r}')
    domain_part = "" if domain is None else f"; Domain={domain}"
    return f"; Path={path}{domain_part}; HttpOnly; SameSite={same_site}"


def _is_attribute(value: object) -> bool:
    return isinstance(value, str) and _ATTRIBUTE.fullmatch(value) is not None
