"""
The replicas that a warm decision chooses among, worked out once for each new observation.

Most reads find a primary that answers, replicas on its timeline, and one of them caught up. For
these everything but the read's position and the time is the same until something new is observed:
who is a replica of this system, how far it has replayed, and until when its lag is within the
bound. What is out of the ordinary is left to the whole decision, which a list without candidates
asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from lsn_consistency import _balance
from lsn_consistency._nodes import Node
from lsn_consistency._observation import Observation
from lsn_consistency.lsn import Position
from lsn_consistency.route import Reason, Route

ROUTE_SECONDS: Final = 0.005
"""For how long one `Route` is given to all; its lag is that of the end of this time."""


Routes = tuple[float, Route, Route]
"""Until when both may be given, the one where a position was asked for, and the one where not."""


_NOWHERE: Final = Route("", "replica", Reason.WITHIN_LAG)
_NO_ROUTES: Final[Routes] = (-math.inf, _NOWHERE, _NOWHERE)


class Candidate:
    """
    Hold a replica that has replayed up to ``lsn`` and shows what was there at ``moment``.

    Its lag is within the router's bound up to ``until``; both are times of the monotonic clock.
    """

    __slots__ = ("lsn", "moment", "node", "routes", "seen", "until")

    def __init__(
        self, node: Node, seen: Observation, moment: float, max_lag_seconds: float
    ) -> None:
        self.node = node
        self.seen = seen
        self.lsn: int = -1 if seen.lsn is None else seen.lsn
        self.moment = moment
        self.until = moment + max_lag_seconds
        self.routes = _NO_ROUTES

    def serves(self, lsn: int, now: float) -> bool:
        """
        Tell whether a read that needs ``lsn`` may be served at ``now``.
        """
        return self.lsn >= lsn and now <= self.until

    def renewed(self, now: float) -> Routes:
        """
        Keep and return routes for reads from ``now`` on.
        """
        ends = min(now + ROUTE_SECONDS, self.until)
        lag, name = ends - self.moment, self.node.name
        self.routes = (
            ends,
            Route(name, "replica", Reason.CAUGHT_UP, 0.0, lag),
            Route(name, "replica", Reason.WITHIN_LAG, 0.0, lag),
        )
        return self.routes


class Shortlist:
    """
    Hold the candidates of one system and timeline.
    """

    __slots__ = ("_bounds", "_candidates", "_max_lag_seconds", "by_name", "system_id", "timeline")

    def __init__(
        self,
        system_id: int,
        timeline: int,
        candidates: Iterable[Candidate],
        max_lag_seconds: float,
    ) -> None:
        self.system_id = system_id
        self.timeline = timeline
        self._max_lag_seconds = max_lag_seconds
        self.by_name: Mapping[str | None, Candidate] = {each.node.name: each for each in candidates}
        self._candidates = tuple(self.by_name.values())
        self._bounds = _balance.bounds(self._candidates)

    def with_observed(self, node: Node, seen: Observation, moment: float) -> Shortlist:
        """
        Return the list after a candidate was observed anew in the state that it was in.
        """
        if node.name not in self.by_name:
            return self
        newer = Candidate(node, seen, moment, self._max_lag_seconds)
        changed = object.__new__(Shortlist)
        changed.system_id, changed.timeline = self.system_id, self.timeline
        changed._max_lag_seconds, changed._bounds = self._max_lag_seconds, self._bounds
        changed.by_name = {**self.by_name, node.name: newer}
        changed._candidates = tuple(changed.by_name.values())
        return changed

    def admits(
        self, name: str, required: Position | None, seen: Observation | None, now: float
    ) -> bool:
        """
        Tell whether a candidate, last observed so, serves a read that needs ``required``.
        """
        known = self.by_name.get(name)
        if known is None or known.seen is not seen:
            return False
        if required is None:
            return known.serves(-1, now)
        system_id, timeline, lsn = required
        ours = system_id == self.system_id and timeline == self.timeline
        return ours and known.serves(lsn, now)

    def drawn(self, lsn: int, now: float, random: Callable[[], float]) -> Candidate | None:
        """
        Return one of the candidates that serve a read which needs ``lsn``; None without one.
        """
        if not self._candidates:
            return None
        first, second = _balance.two(self._candidates, self._bounds, random)
        if not (first.serves(lsn, now) and second.serves(lsn, now)):
            # Two that both serve are drawn as if there were no others.
            serving = [each for each in self._candidates if each.serves(lsn, now)]
            if not serving:
                return None
            first, second = _balance.two(serving, _balance.bounds(serving), random)
        return _balance.less_loaded(first, second)
