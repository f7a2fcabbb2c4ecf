"""
The options of a router, validated once.

Blocking and async routers take the same options: `RouterOptions` types them for editors,
`Settings` holds them with their defaults. Both lists are held together by a test.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

from lsn_consistency.consistency import Consistency
from lsn_consistency.events import EventHook
from lsn_consistency.exceptions import ConfigurationError

PRIMARY_NAME = "primary"

FallbackAction = Literal["wait", "stale", "error"]
LostWriteAction = Literal["report", "error"]


class RouterOptions(TypedDict, total=False):
    """
    Name the keyword options of `Router` and `AsyncRouter`; see docs/reference for each.
    """

    max_lag_seconds: float
    wait_seconds: float
    consistency: Consistency
    poll_interval: float
    probe_timeout: float
    connect_timeout: float
    open_timeout: float
    pin_seconds: float
    failure_threshold: int
    weights: Mapping[str, float]
    max_fallback_reads: int | None
    on_fallback_limit: FallbackAction
    fallback_wait_seconds: float
    hedge_share: float
    on_lost_write: LostWriteAction
    pool_options: Mapping[str, Any]
    on_event: EventHook | None


@dataclass(frozen=True, slots=True)
class Settings:
    """
    Hold the validated options; times are seconds.
    """

    max_lag_seconds: float = 2.0
    """The lag at which a replica stops serving reads, the age of the observation included."""
    wait_seconds: float = 0.1
    """How long a read waits for a replica to reach its token."""
    consistency: Consistency = Consistency.CAUSAL
    poll_interval: float = 0.5
    """Time between two probes of a node while no read waits for it."""
    probe_timeout: float = 1.0
    """A probe that takes longer is a failure."""
    connect_timeout: float = 2.0
    """How long a read tries to get a connection to one node before it goes to another."""
    open_timeout: float = 5.0
    """How long ``open()`` waits for the first observation of each node."""
    pin_seconds: float = 5.0
    """How long a session reads from the primary when a position could not be taken."""
    failure_threshold: int = 3
    """This many failures in a row open a node's breaker."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Share of the reads by replica name; 1.0 where it is not given."""
    max_fallback_reads: int | None = None
    """How many fallback reads the primary serves at once; None for no limit."""
    on_fallback_limit: FallbackAction = "wait"
    fallback_wait_seconds: float = 1.0
    """How long ``on_fallback_limit="wait"`` waits before it raises."""
    hedge_share: float = 0.05
    """How many of the reads with ``hedge_after`` may ask a second replica, from 0 to 1."""
    on_lost_write: LostWriteAction = "report"
    """What a read does whose token's write may be lost: emit `LostWrite`, or raise as well."""
    pool_options: Mapping[str, Any] = field(default_factory=dict)
    """Passed to the pools that the router makes: ``min_size``, ``kwargs``, ``configure``, ..."""
    on_event: EventHook | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """
        Return validated settings.

        Raises `ConfigurationError` that names the option and says what it takes.
        """
        known = {each.name for each in fields(cls)}
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, sorted(known), n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ConfigurationError(
                    f"unknown option {name!r}{hint} Known: {', '.join(sorted(known))}"
                )
        settings = cls(**options)
        settings._validate()
        return settings

    def _validate(self) -> None:
        for name in _POSITIVE:
            _number(name, getattr(self, name), zero=False)
        for name in _NOT_NEGATIVE:
            _number(name, getattr(self, name), zero=True)
        if not isinstance(self.consistency, Consistency):
            raise ConfigurationError(
                f"consistency takes a Consistency such as Consistency.CAUSAL, "
                f"not {self.consistency!r}"
            )
        if self.on_fallback_limit not in ("wait", "stale", "error"):
            raise ConfigurationError(
                'on_fallback_limit takes "wait", "stale" or "error", '
                f"not {self.on_fallback_limit!r}"
            )
        if self.on_lost_write not in ("report", "error"):
            raise ConfigurationError(
                f'on_lost_write takes "report" or "error", not {self.on_lost_write!r}'
            )
        if not _is_number(self.hedge_share) or not 0 <= self.hedge_share <= 1:
            raise ConfigurationError(
                f"hedge_share takes a share from 0 to 1, not {self.hedge_share!r}"
            )
        _count("failure_threshold", self.failure_threshold)
        if self.max_fallback_reads is not None:
            _count("max_fallback_reads", self.max_fallback_reads)
        if self.pin_seconds < self.max_lag_seconds:
            raise ConfigurationError(
                f"pin_seconds ({self.pin_seconds:g}) is below max_lag_seconds "
                f"({self.max_lag_seconds:g}): a replica could still miss a write when its pin "
                "ends; raise pin_seconds or lower max_lag_seconds"
            )
        if self.on_event is not None and not callable(self.on_event):
            raise ConfigurationError(f"on_event takes a callable, not {self.on_event!r}")
        for name in ("weights", "pool_options"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigurationError(f"{name} takes a mapping, not {getattr(self, name)!r}")
        for name, weight in self.weights.items():
            _number(f"the weight of {name!r}", weight, zero=False)


_POSITIVE = (
    "max_lag_seconds",
    "poll_interval",
    "probe_timeout",
    "connect_timeout",
    "open_timeout",
    "pin_seconds",
)
_NOT_NEGATIVE = ("wait_seconds", "fallback_wait_seconds")


def check_seconds(name: str, value: Any) -> None:
    """
    Raise `ConfigurationError` for an argument that is no number of seconds from 0 up.
    """
    _number(name, value, zero=True)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _number(name: str, value: Any, *, zero: bool) -> None:
    if not _is_number(value) or value < 0 or (value == 0 and not zero):
        wanted = "a number of seconds from 0 up" if zero else "a positive number"
        raise ConfigurationError(f"{name} takes {wanted}, not {value!r}")


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} takes a whole number from 1 up, not {value!r}")


