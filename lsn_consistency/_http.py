"""
What the middleware reads in requests and writes into responses, beside cookies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from starlette.types import Message

from lsn_consistency.exceptions import FallbackLimitError

Headers: TypeAlias = list[tuple[bytes, bytes]]

Found: TypeAlias = tuple[str | None, str]
"""The name of the cookie that a text of a token was found in, None for a header; and the text."""


def listed(value: bytes, limit: int) -> list[Found]:
    """
    Return the texts of a header's value, at most ``limit``.
    """
    found: list[Found] = []
    for part in value.decode("latin-1").split(","):
        if text := part.strip():
            found.append((None, text))
            if len(found) == limit:
                break
    return found


def varying(headers: Headers, names: Sequence[str]) -> Headers:
    """
    Return ``headers`` with one Vary that holds ``names`` and what it held before.
    """
    lines = [value for name, value in headers if name.lower() == b"vary"]
    missing = list(names)
    if lines:
        held = [
            part
            for line in lines
            for each in line.decode("latin-1").split(",")
            if (part := each.strip())
        ]
        known = {part.lower() for part in held}
        missing = [name for name in names if name.lower() not in known]
        if not missing or "*" in known:
            return headers
        headers = [line for line in headers if line[0].lower() != b"vary"]
        missing = held + missing
    return [*headers, (b"vary", ", ".join(missing).encode("latin-1"))]


def refusal(error: FallbackLimitError) -> tuple[Message, Message]:
    """
    Return the response to a request whose read found the primary full.
    """
    seconds = max(1, math.ceil(error.retry_after_seconds))
    body = f"The database is busy. Try again in {seconds} s.\n".encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode("ascii")),
        (b"retry-after", str(seconds).encode("ascii")),
    ]
    return (
        {"type": "http.response.start", "status": 503, "headers": headers},
        {"type": "http.response.body", "body": body},
    )
