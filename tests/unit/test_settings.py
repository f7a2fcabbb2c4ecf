"""Options that cannot work are refused at once, by name, with what to do."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest

from lsn_consistency import Consistency
from lsn_consistency._settings import RouterOptions, Settings, check_weights, name_nodes
from lsn_consistency.exceptions import ConfigurationError

POSITIVE = (
    "max_lag_seconds",
    "poll_interval",
    "probe_timeout",
    "connect_timeout",
    "open_timeout",
    "pin_seconds",
)
NOT_NUMBERS = (None, "1", True, math.nan, math.inf, -math.inf, -1, [1])


def test_both_lists_of_options_are_one() -> None:
    """What editors are told is what is taken."""
    assert {each.name for each in fields(Settings)} == set(RouterOptions.__annotations__)


def test_the_defaults_are_those_of_the_documentation() -> None:
    """A router without options works."""
    settings = Settings.of({})
    assert (2.0, 0.1, Consistency.CAUSAL, 0.5, 1.0, 2.0) == (
        settings.max_lag_seconds,
        settings.wait_seconds,
        settings.consistency,
        settings.poll_interval,
        settings.probe_timeout,
        settings.connect_timeout,
    )
    assert (3, None, "wait", {}, None) == (
        settings.failure_threshold,
        settings.max_fallback_reads,
        settings.on_fallback_limit,
        settings.weights,
        settings.on_event,
    )


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0], ids=repr)
def test_times_that_must_be_positive(name: str, value: Any) -> None:
    """Zero is no time for a limit."""
    with pytest.raises(ConfigurationError, match=f"{name} takes a positive number"):
        Settings.of({name: value})


@pytest.mark.parametrize("name", ["wait_seconds", "fallback_wait_seconds"])
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_times_that_may_be_zero(name: str, value: Any) -> None:
    """Not waiting is a choice, waiting for less is none."""
    with pytest.raises(ConfigurationError, match=f"{name} takes a number of seconds from 0 up"):
        Settings.of({name: value})
    assert getattr(Settings.of({name: 0}), name) == 0


@pytest.mark.parametrize("name", ["failure_threshold", "max_fallback_reads"])
@pytest.mark.parametrize("value", ["3", True, 0, -1, 1.5])
def test_counts(name: str, value: Any) -> None:
    """A count is a whole number from one up."""
    with pytest.raises(ConfigurationError, match=f"{name} takes a whole number from 1 up"):
        Settings.of({name: value})
    assert getattr(Settings.of({name: 1}), name) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"consistency": "causal"}, "consistency takes a Consistency"),
        ({"on_fallback_limit": "primary"}, 'on_fallback_limit takes "wait", "stale" or "error"'),
        ({"on_lost_write": "raise"}, 'on_lost_write takes "report" or "error"'),
        ({"on_event": "print"}, "on_event takes a callable"),
        ({"weights": ["a"]}, "weights takes a mapping"),
        ({"pool_options": 5}, "pool_options takes a mapping"),
        ({"weights": {"a": 0}}, "the weight of 'a' takes a positive number"),
        ({"weights": {"a": -1.0}}, "the weight of 'a' takes a positive number"),
        ({"pin_seconds": 1.0, "max_lag_seconds": 1.5}, "raise pin_seconds or lower"),
        ({"failure_threshold": None}, "failure_threshold takes a whole number"),
    ],
)
def test_what_cannot_work_says_what_to_do(options: dict[str, Any], said: str) -> None:
    """Each message names its option."""
    with pytest.raises(ConfigurationError, match=said):
        Settings.of(options)


def test_a_pin_as_long_as_the_lag_is_enough() -> None:
    """When a pin ends, every replica within the bound shows what the pin stood for."""
    assert Settings.of({"pin_seconds": 1.5, "max_lag_seconds": 1.5}).pin_seconds == 1.5


def test_an_unknown_option_suggests_the_nearest() -> None:
    """A typing error finds its option; nonsense gets the list."""
    with pytest.raises(ConfigurationError, match="did you mean max_lag_seconds"):
        Settings.of({"max_lag_second": 1})
    with pytest.raises(ConfigurationError, match="unknown option 'zzz' Known: connect_timeout"):
        Settings.of({"zzz": 1})


# Nodes


def test_nodes_are_named_in_order() -> None:
    """The primary first; replicas by their names, or numbered."""
    assert {"primary": "p", "eu": "a", "us": "b"} == name_nodes("p", {"eu": "a", "us": "b"})
    assert {"primary": "p", "replica_1": "a", "eu": "b"} == name_nodes("p", ["a", ("eu", "b")])
    assert ["primary", "eu"] == list(name_nodes("p", {"eu": "a"}))
    assert {"primary": "p"} == name_nodes("p", ())


@pytest.mark.parametrize(
    ("primary", "replicas", "said"),
    [
        (None, (), "no primary: pass primary="),
        ("", (), "no primary"),
        ("p", [("eu", "a"), ("eu", "b")], "two nodes are named 'eu'"),
        ("p", {"primary": "a"}, "two nodes are named 'primary'"),
        ("p", [("replica_2", "a"), "b"], "two nodes are named 'replica_2'"),
        ("p", {"": "a"}, "non-empty string"),
        ("p", {5: "a"}, "non-empty string"),
        ("p", {"eu": ""}, "replica 'eu' has no conninfo"),
        ("p", "host=a", "replicas takes a mapping"),
        ("p", b"host=a", "replicas takes a mapping"),
        ("p", 5, "replicas takes a mapping"),
    ],
)
def test_nodes_that_cannot_work(primary: Any, replicas: Any, said: str) -> None:
    """No primary, a name given twice, a name or conninfo that is none."""
    with pytest.raises(ConfigurationError, match=said):
        name_nodes(primary, replicas)


def test_weights_name_nodes() -> None:
    """A weight for a node that is not there is a typing error."""
    check_weights({"eu": 1.0}, ["primary", "eu"])
    with pytest.raises(ConfigurationError, match="weights names 'us'"):
        check_weights({"us": 1.0}, ["primary", "eu"])
