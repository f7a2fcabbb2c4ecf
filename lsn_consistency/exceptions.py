"""
Every error that the package raises on purpose.

::

    LsnConsistencyError
    ├── ConfigurationError            an option or argument that cannot work
    ├── InvalidLsnError (ValueError)  not a log sequence number
    ├── TokenError                    a token text that must not be believed
    │   ├── MalformedTokenError       not a token at all
    │   ├── BadSignatureError         signed with none of the configured keys
    │   └── TokenExpiredError         too old, or from too far in the future
    └── RoutingError                  no node may serve this read or write
        ├── ReplayTimeoutError        no replica reached the position in time
        ├── NoNodeAvailableError      every node failed
        ├── FallbackLimitError        the primary serves no more fallback reads
        └── LostWriteError            the primary does not have the position

Each error takes its attributes as positional arguments and builds its text from them, so it
survives pickling and a handler never has to parse a message. Errors of the user's own SQL are not
here: they pass through untouched. This module is the lowest layer and imports nothing of the
package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

_MAX_QUOTED_LENGTH = 40
"""How many characters of a foreign text an error message repeats."""


class PositionLike(Protocol):
    """
    Describe what an error needs of a `Position`, which a higher layer defines.
    """

    @property
    def system_id(self) -> int:
        """
        The system identifier of the cluster.
        """

    @property
    def timeline(self) -> int:
        """
        The timeline that `lsn` was read on.
        """

    @property
    def lsn(self) -> int:
        """
        The log sequence number; its text form is what a message shows.
        """


class LsnConsistencyError(Exception):
    """
    Serve as the base of every error of this package.
    """


class ConfigurationError(LsnConsistencyError):
    """
    Report an option that cannot work; the message says what to do instead.
    """


class InvalidLsnError(LsnConsistencyError, ValueError):
    """
    Report a value that is no log sequence number.

    `text` is the text as it was given, a number in hexadecimal, or the name of a type that an LSN
    cannot be made of. The message quotes only its beginning.
    """

    def __init__(self, text: str, reason: str = "not of the form 16/B374D848") -> None:
        super().__init__(text, reason)
        self.text = text
        self.reason = reason

    def __str__(self) -> str:
        quoted = ascii(self.text[:_MAX_QUOTED_LENGTH])
        dots = "..." if len(self.text) > _MAX_QUOTED_LENGTH else ""
        return f"invalid LSN {quoted}{dots}: {self.reason}"


class TokenError(LsnConsistencyError):
    """
    Report a token text that must not be believed.

    `text_length` is the number of characters of the text, or None when it was not a text. The text
    itself is left out: it came from outside and would end up in logs.
    """

    def __init__(self, reason: str, text_length: int | None = None) -> None:
        super().__init__(reason, text_length)
        self.reason = reason
        self.text_length = text_length

    def __str__(self) -> str:
        if self.text_length is None:
            return self.reason
        return f"{self.reason} (a text of {self.text_length} characters)"


class MalformedTokenError(TokenError):
    """
    Report a text that no `TokenCodec` has written.
    """


class BadSignatureError(TokenError):
    """
    Report a text whose signature was made with none of the configured keys.
    """

    def __init__(
        self,
        reason: str = "the signature was made with none of the configured keys",
        text_length: int | None = None,
    ) -> None:
        super().__init__(reason, text_length)


class TokenExpiredError(TokenError):
    """
    Report a genuine token that is older than allowed, or dated too far in the future.

    `age_seconds` is negative for a token from the future, and `max_age_seconds` is the limit for
    old ones.
    """

    def __init__(
        self, age_seconds: float, max_age_seconds: float, text_length: int | None = None
    ) -> None:
        if age_seconds < 0:
            reason = (
                f"the token is dated {-age_seconds:g} s in the future, more than the clocks of"
                " the hosts may differ; compare them, or raise clock_tolerance_seconds"
            )
        else:
            reason = f"the token is {age_seconds:g} s old, the limit is {max_age_seconds:g} s"
        super().__init__(reason, text_length)
        self.args = (age_seconds, max_age_seconds, text_length)
        self.age_seconds = age_seconds
        self.max_age_seconds = max_age_seconds


class RoutingError(LsnConsistencyError):
    """
    Report that no node may serve a read or write.
    """


class ReplayTimeoutError(RoutingError):
    """
    Report that no replica has replayed `position` within `waited_seconds`.
    """

    def __init__(self, position: PositionLike, waited_seconds: float) -> None:
        super().__init__(position, waited_seconds)
        self.position = position
        self.waited_seconds = waited_seconds

    def __str__(self) -> str:
        return (
            f"no replica has replayed {_describe(self.position)} within {self.waited_seconds:g} s"
        )


class NoNodeAvailableError(RoutingError):
    """
    Report that no node may serve; `failures` maps the name of each that failed to what went wrong.

    `summary` says what was asked for in vain; the text of the error begins with it.
    """

    def __init__(self, failures: Mapping[str, str], summary: str = "no node is available") -> None:
        held = dict(failures)
        super().__init__(held, summary)
        self.failures: Mapping[str, str] = held
        self.summary = summary

    def __str__(self) -> str:
        if not self.failures:
            return self.summary
        return f"{self.summary}: " + "; ".join(
            f"{name}: {what}" for name, what in self.failures.items()
        )


class FallbackLimitError(RoutingError):
    """
    Report that the primary already serves `limit` fallback reads.

    `retry_after_seconds` is a hint for the client, as in the Retry-After header of HTTP status 503.
    """

    def __init__(self, limit: int, retry_after_seconds: float) -> None:
        super().__init__(limit, retry_after_seconds)
        self.limit = limit
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return (
            f"the primary already serves its limit of {self.limit} fallback reads;"
            f" try again in {self.retry_after_seconds:g} s"
        )


class LostWriteError(RoutingError):
    """
    Report a position that the primary's log does not have: its write may be lost.

    The log of the primary left the timeline of `position` at the LSN `switch_point`, or ends there
    if that is its own timeline; None says that it never was on that timeline. A failover has
    dropped the write, or a crash or a restored backup has; or the position covered no more than
    unused log. Raised with ``on_lost_write="error"``; the session's token has been replaced by the
    primary's position, so the next read goes on.
    """

    def __init__(self, position: PositionLike, switch_point: int | None) -> None:
        super().__init__(position, switch_point)
        self.position = position
        self.switch_point = switch_point

    def __str__(self) -> str:
        if self.switch_point is None:
            return f"{_describe(self.position)} may be lost: the primary's log never was there"
        return f"{_describe(self.position)} may be lost: the log there ends at {self.switch_point}"


def _describe(position: PositionLike) -> str:
    return f"{position.lsn} on timeline {position.timeline} of system {position.system_id}"
