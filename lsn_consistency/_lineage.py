"""
What a token's position means on the timeline of today, and which replicas are on it.

After a promotion the same LSN names other log on the old timeline than on the new one, so numbers
are compared only where both are proven to be in one log.
"""

from __future__ import annotations

from typing import Final

from lsn_consistency._cluster import Cluster
from lsn_consistency._nodes import Node
from lsn_consistency._observation import Observation
from lsn_consistency._verdicts import Lost, Read
from lsn_consistency.consistency import Consistency
from lsn_consistency.lsn import Position
from lsn_consistency.route import Reason
from lsn_consistency.tokens import Token

UNKNOWN_SYSTEM: Final = 0
"""The system of a server that refuses its WAL functions."""

FOLLOW_SECONDS: Final = 0.02
"""A standby needs longer than this to replay from a server that was promoted a moment ago."""


class Unprovable(Exception):
    """
    The read's position cannot be told from its token; the primary must serve.
    """

    def __init__(self, reason: Reason, lost: Lost | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lost = lost


def required_position(cluster: Cluster, read: Read) -> Position | None:
    """
    Return what a replica has to reach for a read, on the timeline of today; None for nothing.

    Raises `Unprovable` where that cannot be told, or where nobody has it.
    """
    if not read.level.uses_token or not read.token.positions:
        return None
    if cluster.system_id is None:
        # The token itself says which system it is about, if it names only one.
        if len(read.token.positions) == 1:
            return next(iter(read.token.positions.values()))
        raise Unprovable(Reason.NO_REPLICA)
    if cluster.system_id == UNKNOWN_SYSTEM:
        raise Unprovable(Reason.NO_REPLICA)
    required = read.token.get(cluster.system_id)
    if required is None and read.token.is_full:
        # A full token may have lost the position of this system.
        raise Unprovable(Reason.PRIMARY_REQUIRED)
    if required is None:
        return None
    if required.timeline >= cluster.timeline:
        if lost := _beyond_the_end(cluster, read, required):
            raise Unprovable(Reason.TIMELINE_CHANGED, lost)
        return required
    return _on_timeline(cluster, required)


def lost_position(cluster: Cluster, held: Position, reached: Position) -> Lost | None:
    """
    Return what became of a held position if a primary, observed later, does not have it.

    ``reached`` is the primary's position. None says that it has the held one, or may have it.
    """
    if held.timeline == reached.timeline:
        # It crashed with asynchronous commits, or was restored from a backup.
        lost = held.lsn > reached.lsn
        return Lost(held, reached.timeline, reached.lsn) if lost else None
    history = cluster.timelines.history(held.system_id, reached.timeline)
    if held.timeline > reached.timeline or history.contains(held) is not False:
        return None
    return Lost(held, reached.timeline, history.switch_points.get(held.timeline))


def _on_timeline(cluster: Cluster, required: Position) -> Position:
    # Log that two timelines share has the same LSNs on both, so a position that is proven to be in
    # the log of the newer one is reached there at the same LSN.
    timeline = cluster.timeline
    if cluster.timelines.contains(timeline, required):
        return required._replace(timeline=timeline)
    start = required._replace(timeline=timeline)
    raise Unprovable(Reason.TIMELINE_CHANGED, lost_position(cluster, required, start))


def _beyond_the_end(cluster: Cluster, read: Read, required: Position) -> Lost | None:
    # The token is older than the read, so a primary that was asked since then has it or lost it.
    seen = cluster.primary.newest if cluster.primary else None
    if seen is None or seen.position is None or not cluster.is_primary(seen):
        return None
    if seen.timeline != required.timeline or seen.sent_at < read.began:
        return None
    return lost_position(cluster, required, seen.position)


def named_timeline(cluster: Cluster, level: Consistency, token: Token) -> int:
    """
    Return the timeline that a token proves to exist, as far as the level looks at tokens.
    """
    if not (level.uses_token or level == Consistency.STRONG) or cluster.system_id is None:
        return 0
    position = token.get(cluster.system_id)
    return 0 if position is None else position.timeline


def primary_timeline(cluster: Cluster) -> int | None:
    """
    Return the timeline of the primary that answers; None without one.
    """
    seen = cluster.primary.newest if cluster.primary else None
    return None if seen is None or seen.in_recovery else seen.timeline


def followed_timeline(cluster: Cluster) -> int:
    """
    Return the highest timeline that a replica of this system follows, 0 without any.
    """
    observed = [each.newest for each in cluster.all_nodes if each.newest is not None]
    ours = [each for each in observed if each.server.system_id == cluster.system_id]
    return max((each.timeline or 0 for each in ours if each.in_recovery), default=0)


def is_abandoned(cluster: Cluster, read: Read, seen: Observation) -> bool:
    """
    Tell whether a replica is on a timeline that a promotion has left behind.
    """
    # Whatever its LSN is.
    if read.level == Consistency.EVENTUAL or seen.timeline is None:
        return False
    return cluster.system_id == seen.server.system_id and seen.timeline < cluster.timeline


def is_proven(cluster: Cluster, node: Node) -> bool:
    """
    Tell whether a replica is sure to be on the timeline that it names, should the primary be gone.

    What a standby says without a walreceiver that may be looked at is a lower bound: it could
    follow another node that was promoted, whose log has the same LSNs for other writes.
    """
    seen = node.newest
    if seen is None or seen.timeline_is_certain or primary_timeline(cluster) is not None:
        return seen is not None
    if not cluster.timeline:
        # This process has never seen a primary.
        return False
    if not seen.streaming:
        # It follows nobody, and followed the primary while that was there.
        return True
    others = [each for each in cluster.all_nodes if each not in (node, cluster.primary)]
    return all(
        each.newest is not None
        and each.newest.in_recovery
        and each.newest.sent_at >= seen.received_at - FOLLOW_SECONDS
        for each in others
    )
