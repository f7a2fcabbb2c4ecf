"""
The causal state of one client in one unit of work.

A session holds the client's token. It lives in a context variable as one mutable object that is
set once: what a thread, a child task or code below another middleware advances is seen by the
code that opened the session. Rebinding the variable there would be lost.

This module knows nothing of nodes, connections or HTTP.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeAlias

from lsn_consistency.lsn import Position
from lsn_consistency.route import Route
from lsn_consistency.tokens import Token, TokenCodec

DEFAULT_HEADER_NAME = "X-Consistency-Token"

_EMPTY = Token()


class Session:
    """
    Hold the token of one client during one unit of work: a request, a job, a script.

    The token only advances; the one exception is `reissue`. ``with Session(token):`` makes it the
    session of the block; threads and tasks that inherit the context share it, and any of them may
    advance it.

    ``node`` is the replica that the unit of work reads from until it fails or the session
    advances past it. ``accessed`` tells whether a routed operation consulted the session,
    ``wrote`` whether a position of a write was put into it, ``last_route`` where the last read of
    the session went. ``codec`` and ``header_name`` are
    what `inject` and `extract` use when they are given none.
    """

    __slots__ = (
        "_lock",
        "_token",
        "accessed",
        "choice",
        "codec",
        "header_name",
        "last_route",
        "node",
        "on_advance",
        "wrote",
    )

    def __init__(
        self,
        token: Token | None = None,
        *,
        codec: TokenCodec | None = None,
        header_name: str = DEFAULT_HEADER_NAME,
    ) -> None:
        self._token = token or _EMPTY
        self._lock = threading.Lock()
        self.codec = codec
        self.header_name = header_name
        self.node: str | None = None
        self.last_route: Route | None = None
        self.accessed = False
        # What the router remembers of the last choice, to take it again at once.
        self.choice: Any = None
        self.wrote = False
        # Called after each advance with the new token; it must not block.
        self.on_advance: Callable[[Token], None] | None = None

    @property
    def token(self) -> Token:
        """
        Return the token: what this client wrote, and at ``CAUSAL`` and ``STRONG`` what it saw.
        """
        return self._token

    def advance(self, token: Token) -> None:
        """
        Merge ``token`` into the session; positions that it already holds change nothing.

        Safe to call from any thread or task.
        """
        self._change(lambda held: held.merge(token))

    def reissue(self, lost: Position, position: Position) -> None:
        """
        Put ``position`` in the place of ``lost``, which no server has any more.

        A session that has moved on from ``lost`` meanwhile advances instead.
        """

        def reissued(held: Token) -> Token:
            still_held = held.get(lost.system_id) == lost
            kept = held.without(lost.system_id) if still_held else held
            return kept.merge(Token([position]))

        self._change(reissued)

    def pin(self, until: float) -> None:
        """
        Send the reads of this session to the primary until the Unix time ``until``.
        """
        self.advance(Token(pin_until=until))

    def _change(self, changed: Callable[[Token], Token]) -> None:
        with self._lock:
            token = changed(self._token)
            if token is self._token:
                return
            self._token = token
        if self.on_advance is not None:
            self.on_advance(token)

    def __enter__(self) -> Session:
        _current.set((self, _current.get()))
        return self

    def __exit__(self, *exc_info: object) -> None:
        block = _current.get()
        while block is not None and block[0] is not self:
            block = block[1]
        # A block that is left in another context than it was entered in, as the two halves of a
        # generator dependency in a thread pool are, finds nothing to undo.
        if block is not None:
            _current.set(block[1])

    def __repr__(self) -> str:
        return f"<Session {self._token!r}>"


# A session and the block around its own: in the context, so that tasks can share one session's
# blocks. A plain tuple, because one is made for each request.
_Block: TypeAlias = tuple[Session, "_Block | None"]

_current: ContextVar[_Block | None] = ContextVar("lsn_consistency_session", default=None)


def current_session() -> Session:
    """
    Return the session of this context; the first call of a context without one opens it.

    The middleware opens one for every request. Elsewhere open one around each unit of work with
    ``with Session():``, before threads or tasks are started: a session that a child task opens
    by itself is not seen by its parent.
    """
    block = _current.get()
    if block is None:
        block = (Session(), None)
        _current.set(block)
    return block[0]
