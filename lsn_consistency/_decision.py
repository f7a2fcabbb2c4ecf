"""
Which node may serve a read, and why.

Theory of operation. `decide` is a pure function of what is known about the nodes (`Cluster`), of
what one read asks for and has tried so far (`Read`), and of the time. It answers with what to do
next:

* `Serve`: take a connection of this node. Before a statement runs on it, `admits` must have said
  yes to an observation of exactly the server behind that connection, made after the connection
  was opened: a node is an endpoint, and what is behind it can have restarted in the past.
* `Wait`: let time pass until some replica reaches the position, then ask again.
* `Refresh`: get new observations, then ask again; what is known is too old for the question.
* `Fail`: nothing may serve this read; raise the error.

Three-valued logic holds throughout. A replica serves only on YES; what is missing, NULL, failed,
from another system or another timeline is not YES. Lag is known from the primary's samples or not
at all. The rules and their order are the table of `Reason`; docs/routing.md tells them at length.

The caller keeps the loop finite: a node that did not work out is excluded, a wait happens within
its time, a refresh once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

from lsn_consistency import _balance
from lsn_consistency._cluster import Cluster
from lsn_consistency._lineage import (
    Unprovable,
    followed_timeline,
    is_abandoned,
    is_proven,
    named_timeline,
    primary_timeline,
    required_position,
)
from lsn_consistency._nodes import Node
from lsn_consistency._observation import Observation
from lsn_consistency._shortlist import Candidate, Shortlist
from lsn_consistency._verdicts import Fail, Lost, Read, Refresh, Serve, Verdict, Wait
from lsn_consistency.consistency import Consistency
from lsn_consistency.exceptions import (
    NoNodeAvailableError,
    ReplayTimeoutError,
)
from lsn_consistency.lsn import Position
from lsn_consistency.route import Reason
from lsn_consistency.tokens import Token

FRESH_SHARE: Final = 0.25
"""An observation older than this share of the lag limit is refreshed before the limit decides."""


class _Candidate(NamedTuple):
    node: Node
    lag_seconds: float


def decide_at_once(
    shortlist: Shortlist,
    level: Consistency,
    token: Token,
    preferred: str | None,
    now: float,
    random: Callable[[], float],
) -> tuple[Candidate, Position | None] | None:
    """
    Return the replica that `decide` would serve a new read from, and the position that it reached.

    None says nothing but that `decide` has to be asked: most reads are answered here.
    """
    if not level.uses_token or token.pin_until is not None:
        return None
    required = token._positions.get(shortlist.system_id)
    if required is None:
        if token.is_full:
            return None
        lsn = -1
    elif required[1] == shortlist.timeline:
        lsn = required[2]
    else:
        return None
    found = shortlist.by_name.get(preferred)
    if found is None or found.lsn < lsn or now > found.until:
        found = shortlist.drawn(lsn, now, random)
    return None if found is None else (found, required)


def decide(
    cluster: Cluster,
    read: Read,
    now: float,
    unix_now: float,
    random: Callable[[], float],
) -> Verdict:
    """
    Say what a read does next. ``random`` gives numbers from 0 up to 1, for the balance.
    """
    if read.is_new:
        found = decide_at_once(
            cluster.listed(), read.level, read.token, read.preferred, now, random
        )
        if found is not None:
            candidate, required = found
            return Serve(candidate.node, _reason(required), now - candidate.moment, required)
    return decide_wholly(cluster, read, now, unix_now, random)


def decide_wholly(
    cluster: Cluster,
    read: Read,
    now: float,
    unix_now: float,
    random: Callable[[], float],
) -> Verdict:
    """
    Say the same as `decide`, for every read: the rules themselves.
    """
    if newer := _newer_timeline(cluster, read):
        return newer
    if read.level == Consistency.STRONG or _is_pinned(read, unix_now):
        return _primary(cluster, read, Reason.PRIMARY_REQUIRED)
    if cluster.conflict is not None and read.level != Consistency.EVENTUAL:
        # A timeline's number no longer tells which of its two branches a replica follows.
        return _primary(cluster, read, Reason.NO_REPLICA)
    try:
        required = required_position(cluster, read)
    except Unprovable as unprovable:
        return _primary(cluster, read, unprovable.reason, lost=unprovable.lost)
    return _among_replicas(cluster, read, required, (now, unix_now), random)


def admits(cluster: Cluster, read: Read, serve: Serve, seen: Observation, now: float) -> bool:
    """
    Tell whether a connection may serve ``read``, its server having been observed so.
    """
    at_once = read.level.uses_token and not serve.primary
    if at_once and cluster.listed().admits(serve.node.name, serve.required, seen, now):
        return True
    if serve.primary:
        named = named_timeline(cluster, read.level, read.token)
        return cluster.is_primary(seen) and (seen.timeline or 0) >= named
    if not seen.in_recovery or not _is_ours(cluster, seen, serve.required):
        return False
    if is_abandoned(cluster, read, seen):
        return False
    if serve.required is not None and seen.reaches(serve.required) is not True:
        return False
    if serve.stale or serve.reason is Reason.PRIMARY_DOWN:
        return True
    return cluster.lag_seconds(seen, now) <= read.lag_limit


def _is_pinned(read: Read, unix_now: float) -> bool:
    if not (read.level.uses_token or read.level.name == "sticky"):
        return False
    until = read.token.pin_until
    return until is not None and until > unix_now


def _is_past_pin(read: Read, candidate: _Candidate, unix_now: float) -> bool:
    # A pin stands for a position that could not be taken. Its end lets a replica serve because the
    # lag is bounded; where it is not, the replica must show a moment after the end.
    until = read.token.pin_until
    return until is None or unix_now - candidate.lag_seconds >= until


def _newer_timeline(cluster: Cluster, read: Read) -> Verdict | None:
    # Somebody has seen a promotion that this process has not: the primary it knows is a former one.
    known = primary_timeline(cluster)
    named = named_timeline(cluster, read.level, read.token)
    if known is None or known >= named:
        return None
    if not read.refreshed:
        return Refresh(tuple(cluster.nodes))
    return Fail(
        NoNodeAvailableError(
            _failures(cluster),
            f"the token is of timeline {named} and the primary that is known is on {known}: no "
            "primary of the newer timeline was found",
        )
    )


def _among_replicas(
    cluster: Cluster,
    read: Read,
    required: Position | None,
    clocks: tuple[float, float],
    random: Callable[[], float],
) -> Verdict:
    now, unix_now = clocks
    eligible: list[_Candidate] = []
    reached: list[_Candidate] = []
    hidden: list[Node] = []
    doubtful: list[Node] = []
    healthy = over = 0
    for node in cluster.all_nodes:
        seen = node.newest
        if seen is None or not seen.in_recovery or node.name in read.excluded:
            continue
        if not _is_ours(cluster, seen, required) or is_abandoned(cluster, read, seen):
            continue
        healthy += 1
        lag = cluster.lag_seconds(seen, now)
        candidate = _Candidate(node, lag)
        # An unknown lag is not within the limit, nor known to be over it.
        over += read.lag_limit < lag < math.inf
        if node.name in read.refused:
            # Its connections have reached servers that could not serve.
            continue
        if required is None or seen.reaches(required) is True:
            reached.append(candidate)
            if lag <= read.lag_limit and (required is None or is_proven(cluster, node)):
                eligible.append(candidate)
                continue
            if lag <= read.lag_limit:
                doubtful.append(node)
        if node.hides_servers:
            hidden.append(node)
    if eligible:
        reason = Reason.WITHIN_LAG if required is None else Reason.CAUGHT_UP
        return _serve(_balanced(eligible, read.preferred, random), reason, required)
    if doubtful and not read.compared:
        return _comparison(cluster, doubtful[0])
    if hidden:
        return Serve(hidden[0], _reason(required), None, required, ask=True)
    if _is_unreachable(cluster, read) and read.level.uses_token:
        unpinned = [each for each in reached if _is_past_pin(read, each, unix_now)]
        if required is not None and unpinned:
            proven = [each for each in unpinned if is_proven(cluster, each.node)]
            if not proven and not read.compared and cluster.timeline:
                return _comparison(cluster, unpinned[0].node)
            unpinned = proven
        if unpinned:
            chosen = _balanced(_furthest(unpinned), read.preferred, random)
            return _serve(chosen, Reason.PRIMARY_DOWN, required)
    if not healthy:
        return _primary(cluster, read, Reason.NO_REPLICA)
    if required is None or (over == healthy and read.waiting_since is None):
        if not read.refreshed and (names := _too_old(cluster, read, now)):
            return Refresh(names)
        return _primary(cluster, read, Reason.LAG_EXCEEDED, required)
    if read.waited:
        return _primary(cluster, read, Reason.NOT_CAUGHT_UP, required)
    return Wait(required)


def decide_stale(
    cluster: Cluster, read: Read, reason: Reason, now: float, random: Callable[[], float]
) -> Serve | None:
    """
    Return the replica with the least lag for a read that may be stale, None without a replica.

    It is asked only where ``on_fallback_limit="stale"`` is set and the primary is full; ``reason``
    is why the read would have gone there.
    """
    candidates = [
        _Candidate(node, cluster.lag_seconds(node.newest, now))
        for node in cluster.all_nodes
        if node.newest is not None
        and node.newest.in_recovery
        and node.name not in read.excluded
        and node.name not in read.refused
        and cluster.system_id == node.newest.server.system_id
        and not is_abandoned(cluster, read, node.newest)
    ]
    if not candidates:
        return None
    least = min(each.lag_seconds for each in candidates)
    best = [each for each in candidates if each.lag_seconds == least]
    chosen = _serve(_balanced(best, read.preferred, random), reason, None)
    return chosen._replace(stale=True)


def _reason(required: Position | None) -> Reason:
    return Reason.WITHIN_LAG if required is None else Reason.CAUGHT_UP


def _serve(chosen: _Candidate, reason: Reason, required: Position | None) -> Serve:
    lag = None if math.isinf(chosen.lag_seconds) else chosen.lag_seconds
    return Serve(chosen.node, reason, lag, required)


def _is_ours(cluster: Cluster, seen: Observation, required: Position | None) -> bool:
    # Before the primary was ever seen, only the token can tell which system is ours.
    system_id = cluster.system_id
    if system_id is None:
        return required is not None and required.system_id == seen.server.system_id
    return seen.server.system_id == system_id


def _comparison(cluster: Cluster, node: Node) -> Refresh:
    others = (each.name for each in cluster.all_nodes if each not in (node, cluster.primary))
    return Refresh((node.name, *others), compare=True)


def _is_unreachable(cluster: Cluster, read: Read) -> bool:
    if read.primary_error is not None:
        return True
    primary = cluster.primary
    if primary is None:
        return cluster.conflict is None
    return primary.newest is None and primary.breaker_open


def _too_old(cluster: Cluster, read: Read, now: float) -> tuple[str, ...]:
    # The primary first: a replica then has its time to replay what the primary's sample says.
    oldest = now - FRESH_SHARE * read.lag_limit
    sampled = cluster.samples.newest_at
    names: list[str] = []
    if cluster.primary is not None and sampled < oldest:
        names.append(cluster.primary.name)
    for node in cluster.all_nodes:
        seen = node.newest
        if seen is None or not seen.in_recovery or node.name in read.excluded:
            continue
        # What was observed before every sample cannot be told from what lags without end.
        unmeasured = seen.sent_at <= sampled and math.isinf(cluster.lag_seconds(seen, now))
        if seen.sent_at < oldest or unmeasured:
            names.append(node.name)
    return tuple(names)


def _furthest(candidates: list[_Candidate]) -> list[_Candidate]:
    # Without a lag to go by, only the replicas that have replayed most.
    lsns = [(node.newest.lsn if node.newest else None) or 0 for node, _ in candidates]
    most = max(lsns)
    return [each for each, lsn in zip(candidates, lsns, strict=True) if lsn == most]


def _balanced(
    candidates: list[_Candidate], preferred: str | None, random: Callable[[], float]
) -> _Candidate:
    if len(candidates) == 1:
        return candidates[0]
    for candidate in candidates:
        if candidate.node.name == preferred:
            return candidate
    first, second = _balance.two(candidates, _balance.bounds(candidates), random)
    return _balance.less_loaded(first, second)


def _primary(
    cluster: Cluster,
    read: Read,
    reason: Reason,
    required: Position | None = None,
    lost: Lost | None = None,
) -> Verdict:
    if cluster.primary is not None and read.primary_error is None:
        return Serve(cluster.primary, reason, primary=True, lost=lost)
    if required is not None and not read.waited:
        return Wait(required)
    if not read.refreshed and (names := _may_be_promoted(cluster)):
        return Refresh(names)
    if required is not None:
        return Fail(ReplayTimeoutError(required, read.waited_seconds))
    return Fail(NoNodeAvailableError(_failures(cluster), no_primary(cluster)))


def _may_be_promoted(cluster: Cluster) -> tuple[str, ...]:
    # A replica on a newer timeline is the word of a newer primary. It can be a server that was down
    # when it was asked last, and that its monitor looks for only now and then.
    if followed_timeline(cluster) <= cluster.timeline:
        return ()
    unknown = (each for each in cluster.all_nodes if each.newest is None)
    return tuple(each.name for each in unknown if each is not cluster.primary)


def no_primary(cluster: Cluster) -> str:
    """
    Say why there is no primary to serve a read or a write.
    """
    if cluster.conflict is not None:
        return f"no primary: {cluster.conflict}"
    if cluster.primary is None:
        return "no primary: no node says that it is out of recovery"
    return "the primary is unreachable and no replica satisfies the read"


def _failures(cluster: Cluster) -> dict[str, str]:
    return {node.name: node.last_error for node in cluster.all_nodes if node.last_error is not None}
