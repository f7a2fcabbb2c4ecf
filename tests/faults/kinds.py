"""
The kinds of faults: whom each one hits, for how long, what it may lose, and how it is undone.

A fault is a generator of two halves: before its ``yield`` what breaks, after it what heals. Both
block until it is so.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from lsn_consistency.testing import ClusterError, EmbeddedNode
from tests.faults.stage import Stage

Scope = Literal["replica", "primary", "failover"]
Loss = Literal["nothing", "asynchronous", "acknowledged"]
Halves = Generator[None, None, None]


@dataclass(frozen=True, slots=True)
class Fault:
    """
    One fault to come.

    ``target`` is the number of a replica among those of the moment, in the order of their names;
    ``strength``, from 0 to 1, is for the kind to read. Seconds are how long the fault lasts, and
    how long the cluster then has to itself.
    """

    number: int
    kind: str
    target: int
    seconds: float
    settle_seconds: float
    strength: float

    @property
    def scope(self) -> Scope:
        """
        Return whom the kind hits.
        """
        return KINDS[self.kind].scope

    def between(self, low: float, high: float) -> float:
        """
        Return the strength on a scale of the kind's own.
        """
        return low + self.strength * (high - low)


class Kind(NamedTuple):
    """
    One kind of fault: whom it hits, how long it lasts, and what it may lose.

    ``loses`` says which acknowledged writes may be gone afterwards: none, those that were
    committed with ``synchronous_commit=off``, or any that no replica had received.
    """

    name: str
    scope: Scope
    seconds: tuple[float, float]
    loses: Loss
    halves: Callable[[Stage, Fault], Halves]

    @property
    def summary(self) -> str:
        """
        Return the first sentence of what the kind says of itself.
        """
        return (self.halves.__doc__ or "").strip().split("\n")[0]


KINDS: Final[dict[str, Kind]] = {}


def _kind(
    scope: Scope, low: float, high: float, loses: Loss = "nothing"
) -> Callable[[Callable[[Stage, Fault], Halves]], Callable[[Stage, Fault], Halves]]:
    def register(halves: Callable[[Stage, Fault], Halves]) -> Callable[[Stage, Fault], Halves]:
        name = halves.__name__.lstrip("_")
        KINDS[name] = Kind(name, scope, (low, high), loses, halves)
        return halves

    return register


def target(stage: Stage, fault: Fault) -> EmbeddedNode:
    """
    Return the server that a fault hits: one of the present replicas, or the present primary.
    """
    if fault.scope == "replica":
        return stage.followers[fault.target % len(stage.followers)]
    return stage.primary


# Replicas


@_kind("replica", 1.0, 4.0)
def _pause_replay(stage: Stage, fault: Fault) -> Halves:
    """A replica stops applying what it receives."""
    node = target(stage, fault)
    node.pause_replay()
    yield
    node.resume_replay()


@_kind("replica", 2.0, 5.0)
def _apply_delay(stage: Stage, fault: Fault) -> Halves:
    """A replica applies each commit some time after it was made, 0.1 s to 3 s."""
    node = target(stage, fault)
    node.apply_delay(fault.between(0.1, 3.0))
    yield
    node.apply_delay(0)


def _stream_again(node: EmbeddedNode) -> None:
    """Have a replica follow its source again; where PostgreSQL does not, by a new copy."""
    try:
        node.start_replication()
    except ClusterError:
        node.rebuild(node.source)


@_kind("replica", 1.0, 4.0)
def _stop_replication(stage: Stage, fault: Fault) -> Halves:
    """A replica is cut off from the primary and knows it."""
    node = target(stage, fault)
    node.stop_replication()
    yield
    _stream_again(node)


@_kind("replica", 1.0, 4.0)
def _replication_black_hole(stage: Stage, fault: Fault) -> Halves:
    """The network between a replica and the primary swallows everything."""
    node = target(stage, fault)
    stream = stage.stream(node)
    stream.black_hole()
    yield
    stream.heal()
    _stream_again(node)


@_kind("replica", 2.0, 4.0)
def _replication_latency(stage: Stage, fault: Fault) -> Halves:
    """Replication to one replica takes a detour of 20 ms to 500 ms."""
    node = target(stage, fault)
    stream = stage.stream(node)
    stream.latency(fault.between(0.02, 0.5))
    yield
    stream.heal()
    _stream_again(node)


@_kind("replica", 0.5, 4.0)
def _freeze_replica(stage: Stage, fault: Fault) -> Halves:
    """A replica hangs: connections stay open and nothing answers."""
    node = target(stage, fault)
    node.freeze()
    yield
    node.thaw()


@_kind("replica", 0.2, 2.0)
def _crash_replica(stage: Stage, fault: Fault) -> Halves:
    """A replica crashes, and comes back, maybe in the past."""
    node = target(stage, fault)
    node.crash()
    yield
    node.start()


@_kind("replica", 0.5, 1.0)
def _crash_backend_of_replica(stage: Stage, fault: Fault) -> Halves:
    """One backend of a replica is killed, and its postmaster goes through crash recovery."""
    target(stage, fault).crash_backend()
    yield


@_kind("replica", 0.2, 2.0)
def _stop_replica(stage: Stage, fault: Fault) -> Halves:
    """A replica is shut down in good order for a while."""
    node = target(stage, fault)
    node.stop("fast")
    yield
    node.start()


@_kind("replica", 0.2, 2.0)
def _stop_replica_immediately(stage: Stage, fault: Fault) -> Halves:
    """A replica is shut down without a restart point, and comes back, maybe in the past."""
    node = target(stage, fault)
    node.stop("immediate")
    yield
    node.start()


# The network between the clients and one server


def _latency(stage: Stage, fault: Fault, seconds: float) -> Halves:
    proxy = stage.proxies[target(stage, fault).name]
    proxy.latency(fault.between(0.01, seconds))
    yield
    proxy.heal()


def _black_hole(stage: Stage, fault: Fault) -> Halves:
    proxy = stage.proxies[target(stage, fault).name]
    proxy.black_hole()
    yield
    proxy.heal()


def _reset(stage: Stage, fault: Fault) -> Halves:
    proxy = stage.proxies[target(stage, fault).name]
    proxy.reset()
    yield
    proxy.heal()


def _half_open(stage: Stage, fault: Fault) -> Halves:
    proxy = stage.proxies[target(stage, fault).name]
    proxy.half_open()
    yield
    proxy.heal()


@_kind("replica", 1.0, 4.0)
def _latency_of_replica(stage: Stage, fault: Fault) -> Halves:
    """Every packet between the clients and a replica takes 10 ms to 400 ms more."""
    yield from _latency(stage, fault, 0.4)


@_kind("replica", 1.0, 4.0)
def _black_hole_of_replica(stage: Stage, fault: Fault) -> Halves:
    """The network between the clients and a replica swallows everything."""
    yield from _black_hole(stage, fault)


@_kind("replica", 0.5, 2.0)
def _reset_of_replica(stage: Stage, fault: Fault) -> Halves:
    """The clients' connections to a replica are reset, all at once."""
    yield from _reset(stage, fault)


