"""
What the blocking and the async router share as objects: their options, their state, their nodes.
"""

from __future__ import annotations

import logging
import math
import os
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

import psycopg
from psycopg.conninfo import make_conninfo

from lsn_consistency._core import POOL_TIMEOUT_SECONDS, Core, Facts
from lsn_consistency._monitor import Connect
from lsn_consistency._settings import Settings, check_weights, name_nodes
from lsn_consistency._snapshot import snapshot
from lsn_consistency._steps import METHODS
from lsn_consistency.events import Event
from lsn_consistency.exceptions import ConfigurationError

RECONNECT_SECONDS: Final = 0.5
"""How long a pool goes on with an attempt to connect that has failed."""

_logger = logging.getLogger("lsn_consistency")
_routers: weakref.WeakSet[BaseRouter] = weakref.WeakSet()

# Connections inherited over a fork belong to the parent: closing or collecting them here would end
# the parent's sessions, so they are kept until the process ends.
_inherited: list[object] = []


class BaseRouter:
    """
    Hold a router's options and the state that both kinds have.
    """

    _pool_types: ClassVar[tuple[type, ...]]

    def __init__(self, primary: Any, replicas: Any, options: Mapping[str, Any]) -> None:
        self._settings = Settings.of(options)
        self._sources: dict[str, Any] = name_nodes(primary, replicas)
        check_weights(self._settings.weights, self._sources)
        for name, source in self._sources.items():
            self._check_source(name, source)
        self._check_pool_options()
        self._methods = {kind: getattr(self, name) for kind, name in METHODS.items()}
        self._core: Core | None = None
        self._pools: dict[str, Any] = {}
        self._inherited_names: list[str] = []
        _routers.add(self)

    @property
    def settings(self) -> Settings:
        """
        Return the validated options.
        """
        return self._settings

    def emit(self, event: Event) -> None:
        """
        Hand an event to the ``on_event`` hook; what the hook raises is logged.
        """
        hook = self._settings.on_event
        if hook is None:
            return
        try:
            hook(event)
        except Exception:
            _logger.exception("the on_event hook failed for %r", event)

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """
        Describe every node by name, the primary too, from memory; no I/O.

        ``role`` as last observed; ``healthy``: observed, with no failure since; ``lag_seconds``
        and where it comes from, ``lag_source``; ``replay_lsn`` (the insert position of a primary)
        and its ``timeline``; ``checked_at`` (Unix time); ``breaker`` (``"closed"``/``"open"``),
        ``consecutive_failures``, ``last_error``; ``reads_in_flight``; ``servers`` seen behind the
        endpoint; ``pooled``: a pooler stands between.
        """
        core = self._running()
        return snapshot(core.cluster, core.clock(), core.unix_clock())

    def _running(self) -> Core:
        if self._core is None and self._inherited_names:
            raise self._inherited_pool()
        if self._core is None:
            raise ConfigurationError(
                "the router is not open: use it as a context manager, call open(), or pass "
                "lifespan=router.lifespan to the application"
            )
        return self._core

    def _new_core(self, kick: Callable[[str], None]) -> Core:
        return Core(
            self._sources,
            self._settings,
            given=[name for name in self._sources if self._is_given(name)],
            pool_timeouts={name: self._pool_timeout(name) for name in self._sources},
            clock=time.monotonic,
            unix_clock=time.time,
            emit=self.emit,
            kick=kick,
            warn=_logger.warning,
            listens=self._settings.on_event is not None,
        )

    def _open_given(self, name: str) -> Any:
        pool = self._sources[name]
        if self._inherited_names:
            raise self._inherited_pool()
        if pool.closed:
            raise ConfigurationError(
                f"the pool of {name!r} is not open: open it before the router, in this process"
            )
        return pool

    def _inherited_pool(self) -> ConfigurationError:
        names = ", ".join(self._inherited_names)
        return ConfigurationError(
            f"the pool of {names} was opened before a fork and belongs to the parent process: "
            "give the router a conninfo, or make pool and router in each process"
        )

    def _explained(self, name: str, error: Exception) -> str:
        last = self._core.cluster.nodes[name].last_error if self._core is not None else None
        return f"{error} from {name}" + (f": {last}" if last else "")

    def _is_given(self, name: str) -> bool:
        return not isinstance(self._sources[name], str)

    def _pool_timeout(self, name: str) -> float:
        if self._is_given(name):
            return float(self._sources[name].timeout)
        return float(self._settings.pool_options.get("timeout", POOL_TIMEOUT_SECONDS))

    def _pool_arguments(self, name: str, configure: Callable[[Any], Any]) -> dict[str, Any]:
        options = dict(self._settings.pool_options)
        kwargs = {**self._default_kwargs(), **(options.pop("kwargs", None) or {})}
        options.setdefault("name", f"lsn_consistency {name}")
        # The monitor knows when a node is well again, and then a connection is opened when it is
        # needed: a pool's own attempts come at times that double.
        options.setdefault("reconnect_timeout", RECONNECT_SECONDS)
        options["configure"] = configure
        return {"conninfo": self._sources[name], "open": False, "kwargs": kwargs, **options}

    def _default_kwargs(self) -> dict[str, Any]:
        return {"connect_timeout": max(1, math.ceil(self._settings.connect_timeout))}

    def _fit_to_pooler(self, conn: Any, facts: Facts) -> None:
        # A pooler gives the next transaction another server, which has not prepared anything. What
        # the user has asked for stays: newer poolers can follow prepared statements.
        kwargs = self._settings.pool_options.get("kwargs") or {}
        if facts.pooled and not callable(kwargs) and "prepare_threshold" not in kwargs:
            conn.prepare_threshold = None

    def _monitor_connect(self, name: str) -> Connect:
        source = self._sources[name]
        if isinstance(source, str):
            conninfo: Any = source
            kwargs: Any = self._settings.pool_options.get("kwargs") or {}
        else:
            conninfo, kwargs = source.conninfo, source.kwargs or {}

        async def connect(*, replication: bool = False) -> psycopg.AsyncConnection[Any]:
            parameters = await _resolved(kwargs)
            parameters = {**self._default_kwargs(), **_libpq_parameters(parameters)}
            parameters["application_name"] = "lsn_consistency"
            if replication:
                parameters["replication"] = "database"
            text = make_conninfo(await _resolved(conninfo) or "", **parameters)
            return await psycopg.AsyncConnection.connect(text, autocommit=True)

        return connect

    def _check_source(self, name: str, source: Any) -> None:
        if isinstance(source, str):
            try:
                make_conninfo(source)
            except psycopg.Error as error:
                raise ConfigurationError(f"the conninfo of {name!r} is not one: {error}") from None
        elif not isinstance(source, self._pool_types):
            wanted = self._pool_types[0].__name__
            raise ConfigurationError(
                f"node {name!r} takes a conninfo or an open psycopg_pool.{wanted}, "
                f"not {type(source).__name__}"
            )

    def _check_pool_options(self) -> None:
        for name in ("conninfo", "open"):
            if name in self._settings.pool_options:
                raise ConfigurationError(f"pool_options cannot set {name!r}: the router does")

    def _after_fork(self) -> None:
        _inherited.append((self._core, self._pools))
        self._core = None
        self._pools = {}
        # A pool has threads, or tasks, of its own, which a fork does not copy.
        self._inherited_names = [
            name
            for name, source in self._sources.items()
            if self._is_given(name) and not source.closed
        ]


def _after_fork_in_child() -> None:
    for router in list(_routers):
        router._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


async def _resolved(value: Any) -> Any:
    # psycopg_pool takes a callable, or an async one, for conninfo and kwargs.
    if callable(value):
        value = value()
        if hasattr(value, "__await__"):
            value = await value
    return value


_CONNECTION_ARGUMENTS = frozenset(
    {"autocommit", "context", "cursor_factory", "prepare_threshold", "row_factory"}
)


def _libpq_parameters(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in _CONNECTION_ARGUMENTS}
