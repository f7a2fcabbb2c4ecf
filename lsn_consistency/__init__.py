"""
Read from PostgreSQL replicas without ever reading stale.

After a write the client holds a signed token with the write's LSN; a read goes to a replica only
when that replica has replayed it.
"""

from lsn_consistency import events, exceptions
from lsn_consistency.consistency import Consistency, consistency
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
from lsn_consistency.middleware import ConsistencyMiddleware
from lsn_consistency.propagation import extract, inject
from lsn_consistency.route import Reason, Route
from lsn_consistency.router import Router
from lsn_consistency.router_async import AsyncRouter
from lsn_consistency.session import Session, current_session
from lsn_consistency.tokens import Token, TokenCodec

__version__ = "0.1.0"

__all__ = [
    "AsyncRouter",
    "BadSignatureError",
    "ConfigurationError",
    "Consistency",
    "ConsistencyMiddleware",
    "FallbackLimitError",
    "InvalidLsnError",
    "LostWriteError",
    "Lsn",
    "LsnConsistencyError",
    "MalformedTokenError",
    "NoNodeAvailableError",
    "Position",
    "Reason",
    "ReplayTimeoutError",
    "Route",
    "Router",
    "RoutingError",
    "Session",
    "Token",
    "TokenCodec",
    "TokenError",
    "TokenExpiredError",
    "__version__",
    "consistency",
    "current_session",
    "events",
    "exceptions",
    "extract",
    "inject",
]
