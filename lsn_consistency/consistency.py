"""
The consistency levels, and the block or decorator that sets one.

A level says what a read promises. It is chosen per call, else by the innermost block, else by
the router. This module knows nothing of nodes, tokens or connections.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

from lsn_consistency.exceptions import ConfigurationError

_Function = TypeVar("_Function", bound=Callable[..., Any])

_TOKEN_LEVELS = frozenset({"causal", "read_your_writes"})
# What the primary has shown, a later causal read must not miss.
_ADVANCING_LEVELS = frozenset({"causal", "strong"})


@dataclass(frozen=True, slots=True)
class Consistency:
    """
    Say what a read promises; use the constants and the two constructors below.

    * ``STRONG``: served by the primary; causal reads that follow do not go back behind it.
    * ``CAUSAL``: read your writes, monotonic reads, writes follow reads, monotonic writes, and
      a bound on the lag. The terms are those of Terry et al., "Session Guarantees for Weakly
      Consistent Replicated Data" (1994).
    * ``READ_YOUR_WRITES``: own writes and the lag bound; reads do not advance the token.
    * ``bounded(seconds)``: no token; data at most that old.
    * ``EVENTUAL``: any healthy replica.
    * ``sticky(seconds)``: the primary for that long after a write; needs no LSN.
    """

    name: str
    seconds: float | None = None
    uses_token: bool = field(init=False, repr=False, compare=False)
    """Whether a read at this level must reach the session's position."""
    advances_on_reads: bool = field(init=False, repr=False, compare=False)
    """Whether a read at this level moves the session past what it can have seen."""

    STRONG: ClassVar[Consistency]
    CAUSAL: ClassVar[Consistency]
    READ_YOUR_WRITES: ClassVar[Consistency]
    EVENTUAL: ClassVar[Consistency]

    def __post_init__(self) -> None:
        object.__setattr__(self, "uses_token", self.name in _TOKEN_LEVELS)
        object.__setattr__(self, "advances_on_reads", self.name in _ADVANCING_LEVELS)

    @classmethod
    def bounded(cls, seconds: float) -> Consistency:
        """
        Promise data at most ``seconds`` old, whatever the client wrote or saw.

        Raises `ConfigurationError` unless ``seconds`` is a positive, finite number.
        """
        return cls("bounded", _positive("Consistency.bounded", seconds))

    @classmethod
    def sticky(cls, seconds: float) -> Consistency:
        """
        Promise the primary for ``seconds`` after a write of the session, then any healthy replica.

        It reads no LSN, so it also works where the server hides its WAL functions; it is stale
        whenever a replica lags for longer than ``seconds``. The level must be in force for the
        write too, which is what starts the time: set it for the router, or for a block around both.

        Raises `ConfigurationError` unless ``seconds`` is a positive, finite number.
        """
        return cls("sticky", _positive("Consistency.sticky", seconds))

    def lag_limit(self, default: float) -> float:
        """
        Return the greatest lag in seconds at which a replica may serve this level.

        ``default`` is the router's ``max_lag_seconds``; levels without a bound give infinity.
        """
        if self.name in _TOKEN_LEVELS:
            return default
        if self.name == "bounded" and self.seconds is not None:
            return self.seconds
        return math.inf

    def __str__(self) -> str:
        return self.name if self.seconds is None else f"{self.name}({self.seconds:g})"


Consistency.STRONG = Consistency("strong")
Consistency.CAUSAL = Consistency("causal")
Consistency.READ_YOUR_WRITES = Consistency("read_your_writes")
Consistency.EVENTUAL = Consistency("eventual")


class _Block(NamedTuple):
    """
    Remember what held before; in the context, so that tasks can share one `consistency`.
    """

    owner: consistency
    level: Consistency
    outer: _Block | None


innermost: ContextVar[_Block | None] = ContextVar("lsn_consistency_level", default=None)


def _positive(what: str, seconds: float) -> float:
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, (int, float))
        or not math.isfinite(seconds)
        or seconds <= 0
    ):
        raise ConfigurationError(f"{what} takes a positive number of seconds, not {seconds!r}")
    return float(seconds)


def effective(per_call: Consistency | None, per_router: Consistency) -> Consistency:
    """
    Return the level in force: the call's own, else the innermost block's, else the router's.
    """
    if per_call is not None:
        return per_call
    block = innermost.get()
    return per_router if block is None else block.level


class consistency:
    """
    Set the level for a block, or for every call of a function.

    ``with consistency(Consistency.STRONG): ...`` covers the reads of the block, those of tasks
    started inside it too. ``@consistency(Consistency.STRONG)`` does the same for a function or a
    coroutine function. Blocks nest, and one object may serve several tasks and threads at once.

    Raises `ConfigurationError` for anything that is not a `Consistency`, and for generators.
    """

    def __init__(self, level: Consistency) -> None:
        if not isinstance(level, Consistency):
            raise ConfigurationError(
                f"consistency() takes a Consistency such as Consistency.STRONG, not {level!r}"
            )
        self._level = level

    def __enter__(self) -> Consistency:
        innermost.set(_Block(self, self._level, innermost.get()))
        return self._level

    def __exit__(self, *exc_info: object) -> None:
        block = innermost.get()
        while block is not None and block.owner is not self:
            block = block.outer
        if block is not None:
            innermost.set(block.outer)

    def __call__(self, function: _Function) -> _Function:
        """
        Return ``function`` with the level in force during each of its calls.
        """
        level = self._level
        wrapper: Any
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            raise ConfigurationError(
                f"@consistency cannot wrap the generator {function!r}: its body runs in the "
                "context of whoever iterates it; use 'with consistency(...)' inside"
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                with consistency(level):
                    return await function(*args, **kwargs)
        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with consistency(level):
                    return function(*args, **kwargs)

        result: _Function = wrapper
        return result
