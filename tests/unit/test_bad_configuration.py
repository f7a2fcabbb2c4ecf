"""Configurations that cannot work raise `ConfigurationError` at once, and say what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import psycopg_pool
import pytest

from lsn_consistency import (
    AsyncRouter,
    Consistency,
    ConsistencyMiddleware,
    Router,
    TokenCodec,
    consistency,
)
from lsn_consistency.exceptions import ConfigurationError

PRIMARY = "host=pg0 dbname=shop"
ROUTERS = (Router, AsyncRouter)


@pytest.fixture(params=ROUTERS, ids=lambda router: router.__name__)
def router(request: pytest.FixtureRequest) -> Any:
    """Run the test with both kinds of router."""
    return request.param


NODES: list[tuple[dict[str, Any], str]] = [
    ({}, "no primary: pass primary="),
    ({"primary": None}, "no primary: pass primary="),
    ({"primary": ""}, "no primary: pass primary="),
    ({"primary": "nonsense"}, "conninfo of 'primary'"),
    ({"primary": "host=a nonsense=1"}, "conninfo of 'primary'"),
    ({"primary": 5432}, "takes a conninfo or an open psycopg_pool"),
    ({"primary": PRIMARY, "replicas": {"primary": "host=pg1"}}, "two nodes are named 'primary'"),
    (
        {"primary": PRIMARY, "replicas": [("eu", "host=pg1"), ("eu", "host=pg2")]},
        "two nodes are named 'eu'",
    ),
    ({"primary": PRIMARY, "replicas": {"": "host=pg1"}}, "a non-empty string"),
    ({"primary": PRIMARY, "replicas": {7: "host=pg1"}}, "a non-empty string"),
    ({"primary": PRIMARY, "replicas": {"eu": ""}}, "replica 'eu' has no conninfo"),
    ({"primary": PRIMARY, "replicas": {"eu": None}}, "replica 'eu' has no conninfo"),
    ({"primary": PRIMARY, "replicas": {"eu": "nonsense"}}, "conninfo of 'eu'"),
    ({"primary": PRIMARY, "replicas": {"eu": object()}}, "takes a conninfo or an open"),
    ({"primary": PRIMARY, "replicas": "host=pg1"}, "replicas takes a mapping such as"),
    ({"primary": PRIMARY, "replicas": 1}, "replicas takes a mapping such as"),
]


@pytest.mark.parametrize(("nodes", "message"), NODES)
def test_nodes_that_cannot_work_are_refused(
    router: Any, nodes: dict[str, Any], message: str
) -> None:
    """No primary, the same name twice, no conninfo: refused with what to do."""
    with pytest.raises(ConfigurationError, match=message):
        router(**nodes)


SECONDS = (
    "max_lag_seconds",
    "wait_seconds",
    "poll_interval",
    "probe_timeout",
    "connect_timeout",
    "open_timeout",
    "pin_seconds",
    "fallback_wait_seconds",
)
NO_SECONDS = (-1, float("nan"), float("inf"), "1", None, True)


@pytest.mark.parametrize("option", SECONDS)
@pytest.mark.parametrize("value", NO_SECONDS, ids=repr)
def test_times_that_are_none_are_refused(router: Any, option: str, value: Any) -> None:
    """Negative, endless, or no number at all: refused by the option's name."""
    with pytest.raises(ConfigurationError, match=option):
        router(primary=PRIMARY, **{option: value})


