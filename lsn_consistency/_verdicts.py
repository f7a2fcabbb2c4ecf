"""
What the decision is asked, and what it answers: plain data.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from typing import NamedTuple

from lsn_consistency._nodes import Node
from lsn_consistency._shortlist import Candidate, Shortlist
from lsn_consistency.consistency import Consistency
from lsn_consistency.exceptions import RoutingError
from lsn_consistency.lsn import Lsn, Position
from lsn_consistency.route import Reason, Route
from lsn_consistency.tokens import Token


class Lost(NamedTuple):
    """
    Name a position that the primary's log does not have, and where that log left its timeline.

    ``switch_point`` is the end of the primary's log where the timeline is its own, and None where
    its log never was on that timeline.
    """

    position: Position
    timeline: int
    switch_point: Lsn | None


@dataclass(slots=True)
class Read:
    """
    Hold what one read asks for, and what became of its attempts.

    ``began`` is a moment before which its token was known already. ``excluded`` nodes have
    failed. Of a ``refused`` one the connections that were tried could not serve; it may be tried
    again after a wait.
    """

    level: Consistency
    token: Token
    lag_limit: float
    wait_seconds: float
    began: float = math.inf
    preferred: str | None = None
    excluded: Set[str] = frozenset()
    refused: Set[str] = frozenset()
    refusals: tuple[str, ...] = ()
    waiting_since: float | None = None
    waited: bool = False
    waited_seconds: float = 0.0
    refreshed: bool = False
    compared: bool = False
    primary_error: BaseException | None = None

    @property
    def is_new(self) -> bool:
        """
        Tell that nothing was tried for it yet.
        """
        tried = self.excluded or self.refused or self.refreshed or self.compared
        return not tried and self.waiting_since is None and self.primary_error is None

    def wait_from(self, now: float) -> float:
        """
        Begin to wait, if that has not happened yet, and return the time that is left for it.
        """
        if self.waiting_since is None:
            self.waiting_since = now
        return self.waiting_since + self.wait_seconds - now

    def wait_until(self, now: float) -> None:
        """
        Take that a wait has ended, for now or with its time.
        """
        since = now if self.waiting_since is None else self.waiting_since
        self.waited_seconds = now - since
        self.waited = now >= since + self.wait_seconds

    def refuse(self, name: str, times: int = 1) -> None:
        """
        Leave out a node whose connections that were tried could not serve.
        """
        self.refused = self.refused | {name}
        self.refusals += (name,) * times

    def readmit(self, limit: int) -> None:
        """
        Let nodes that were refused less than ``limit`` times be tried again.
        """
        self.refused = {name for name in self.refused if self.refusals.count(name) >= limit}


class Serve(NamedTuple):
    """
    Take a connection of ``node``.

    ``required`` is what its server must have reached. ``ask`` says that only an observation on
    that connection can tell, ``stale`` that the read may be stale, ``primary`` that the node
    serves as the primary. ``lost`` is what the token asks for and the primary does not have.
    """

    node: Node
    reason: Reason
    lag_seconds: float | None = None
    required: Position | None = None
    ask: bool = False
    stale: bool = False
    primary: bool = False
    lost: Lost | None = None


@dataclass(slots=True)
class Choice:
    """
    Take a connection of ``candidate``, for which nothing had to be asked or tried.

    It holds for reads at ``level`` with ``token`` for as long as ``shortlist`` is the newest, up to
    ``until``; ``required`` is what the candidate has replayed for them.
    """

    shortlist: Shortlist
    level: Consistency
    token: Token
    until: float
    route: Route
    candidate: Candidate
    required: Position | None

    def verdict(self, now: float) -> Serve:
        """
        Return it as a decision says it.
        """
        lag = now - self.candidate.moment
        return Serve(self.candidate.node, self.route.reason, lag, self.required)


class Wait(NamedTuple):
    """
    Wait for a replica to reach ``required``.
    """

    required: Position


class Refresh(NamedTuple):
    """
    Get a new observation of each of these nodes, one after the other.

    ``compare`` says that what the first one follows is to be told from the roles of the others.
    """

    names: tuple[str, ...]
    compare: bool = False


class Fail(NamedTuple):
    """
    Raise ``error``.
    """

    error: RoutingError


Verdict = Serve | Wait | Refresh | Fail
