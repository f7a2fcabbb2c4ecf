"""
What people are told of the nodes: `Router.snapshot` and the lags in messages.
"""

from __future__ import annotations

import math
from typing import Any

from lsn_consistency._cluster import Cluster
from lsn_consistency._nodes import Node
from lsn_consistency._observation import Observation
from lsn_consistency.lsn import Lsn


def reported_lag(cluster: Cluster, node: Node, now: float) -> tuple[float | None, str]:
    """
    Return a node's lag for people, and where it comes from.

    ``"samples"`` is the measured bound that decisions use. With the primary out of reach it is
    the standby's own ``now() - pg_last_xact_replay_timestamp()`` and the age of that statement:
    ``"replay_timestamp"``, which grows on an idle cluster and is used for nothing else.
    """
    seen = node.newest
    if seen is None:
        return None, "unknown"
    if not seen.in_recovery:
        return 0.0, "primary"
    if cluster.primary is None or cluster.primary.newest is None:
        if seen.replay_age_seconds is None:
            return None, "unknown"
        return seen.replay_age_seconds + now - seen.received_at, "replay_timestamp"
    lag = cluster.samples.lag_seconds(seen, now)
    return (None, "unknown") if math.isinf(lag) else (lag, "samples")


def snapshot(cluster: Cluster, now: float, unix_now: float) -> dict[str, dict[str, Any]]:
    """
    Describe every node; see `Router.snapshot`.
    """
    with cluster.lock:
        return {node.name: _described(cluster, node, now, unix_now) for node in cluster.all_nodes}


def _described(cluster: Cluster, node: Node, now: float, unix_now: float) -> dict[str, Any]:
    seen = node.newest
    lag, source = reported_lag(cluster, node, now)
    return {
        "role": node.role,
        "healthy": seen is not None,
        "lag_seconds": lag,
        "lag_source": source,
        "replay_lsn": None if seen is None else seen.lsn,
        "timeline": None if seen is None else seen.timeline,
        "timeline_is_certain": seen is not None and seen.timeline_is_certain,
        "switch_points": None if seen is None else _switch_points(cluster, seen),
        "system_id": None if seen is None else seen.server.system_id,
        "checked_at": None if node.checked_at is None else unix_now - (now - node.checked_at),
        "breaker": "open" if node.breaker_open else "closed",
        "consecutive_failures": node.failures,
        "last_error": node.last_error,
        "reads_in_flight": node.in_flight,
        "servers": len(node.servers),
        "pooled": seen is not None and seen.pooled,
    }


def _switch_points(cluster: Cluster, seen: Observation) -> dict[int, Lsn] | None:
    if seen.timeline is None:
        return None
    history = cluster.timelines.history(seen.server.system_id, seen.timeline)
    return dict(history.switch_points) if history.complete or history.switch_points else None