def test_only_waits_may_be_zero(router: Any) -> None:
    """A wait of no time is a choice; a bound of no time could never be met."""
    refused = []
    for option in SECONDS:
        try:
            router(primary=PRIMARY, **{option: 0})
        except ConfigurationError:
            refused.append(option)
    assert sorted(set(SECONDS) - {"wait_seconds", "fallback_wait_seconds"}) == sorted(refused)


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_lag": 2.0}, "unknown option 'max_lag'; did you mean max_lag_seconds?"),
    ({"nonsense": 1}, "unknown option 'nonsense'"),
    ({"consistency": "causal"}, r"consistency takes a Consistency such as Consistency\.CAUSAL"),
    ({"on_fallback_limit": "block"}, '"wait", "stale" or "error"'),
    ({"failure_threshold": 0}, "failure_threshold takes a whole number from 1 up"),
    ({"failure_threshold": 1.5}, "failure_threshold takes a whole number"),
    ({"max_fallback_reads": 0}, "max_fallback_reads takes a whole number from 1 up"),
    ({"max_fallback_reads": True}, "max_fallback_reads takes a whole number"),
    ({"weights": [1.0]}, "weights takes a mapping"),
    ({"weights": {"replica_1": 0}}, "the weight of 'replica_1' takes a positive number"),
    ({"weights": {"nowhere": 1.0}}, "weights names 'nowhere', which is no node"),
    ({"pool_options": 5}, "pool_options takes a mapping"),
    ({"pool_options": {"conninfo": "host=x"}}, "pool_options cannot set 'conninfo'"),
    ({"pool_options": {"open": True}}, "pool_options cannot set 'open'"),
    ({"on_event": "print"}, "on_event takes a callable"),
    ({"pin_seconds": 1.0, "max_lag_seconds": 2.0}, "raise pin_seconds or lower max_lag_seconds"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_that_cannot_work_are_refused(
    router: Any, options: dict[str, Any], message: str
) -> None:
    """The error names the option and says what it takes."""
    with pytest.raises(ConfigurationError, match=message):
        router(primary=PRIMARY, replicas=["host=pg1"], **options)


class _Names(Mapping[str, str]):
    """A mapping that is no dict."""

    def __getitem__(self, name: str) -> str:
        return f"host={name}"

    def __iter__(self) -> Iterator[str]:
        return iter(("eu", "us"))

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(
    "replicas",
    [
        (),
        {},
        {"eu": "host=pg1"},
        ["host=pg1", "postgresql://pg2/shop"],
        (info for info in ("host=pg1", "host=pg2")),
        [("eu", "host=pg1"), "host=pg2"],
        _Names(),
    ],
)
def test_replicas_come_in_many_shapes(replicas: Any) -> None:
    """A mapping, an iterable of conninfos or of pairs, or nothing at all: all are fine."""
    assert 2.0 == Router(primary=PRIMARY, replicas=replicas).settings.max_lag_seconds


def test_a_pool_of_the_other_kind_is_refused() -> None:
    """An async pool cannot serve threads, nor a blocking one a loop."""
    blocking = psycopg_pool.ConnectionPool(PRIMARY, open=False)
    with pytest.raises(ConfigurationError, match=r"psycopg_pool\.AsyncConnectionPool"):
        AsyncRouter(primary=blocking)
    with pytest.raises(ConfigurationError, match=r"psycopg_pool\.ConnectionPool"):
        Router(primary=psycopg_pool.AsyncConnectionPool(PRIMARY, open=False))


def test_a_router_that_is_not_open_says_how_to_open_it() -> None:
    """Using it before open() tells the three ways to open it."""
    with pytest.raises(ConfigurationError, match="open"):
        Router(primary=PRIMARY).snapshot()
    with pytest.raises(ConfigurationError, match="open"), Router(primary=PRIMARY).read():
        pytest.fail("a router that is not open has read")


def test_options_that_a_pool_does_not_know_are_refused_when_it_is_made() -> None:
    """A typing error in pool_options is an error of the configuration, not of a read."""
    router = Router(primary=PRIMARY, pool_options={"min_sise": 2}, open_timeout=0.1)
    with pytest.raises(ConfigurationError, match="pool_options"):
        router.open()
    router.close()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "2", None, True])
def test_levels_with_a_time_need_one(seconds: Any) -> None:
    """bounded() and sticky() take a positive, finite number of seconds."""
    for level in (Consistency.bounded, Consistency.sticky):
        with pytest.raises(ConfigurationError, match="positive number of seconds"):
            level(seconds)


def test_a_block_takes_a_level() -> None:
    """consistency() takes a Consistency, not its name."""
    with pytest.raises(ConfigurationError, match=r"Consistency\.STRONG"):
        consistency("strong")  # type: ignore[arg-type]


SECRETS: tuple[Any, ...] = ("", [], [""], ["key", ""], None, 5, b"")


@pytest.mark.parametrize("secret", SECRETS, ids=repr)
def test_an_empty_secret_is_refused(secret: Any) -> None:
    """A token that anybody can sign is worse than none."""
    with pytest.raises(ConfigurationError, match="secret_key"):
        TokenCodec(secret)


async def _app(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("never called")


MIDDLEWARE: list[tuple[dict[str, Any], str]] = [
    ({"secret_key": ""}, "secret_key"),
    ({"max_age": 1}, "max_age"),
    ({"on_bad_token": "raise"}, "on_bad_token"),
    ({"same_site": "loose"}, "same_site"),
    ({"cookie_name": None, "header_name": None}, "cookie_name|header_name"),
    ({"cookie_name": "a b"}, "cookie_name"),
    ({"header_name": "a:b"}, "header_name"),
]


@pytest.mark.parametrize(("options", "message"), MIDDLEWARE)
def test_a_middleware_that_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    """max_age under max_lag_seconds, an empty secret, no carrier at all: refused at the start."""
    router = Router(primary=PRIMARY, max_lag_seconds=2.0)
    with pytest.raises(ConfigurationError, match=message):
        ConsistencyMiddleware(_app, router=router, **{"secret_key": "k" * 32, **options})


def test_a_token_must_outlive_the_lag_it_guards() -> None:
    """max_age equal to max_lag_seconds is enough, one second less is not."""
    router = Router(primary=PRIMARY, max_lag_seconds=5.0)
    ConsistencyMiddleware(_app, router=router, secret_key="k" * 32, max_age=5)
    with pytest.raises(ConfigurationError, match="max_lag_seconds"):
        ConsistencyMiddleware(_app, router=router, secret_key="k" * 32, max_age=4)