def name_nodes(primary: Any, replicas: Any) -> dict[str, Any]:
    """
    Return every node's conninfo or pool by name, the primary first.

    ``replicas`` is a mapping of names, or an iterable whose items are conninfos or pools (named
    ``replica_1``, ``replica_2``, ...) or pairs of a name and one of these.

    Raises `ConfigurationError` without a primary, and for a name that is empty or given twice.
    """
    if not primary:
        raise ConfigurationError(
            'no primary: pass primary="host=... dbname=..." or an open psycopg_pool pool'
        )
    nodes = {PRIMARY_NAME: primary}
    for name, source in _named(replicas):
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"a replica's name is a non-empty string, not {name!r}")
        if name in nodes:
            raise ConfigurationError(
                f"two nodes are named {name!r}: give each replica a name of its own "
                f"({PRIMARY_NAME!r} is the primary's)"
            )
        if not source:
            raise ConfigurationError(f"replica {name!r} has no conninfo: pass one, or leave it out")
        nodes[name] = source
    return nodes


def _named(replicas: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(replicas, Mapping):
        return replicas.items()
    if isinstance(replicas, (str, bytes)) or not isinstance(replicas, Iterable):
        raise ConfigurationError(
            f'replicas takes a mapping such as {{"eu": "host=pg1 dbname=shop"}}, not {replicas!r}'
        )
    return [
        each if isinstance(each, tuple) and len(each) == 2 else (f"replica_{number}", each)
        for number, each in enumerate(replicas, start=1)
    ]


def check_weights(weights: Mapping[str, float], nodes: Iterable[str]) -> None:
    """
    Raise `ConfigurationError` for a weight whose name is no node's.
    """
    unknown = sorted(set(weights) - set(nodes))
    if unknown:
        raise ConfigurationError(f"weights names {unknown[0]!r}, which is no node of this router")
