"""
What a token's position means on the timeline of today, and which replicas are on it.

After a promotion the same LSN names other log on the old timeline than on the new one, so numbers
are compared only where both are proven to be in one log.
"""

from __future__ import annotations

from lsn_consistency._cluster import Cluster
from lsn_consistency._nodes import Node
from lsn_consistency._observation import Observation
from lsn_consistency._verdicts import Lost, Read
from lsn_consistency.consistency import Consistency
from lsn_consistency.lsn import Position
from lsn_consistency.route import Reason


class Unprovable(Exception):
    """
    The read's position cannot be told from its token; the primary must serve.
    """

    def __init__(self, reason: Reason, lost: Lost | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lost = lost


def required_position(cluster: Cluster, read: Read) -> Position | None:
    if not read.level.uses_token or not read.token.positions:
        return None
    if cluster.system_id is None:
        # The token itself says which system it is about, if it names only one.
        if len(read.token.positions) == 1:
            return next(iter(read.token.positions.values()))
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


def _on_timeline(cluster: Cluster, required: Position) -> Position:
    # Log that two timelines share has the same LSNs on both, so a position that is proven to be in
    # the log of the newer one is reached there at the same LSN.
    timeline = cluster.timeline
    history = cluster.timelines.history(required.system_id, timeline)
    contained = history.contains(required)
    if contained:
        return required._replace(timeline=timeline)
    lost = None
    if contained is False:
        lost = Lost(required, timeline, history.switch_points.get(required.timeline))
    raise Unprovable(Reason.TIMELINE_CHANGED, lost)


def _beyond_the_end(cluster: Cluster, read: Read, required: Position) -> Lost | None:
    # The token is older than the read. A primary that was asked since then and is not as far has
    # lost it: it crashed with asynchronous commits, or was restored from a backup.
    seen = cluster.primary.newest if cluster.primary else None
    if seen is None or seen.lsn is None or not cluster.is_primary(seen):
        return None
    if seen.timeline != required.timeline or seen.sent_at < read.began:
        return None
    return Lost(required, required.timeline, seen.lsn) if seen.lsn < required.lsn else None


def primary_timeline(cluster: Cluster, required: Position) -> int:
    seen = cluster.primary.newest if cluster.primary else None
    if seen is None or seen.in_recovery or seen.timeline is None:
        return required.timeline
    return seen.timeline


def is_abandoned(cluster: Cluster, read: Read, seen: Observation) -> bool:
    # A replica that still follows the timeline before a promotion, whatever its LSN.
    if read.level == Consistency.EVENTUAL or seen.timeline is None:
        return False
    return cluster.system_id == seen.server.system_id and seen.timeline < cluster.timeline


def is_on_its_timeline(cluster: Cluster, node: Node) -> bool:
    """
    Tell whether a replica of a primary that is gone is sure to be on the timeline that it names.

    What a standby says without a walreceiver that may be looked at is a lower bound: it could
    follow another node that was promoted, whose log has the same LSNs for other writes.
    """
    seen = node.newest
    if seen is None or seen.timeline_is_certain:
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
        and each.newest.sent_at >= seen.received_at
        for each in others
    )