@_kind("replica", 1.0, 4.0)
def _half_open_replica(stage: Stage, fault: Fault) -> Halves:
    """A replica's connections end on its side, and its clients are not told."""
    yield from _half_open(stage, fault)


@_kind("primary", 1.0, 3.0)
def _latency_of_primary(stage: Stage, fault: Fault) -> Halves:
    """Every packet between the clients and the primary takes 10 ms to 100 ms more."""
    # A read that only the primary may answer has some five round trips to make.
    yield from _latency(stage, fault, 0.1)


@_kind("primary", 0.5, 3.0)
def _black_hole_of_primary(stage: Stage, fault: Fault) -> Halves:
    """The network between the clients and the primary swallows everything."""
    yield from _black_hole(stage, fault)


@_kind("primary", 0.5, 2.0)
def _reset_of_primary(stage: Stage, fault: Fault) -> Halves:
    """The clients' connections to the primary are reset, all at once."""
    yield from _reset(stage, fault)


@_kind("primary", 0.5, 3.0)
def _half_open_primary(stage: Stage, fault: Fault) -> Halves:
    """The primary's connections end on its side, and its clients are not told."""
    yield from _half_open(stage, fault)


# The primary


@_kind("primary", 0.3, 2.0)
def _freeze_primary(stage: Stage, fault: Fault) -> Halves:
    """The primary hangs for a moment."""
    node = stage.primary
    node.freeze()
    yield
    node.thaw()


@_kind("primary", 0.1, 1.5, "asynchronous")
def _crash_primary(stage: Stage, fault: Fault) -> Halves:
    """The primary crashes and comes back as the primary."""
    node = stage.primary
    node.crash()
    yield
    node.start()


@_kind("primary", 0.5, 1.0, "asynchronous")
def _crash_backend_of_primary(stage: Stage, fault: Fault) -> Halves:
    """One backend of the primary is killed, and its postmaster goes through crash recovery."""
    stage.primary.crash_backend()
    yield


@_kind("primary", 0.1, 1.5)
def _stop_primary(stage: Stage, fault: Fault) -> Halves:
    """The primary is shut down in good order for a while."""
    node = stage.primary
    node.stop("fast")
    yield
    node.start()


@_kind("primary", 0.1, 1.5, "asynchronous")
def _stop_primary_immediately(stage: Stage, fault: Fault) -> Halves:
    """The primary is shut down without a checkpoint, and recovers."""
    node = stage.primary
    node.stop("immediate")
    yield
    node.start()


# A new primary


@_kind("failover", 0.5, 2.0)
def _switchover(stage: Stage, fault: Fault) -> Halves:
    """The primary is shut down in good order, a replica takes over, and the old one follows it."""
    old = stage.primary
    old.stop("fast")
    stage.pg.failover()
    yield
    old.rewind(stage.primary)


@_kind("failover", 0.5, 2.0, "acknowledged")
def _failover(stage: Stage, fault: Fault) -> Halves:
    """The primary crashes, a replica takes over, and the old one comes back rewound."""
    old = stage.primary
    stage.pg.failover()
    yield
    old.rewind(stage.primary)


@_kind("failover", 0.5, 2.0, "acknowledged")
def _failover_with_loss(stage: Stage, fault: Fault) -> Halves:
    """A failover before which, for up to a second, nothing of what was committed was replicated."""
    old = stage.primary
    for node in stage.followers:
        node.stop_replication()
    stage.hold(fault.between(0.2, 1.0))
    stage.pg.failover()
    yield
    old.rewind(stage.primary)


@_kind("failover", 1.0, 3.0, "acknowledged")
def _second_primary(stage: Stage, fault: Fault) -> Halves:
    """A failover after which the old primary comes back as a primary for a moment."""
    old = stage.primary
    stage.pg.failover()
    old.start()
    yield
    old.rewind(stage.primary)


def describe_kinds() -> Mapping[str, str]:
    """
    Return what every kind of fault does, by name.
    """
    return {name: kind.summary for name, kind in KINDS.items()}
