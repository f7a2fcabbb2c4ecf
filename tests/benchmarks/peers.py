"""
The routers of others, installed and set up as their documentation says, without a database.

Each peer answers one question: which database serves this read? What would need a server is
stubbed so that it costs the peer nothing, and its ``note`` says what. Every peer has two replicas.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

DATABASES = ("default", "replica_1", "replica_2")
_URL = "postgresql+psycopg://127.0.0.1:1/{}"


@dataclass(frozen=True, slots=True)
class Peer:
    """
    Hold one peer's way to decide where a read goes.
    """

    distribution: str
    call: str
    decide: Callable[[], Any]
    note: str

    @property
    def label(self) -> str:
        """
        Name the peer with its release.
        """
        return f"{self.distribution} {version(self.distribution)} {self.call}"


def routing_peers() -> list[Peer]:
    """
    Return all peers, warm: each has decided before.
    """
    peers = [djanorm(), multidb(), replicated(), advanced_alchemy(), sqlalchemy_recipe()]
    for peer in peers:
        assert peer.decide() is not None
    return peers


def djanorm(replicas: Iterable[str] = DATABASES[1:]) -> Peer:
    """
    Stub the probe: it would be one query per replica every ``cache_seconds``; here it is free.
    """
    from dorm.contrib.lag_router import LagAwareReadRouter

    class Router(LagAwareReadRouter):  # type: ignore[misc]
        def _measure_lag(self, alias: str) -> float | None:
            return 0.0

    logging.getLogger("dorm").setLevel(logging.CRITICAL)
    router = Router(primary="default", replicas=list(replicas))
    return Peer(
        "djanorm",
        "LagAwareReadRouter.db_for_read",
        partial(router.db_for_read, None),
        "its probe is replaced by a lag of 0.0 and costs nothing; its cache is warm",
    )


def multidb() -> Peer:
    """
    Stub nothing: it asks no server, and whether the thread is pinned is a thread-local.
    """
    _configure_django()
    from multidb import PinningReplicaRouter

    router = PinningReplicaRouter()
    return Peer(
        "django-multidb-router",
        "PinningReplicaRouter.db_for_read",
        partial(router.db_for_read, None),
        "not pinned; no server is ever asked, the thread-local flag alone decides",
    )


def replicated() -> Peer:
    """
    Stub the liveness check of a request's first read; the replica stays chosen for the request.
    """
    _configure_django()
    from django_replicated.router import ReplicationRouter

    class Router(ReplicationRouter):  # type: ignore[misc]
        def is_alive(self, db_name: str) -> bool:
            return True

    router = Router()
    router.init("slave")
    return Peer(
        "django-replicated",
        "ReplicationRouter.db_for_read",
        partial(router.db_for_read, None),
        "a later read of a request: the replica is chosen, its liveness check is replaced by True",
    )


def advanced_alchemy() -> Peer:
    """
    Stub nothing: its engines are made and never connected.
    """
    from advanced_alchemy.config.routing import RoutingConfig
    from advanced_alchemy.routing import RoutingSyncSessionMaker
    from sqlalchemy import select, text

    config = RoutingConfig(
        primary_connection_string=_URL.format(DATABASES[0]),
        read_replicas=[_URL.format(name) for name in DATABASES[1:]],
    )
    session = RoutingSyncSessionMaker(routing_config=config)()
    statement = select(text("1"))
    return Peer(
        "advanced-alchemy",
        "RoutingSyncSession.get_bind",
        partial(session.get_bind, clause=statement),
        "engines that are never connected; the session and the statement are made beforehand",
    )


def sqlalchemy_recipe() -> Peer:
    """
    Follow "Custom Vertical Partitioning" of SQLAlchemy's documentation, for one class less.
    """
    from sqlalchemy import Delete, Update, create_engine, select, text
    from sqlalchemy.orm import Session

    engines = {
        "leader": create_engine(_URL.format(DATABASES[0])),
        "follower1": create_engine(_URL.format(DATABASES[1])),
        "follower2": create_engine(_URL.format(DATABASES[2])),
    }

    class RoutingSession(Session):  # type: ignore[misc]
        def get_bind(self, mapper: Any = None, clause: Any = None, **kw: Any) -> Any:
            if self._flushing or isinstance(clause, (Update, Delete)):
                return engines["leader"]
            else:
                return engines[random.choice(["follower1", "follower2"])]

    session = RoutingSession()
    statement = select(text("1"))
    return Peer(
        "SQLAlchemy",
        "RoutingSession recipe",
        partial(session.get_bind, clause=statement),
        "engines that are never connected; the recipe's branch for another class is left out",
    )


def _configure_django() -> None:
    from django.conf import settings
    from django_replicated import settings as replicated_defaults

    if settings.configured:
        return
    defaults = {name: value for name, value in vars(replicated_defaults).items() if name.isupper()}
    settings.configure(
        DATABASES={name: {"ENGINE": "django.db.backends.dummy"} for name in DATABASES},
        **{
            **defaults,
            "REPLICA_DATABASES": list(DATABASES[1:]),
            "REPLICATED_DATABASE_SLAVES": list(DATABASES[1:]),
        },
    )
