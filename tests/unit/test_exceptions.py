"""
Errors carry what a handler needs, read well, and survive the trip through a job queue.
"""

from __future__ import annotations

import copy
import pickle

import pytest

from lsn_consistency.exceptions import (
    BadSignatureError,
    ConfigurationError,
    FallbackLimitError,
    InvalidLsnError,
    LostWriteError,
    LsnConsistencyError,
    MalformedTokenError,
    NoNodeAvailableError,
    ReplayTimeoutError,
    RoutingError,
    TokenError,
    TokenExpiredError,
)
from lsn_consistency.lsn import Lsn, Position

POSITION = Position.of(7_301_234_567_890_123_456, 3, Lsn.parse("16/B374D848"))

EXAMPLES: list[LsnConsistencyError] = [
    LsnConsistencyError("something"),
    ConfigurationError("max_age must be above 0"),
    InvalidLsnError("16-B374D848"),
    InvalidLsnError("-0x1", "an LSN is an unsigned 64 bit number"),
    TokenError("unreadable", 12),
    MalformedTokenError("a token text is a str"),
    BadSignatureError(text_length=80),
    TokenExpiredError(3700, 3600.0, 80),
    TokenExpiredError(-400, 3600.0),
    RoutingError("no"),
    ReplayTimeoutError(POSITION, 0.1),
    NoNodeAvailableError({"primary": "connection refused", "eu": "timed out"}),
    NoNodeAvailableError({}, "no primary: two claim to be it"),
    FallbackLimitError(10, 1.5),
    LostWriteError(POSITION, Lsn.parse("16/B3000000")),
    LostWriteError(POSITION, None),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_pickling(error: LsnConsistencyError, protocol: int) -> None:
    """
    A pickled error comes back with its type, its attributes and its text.
    """
    restored = pickle.loads(pickle.dumps(error, protocol))

    assert type(error) is type(restored)
    assert vars(error) == vars(restored)
    assert str(error) == str(restored)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_can_be_copied(error: LsnConsistencyError) -> None:
    """
    A copy has the attributes and the text of its original.
    """
    copied = copy.copy(error)

    assert (type(error), vars(error), str(error)) == (type(copied), vars(copied), str(copied))


@pytest.mark.parametrize(
    ("error_type", "parents"),
    [
        (ConfigurationError, (LsnConsistencyError,)),
        (InvalidLsnError, (LsnConsistencyError, ValueError)),
        (MalformedTokenError, (TokenError, LsnConsistencyError)),
        (BadSignatureError, (TokenError, LsnConsistencyError)),
        (TokenExpiredError, (TokenError, LsnConsistencyError)),
        (ReplayTimeoutError, (RoutingError, LsnConsistencyError)),
        (NoNodeAvailableError, (RoutingError, LsnConsistencyError)),
        (FallbackLimitError, (RoutingError, LsnConsistencyError)),
        (LostWriteError, (RoutingError, LsnConsistencyError)),
    ],
)
def test_tree(error_type: type[Exception], parents: tuple[type[Exception], ...]) -> None:
    """
    One except clause catches a family: the tree is the one that the module draws.
    """
    assert all(issubclass(error_type, parent) for parent in parents)


def test_families_are_apart() -> None:
    """
    A handler of bad tokens never swallows a routing error or a configuration error.
    """
    assert not issubclass(RoutingError, TokenError)
    assert not issubclass(ConfigurationError, TokenError | RoutingError)
    assert not issubclass(InvalidLsnError, TokenError)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidLsnError("12"), "invalid LSN '12': not of the form 16/B374D848"),
        (TokenError("unreadable"), "unreadable"),
        (TokenError("unreadable", 12), "unreadable (a text of 12 characters)"),
        (
            BadSignatureError(),
            "the signature was made with none of the configured keys",
        ),
        (TokenExpiredError(3700, 3600), "the token is 3700 s old, the limit is 3600 s"),
        (
            TokenExpiredError(-400, 3600),
            "the token is dated 400 s in the future, more than the clocks of the hosts may differ;"
            " compare them, or raise clock_tolerance_seconds",
        ),
        (
            ReplayTimeoutError(POSITION, 0.1),
            "no replica has replayed 16/B374D848 on timeline 3 of system 7301234567890123456"
            " within 0.1 s",
        ),
        (
            NoNodeAvailableError({"primary": "connection refused", "eu": "timed out"}),
            "no node is available: primary: connection refused; eu: timed out",
        ),
        (NoNodeAvailableError({}), "no node is available"),
        (
            NoNodeAvailableError({"eu": "timed out"}, "no node named us"),
            "no node named us: eu: timed out",
        ),
        (
            FallbackLimitError(10, 1.5),
            "the primary already serves its limit of 10 fallback reads; try again in 1.5 s",
        ),
        (
            LostWriteError(POSITION, Lsn.parse("16/B3000000")),
            "16/B374D848 on timeline 3 of system 7301234567890123456 may be lost: the log there"
            " ends at 16/B3000000",
        ),
        (
            LostWriteError(POSITION, None),
            "16/B374D848 on timeline 3 of system 7301234567890123456 may be lost: the primary's"
            " log never was there",
        ),
    ],
)
def test_text(error: LsnConsistencyError, expected: str) -> None:
    """
    The text of an error says what happened, with units, and LSNs as PostgreSQL prints them.
    """
    assert expected == str(error)


def test_text_of_an_invalid_lsn_is_bounded_and_printable() -> None:
    """
    A long or hostile text neither floods a log nor breaks its lines; the attribute keeps it whole.
    """
    text = "1/\n\x1b[31m\udcff" + "A" * 1_000_000
    error = InvalidLsnError(text)

    assert text == error.text
    assert len(str(error)) < 200
    assert str(error).isascii()
    assert str(error).isprintable()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MalformedTokenError("no", 12), {"reason": "no", "text_length": 12}),
        (ReplayTimeoutError(POSITION, 0.25), {"position": POSITION, "waited_seconds": 0.25}),
        (
            NoNodeAvailableError({"eu": "down"}, "no replica"),
            {"failures": {"eu": "down"}, "summary": "no replica"},
        ),
        (FallbackLimitError(10, 1.5), {"limit": 10, "retry_after_seconds": 1.5}),
        (LostWriteError(POSITION, Lsn(5)), {"position": POSITION, "switch_point": 5}),
        (LostWriteError(POSITION, None), {"position": POSITION, "switch_point": None}),
    ],
)
def test_attributes(error: LsnConsistencyError, expected: dict[str, object]) -> None:
    """
    Each error names what a handler acts on.
    """
    assert expected == vars(error)


def test_attributes_of_an_expired_token() -> None:
    """
    Age, limit and length are numbers to compute with, besides the text made of them.
    """
    error = TokenExpiredError(3700, 3600, 80)
    expected = (3700, 3600, 80)

    assert expected == (error.age_seconds, error.max_age_seconds, error.text_length)


def test_failures_are_a_copy() -> None:
    """
    What a router notes about its nodes later does not change an error that was raised before.
    """
    noted = {"eu": "timed out"}
    error = NoNodeAvailableError(noted)
    expected = dict(noted)
    noted["us"] = "refused"

    assert expected == error.failures
