"""
The nodes of a cluster as a whole: who leads, who follows whom, and how all of it is healed.
"""

from __future__ import annotations

import time
from abc import ABC
from collections.abc import Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

from lsn_consistency.lsn import Lsn
from lsn_consistency.testing._errors import ClusterError
from lsn_consistency.testing._workspace import POLL_SECONDS
from lsn_consistency.testing.node import Node

__all__ = ["Cluster"]

CATCH_UP_SECONDS = 30.0
NOT_RUNNING = "the cluster is not running: use it in a with block, or start() it"

_POSITIONS = "SELECT pg_current_wal_insert_lsn()::text, pg_current_wal_flush_lsn()::text"
_RECEIVED = "SELECT greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())::text"

_N = TypeVar("_N", bound=Node)


class Cluster(ABC, Generic[_N]):
    """
    A primary and its replicas, wherever they run.

    `primary` and `replicas` are names that stay: they say how the cluster was started, and how
    `heal()` leaves it. Who is the primary at the moment is `leader`.
    """

    def __init__(self) -> None:
        self._primary: _N | None = None
        self._replicas: dict[str, _N] = {}
        self._chosen: _N | None = None

    @property
    def primary(self) -> _N:
        """
        The server that was started as the primary.
        """
        if self._primary is None:
            raise ClusterError(NOT_RUNNING)
        return self._primary

    @property
    def replicas(self) -> Mapping[str, _N]:
        """
        The servers that were started as replicas, by name: replica_1, replica_2 and so on.
        """
        return MappingProxyType(self._replicas)

    @property
    def nodes(self) -> Mapping[str, _N]:
        """
        Every node by name, the primary (under "primary") first.
        """
        return MappingProxyType({"primary": self.primary, **self._replicas})

    @property
    def leader(self) -> _N:
        """
        The node that is the primary now: `primary` at first, then whom `failover()` promoted.

        Where replicas were promoted by hand it is the node that `primary` follows since, or, if
        `primary` is down or frozen, the first promoted node that is not.
        """
        leader = self._root(self._chosen or self.primary)
        if not leader.reachable:
            promoted = (node for node in self.nodes.values() if node.role == "primary")
            return next((node for node in promoted if node.reachable), leader)
        return leader

    def _root(self, node: _N) -> _N:
        """Return the node at the head of the chain of sources that a node hangs on."""
        for _ in self.nodes:
            source = self.nodes.get(node.source.name) if node.source else None
            if source is None:
                return node
            node = source
        raise ClusterError(f"{node.name} follows itself, over other nodes")

    # -- state ----------------------------------------------------------------------------------

    def wait_caught_up(self, timeout: float = CATCH_UP_SECONDS) -> None:
        """
        Wait until every replica has replayed all that `leader` has written up to this call.

        Replicas that are stopped, frozen or paused are left out, and nodes that do not follow the
        leader. Commits made with `synchronous_commit=off` count as well: if some are not on disk
        yet, one small record is written to get them there. Raises `ClusterError` that names who
        is how far behind.
        """
        leader = self.leader
        target = _position(leader)
        deadline = time.monotonic() + timeout
        behind = self._behind(leader, target)
        while behind:
            if time.monotonic() > deadline:
                _complain(behind, target, timeout)
            time.sleep(POLL_SECONDS)
            behind = self._behind(leader, target)

    def _behind(self, leader: _N, target: Lsn) -> dict[_N, Lsn]:
        """Return the replicas that have to catch up and have not, with how far they are."""
        found = {}
        for node in self.nodes.values():
            if node.reachable and node.role == "replica" and self._root(node) is leader:
                position = node.replay_lsn()
                if position < target and not node.paused:
                    found[node] = position
        return found

    # -- failover -------------------------------------------------------------------------------

    def failover(self, to: str | None = None) -> _N:
        """
        Promote a replica in the place of `leader`, have the others follow it, and return it.

        `to` names the replica, by default the one that has received most. A leader that still
        runs is killed before, as `crash()` does, so that there are never two: what it had not
        sent yet is lost. Then every other node that runs follows the new leader; nodes with log
        that it never had, such as the old leader, are rewound. Nodes that are down or frozen are
        left alone: a frozen leader comes back as a second primary when it is thawed.
        """
        old = self.leader
        candidates = self._candidates(old)
        if to is not None and to not in candidates:
            raise ClusterError(f"{to} cannot take over: it is no running replica of {old.name}")
        others = [node for node in self.nodes.values() if node.reachable]
        if old.reachable:
            old.crash()
        new = candidates[to] if to is not None else _furthest(candidates)
        new.promote()
        self._chosen = new
        for node in others:
            if node is not new:
                _rejoin(node, new)
        return new

    def _candidates(self, leader: _N) -> dict[str, _N]:
        """Return the replicas that can take over from a leader; `ClusterError` if none can."""
        found = {
            name: node
            for name, node in self.nodes.items()
            if node.role == "replica" and node.reachable and self._root(node) is leader
        }
        if not found:
            raise ClusterError(f"no replica that runs can take over from {leader.name}")
        return found

    def heal(self) -> None:
        """
        Undo every fault of every node, and return when all replicas have caught up.

        Thaws, starts, resumes replay, ends delays, reconnects, and makes a primary of `primary`
        and replicas of `replicas` again. The data that stays is that of `leader`; settings stay.
        A node that has log of its own is copied anew. On a healthy cluster it only asks, in a few
        milliseconds.
        """
        leader = self.leader
        for node in self.nodes.values():
            node.thaw()
        leader.start()
        if leader is not self.primary:
            self._fail_back(leader)
        self._chosen = None
        for replica in self._replicas.values():
            replica.heal(self.primary)
        self.wait_caught_up()

    def _fail_back(self, leader: _N) -> None:
        """Give the lead back to the configured primary, with all that the leader has written."""
        self.primary.heal(leader)
        # A primary that is stopped in this way waits until its standbys have received everything.
        leader.stop("fast")
        self.primary.promote()
        _rejoin(leader, self.primary)


def _position(leader: Node) -> Lsn:
    """Return a position of the leader that covers every commit and is on disk."""
    with leader.connect() as connection:
        inserted, flushed = connection.execute(_POSITIONS).fetchone() or ("", "")
        if inserted != flushed:
            # A commit of our own flushes everything before it; local, lest it waits for
            # synchronous replicas that are not there.
            connection.execute("SET synchronous_commit = local")
            connection.execute("SELECT pg_logical_emit_message(true, 'lsn_consistency', '')")
            _, flushed = connection.execute(_POSITIONS).fetchone() or ("", "")
        return Lsn.parse(flushed)


def _furthest(candidates: Mapping[str, _N]) -> _N:
    """Return the replica that has received most."""
    return max(candidates.values(), key=lambda node: Lsn.parse(node.value(_RECEIVED)))


def _rejoin(node: Node, leader: Node) -> None:
    """Make a replica of a node under a new leader, by the mildest means that works."""
    means = [node.rewind, node.rebuild]
    for rejoin in [node.follow, *means] if node.running else means:
        try:
            rejoin(leader)
            return
        except ClusterError as error:
            failure = error
    raise failure


def _complain(behind: Mapping[_N, Lsn], target: Lsn, timeout: float) -> None:
    """Raise the error that says who is behind, and why if that is known."""
    parts = [
        f"{replica.name} is {target - position} bytes behind "
        f"(replayed {position} of {target}, {replica.describe()})"
        for replica, position in behind.items()
    ]
    logs = "\n".join(replica.log_tail() for replica in behind)
    raise ClusterError(f"not caught up after {timeout:g} s: {'; '.join(parts)}", logs)
