"""Promotion, following, rewinding and failing back, judged by what the servers themselves say."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from lsn_consistency.testing import ClusterError, EmbeddedCluster, EmbeddedNode, Node
from tests.cluster.harness import wait_until

WAIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def module_cluster() -> Iterator[EmbeddedCluster]:
    with EmbeddedCluster(replicas=2) as pg:
        pg.primary.execute("CREATE TABLE notes (text text)")
        yield pg


@pytest.fixture
def cluster(module_cluster: EmbeddedCluster) -> EmbeddedCluster:
    module_cluster.heal()
    module_cluster.primary.execute("TRUNCATE notes")
    module_cluster.wait_caught_up()
    return module_cluster


def write(node: Node, text: str) -> None:
    node.execute("INSERT INTO notes VALUES (%s)", [text])


def notes(node: Node) -> set[str]:
    return {str(row[0]) for row in node.execute("SELECT text FROM notes")}


def everywhere(cluster: EmbeddedCluster) -> list[set[str]]:
    """Return what each node has, after the replicas have caught up."""
    cluster.wait_caught_up()
    return [notes(node) for node in cluster.nodes.values()]


def stream(node: Node) -> tuple[int, int]:
    """Return the port that a replica streams from and the timeline that it receives."""
    statement = "SELECT sender_port, received_tli FROM pg_stat_wal_receiver"
    port, timeline = node.execute(statement)[0]
    return port, timeline


def in_recovery(cluster: EmbeddedCluster) -> list[bool]:
    return [node.value("SELECT pg_is_in_recovery()") for node in cluster.nodes.values()]


def diverge(cluster: EmbeddedCluster, *, on_primary: str, on_replica: str) -> EmbeddedNode:
    """Have the primary commit what no replica gets, kill it, promote a replica and write there."""
    first, second = cluster.replicas.values()
    # In this order: whoever is to follow must not be ahead, not even by a record of housekeeping.
    second.stop_replication()
    first.stop_replication()
    write(cluster.primary, on_primary)
    cluster.primary.crash()
    first.promote()
    write(first, on_replica)
    return first


def test_after_a_promotion_the_cluster_goes_on(cluster: EmbeddedCluster) -> None:
    """Promote, follow, rewind: what only the old primary had is gone, all else is everywhere."""
    write(cluster.primary, "before")
    cluster.wait_caught_up()
    new = diverge(cluster, on_primary="lost", on_replica="after")
    old, other = cluster.primary, cluster.replicas["replica_2"]
    other.follow(new)
    old.rewind(new)
    assert (new, ["replica", "primary", "replica"]) == (
        cluster.leader,
        [node.role for node in cluster.nodes.values()],
    )
    assert [True, False, True] == in_recovery(cluster)
    timeline = new.timeline()
    assert [(new.port, timeline)] * 2 == [stream(old), stream(other)]
    assert [{"before", "after"}] * 3 == everywhere(cluster)


@pytest.mark.parametrize("state", ["running", "crashed", "stopped", "frozen"])
def test_an_old_primary_is_rewound_in_any_state(cluster: EmbeddedCluster, state: str) -> None:
    """However it was left, the old primary loses its own rows and streams the new one's."""
    old, new = cluster.primary, cluster.replicas["replica_1"]
    new.stop_replication()
    write(old, "lost")
    new.promote()
    write(new, "after")
    if state != "running":
        {"crashed": old.crash, "stopped": old.stop, "frozen": old.freeze}[state]()
    old.rewind(new)
    write(new, "later")
    assert {"after", "later"} == notes(new)
    wait_until(lambda: notes(old) == {"after", "later"}, WAIT_SECONDS)
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        write(old, "refused")


@pytest.mark.parametrize("crashed", [False, True])
def test_a_standby_that_is_ahead_is_refused_and_can_be_rewound(
    cluster: EmbeddedCluster, crashed: bool
) -> None:
    """A replica with log that the new primary never had cannot follow it, until it is rewound."""
    behind, ahead = cluster.replicas.values()
    behind.stop_replication()
    write(cluster.primary, "lost")
    wait_until(lambda: notes(ahead) == {"lost"})
    cluster.primary.crash()
    behind.promote()
    with pytest.raises(ClusterError, match="replica_2 has log that replica_1 never had"):
        ahead.follow(behind)
    if crashed:
        ahead.crash()
    ahead.rewind(behind)
    write(behind, "after")
    wait_until(lambda: notes(ahead) == {"after"}, WAIT_SECONDS)


def test_a_rewound_primary_has_every_fault_of_a_replica(cluster: EmbeddedCluster) -> None:
    """What can be done to a replica can be done to a primary that became one."""
    new = cluster.failover("replica_1")
    old = cluster.primary
    old.pause_replay()
    write(new, "paused")
    assert (set(), True) == (notes(old), old.paused)
    old.resume_replay()
    wait_until(lambda: notes(old) == {"paused"})
    old.stop_replication()
    write(new, "cut off")
    assert ("stopped", {"paused"}) == (old.receiver_state(), notes(old))
    old.start_replication()
    wait_until(lambda: notes(old) == {"paused", "cut off"})
    old.apply_delay(3600)
    write(new, "delayed")
    assert {"paused", "cut off"} == notes(old)
    old.apply_delay(0)
    assert [{"paused", "cut off", "delayed"}] * 3 == everywhere(cluster)


def test_failover_and_back(cluster: EmbeddedCluster) -> None:
    """Two failovers lead back to the first primary; every node follows each time."""
    write(cluster.primary, "one")
    cluster.wait_caught_up()
    timelines = [cluster.leader.timeline()]
    for number, name in enumerate(["replica_2", "primary"]):
        leader = cluster.failover(name)
        write(leader, f"led by {name}")
        timelines.append(leader.timeline())
        others = [node for node in cluster.nodes.values() if node is not leader]
        assert (leader, cluster.nodes[name]) == (cluster.leader, leader)
        assert [(leader.port, timelines[-1])] * 2 == [stream(node) for node in others]
        assert timelines[0] + number + 1 == timelines[-1]
    assert [{"one", "led by replica_2", "led by primary"}] * 3 == everywhere(cluster)


def test_failover_takes_the_replica_that_has_most(cluster: EmbeddedCluster) -> None:
    """Without a name the furthest replica leads, so that nothing it has received is lost."""
    cluster.replicas["replica_1"].stop_replication()
    write(cluster.primary, "kept")
    wait_until(lambda: notes(cluster.replicas["replica_2"]) == {"kept"})
    assert cluster.replicas["replica_2"] is cluster.failover()
    assert [{"kept"}] * 3 == everywhere(cluster)


def test_failover_to_a_replica_that_is_behind(cluster: EmbeddedCluster) -> None:
    """The replica that was ahead is rewound, and loses what the new leader never had."""
    cluster.replicas["replica_1"].stop_replication()
    write(cluster.primary, "lost")
    wait_until(lambda: notes(cluster.replicas["replica_2"]) == {"lost"})
    write(cluster.failover("replica_1"), "kept")
    assert [{"kept"}] * 3 == everywhere(cluster)


def test_failover_leaves_alone_what_is_down(cluster: EmbeddedCluster) -> None:
    """A crashed primary stays down, and healing gives it the lead back with the new rows."""
    cluster.primary.crash()
    new = cluster.failover("replica_1")
    write(new, "while it was down")
    cluster.wait_caught_up()
    assert (False, new) == (cluster.primary.running, cluster.leader)
    assert {"while it was down"} == notes(cluster.replicas["replica_2"])
    cluster.heal()
    assert cluster.primary is cluster.leader
    assert [{"while it was down"}] * 3 == everywhere(cluster)


def test_a_frozen_primary_comes_back_as_a_second_one(cluster: EmbeddedCluster) -> None:
    """After a failover around a frozen primary there are two when it is thawed; one leads."""
    cluster.primary.freeze()
    new = cluster.failover()
    cluster.primary.thaw()
    assert (2, new) == (in_recovery(cluster).count(False), cluster.leader)
    write(cluster.primary, "on the wrong one")
    write(new, "on the right one")
    cluster.heal()
    assert [False, True, True] == in_recovery(cluster)
    assert [{"on the right one"}] * 3 == everywhere(cluster)


def test_a_replica_can_follow_a_replica(cluster: EmbeddedCluster) -> None:
    """A cascade streams through the middle, also over a promotion at its head."""
    middle, end = cluster.replicas.values()
    end.follow(middle)
    write(cluster.primary, "through the middle")
    assert middle.port == stream(end)[0]
    assert [{"through the middle"}] * 3 == everywhere(cluster)
    middle.promote()
    write(middle, "from the middle")
    wait_until(lambda: "from the middle" in notes(end), WAIT_SECONDS)
    assert middle.timeline() == stream(end)[1]


def test_a_paused_replica_follows_when_it_resumes(cluster: EmbeddedCluster) -> None:
    """Following while replay is paused cuts the old stream, and takes effect afterwards."""
    source, paused = cluster.replicas.values()
    paused.pause_replay()
    paused.follow(source)
    assert "stopped" == paused.receiver_state()
    write(cluster.primary, "after")
    assert set() == notes(paused)
    paused.resume_replay()
    wait_until(lambda: notes(paused) == {"after"}, WAIT_SECONDS)
    assert source.port == stream(paused)[0]


def test_settings_of_a_node_outlive_a_rewind_and_a_copy(cluster: EmbeddedCluster) -> None:
    """A node keeps its own settings; an apply delay ends, and none comes from the source."""
    old, new = cluster.primary, cluster.replicas["replica_1"]
    old.configure("work_mem", "7MB")
    new.configure("work_mem", "9MB")
    new.apply_delay(0.001)
    cluster.failover("replica_1")
    shown = [old.value("SHOW work_mem"), old.value("SHOW recovery_min_apply_delay")]
    assert ["7MB", "0"] == shown
    old.rebuild()
    assert "7MB" == old.value("SHOW work_mem")
    for node in (old, new):
        node.execute("ALTER SYSTEM RESET work_mem")


def test_commits_go_on_waiting_for_replicas_after_a_failover() -> None:
    """A cluster with synchronous replicas has them under every leader."""
    with EmbeddedCluster(2, synchronous=1) as pg:
        leader = pg.failover("replica_1")
        states = [("quorum",), ("quorum",)]
        assert states == leader.execute("SELECT sync_state FROM pg_stat_replication")
        pg.heal()
        assert states == pg.primary.execute("SELECT sync_state FROM pg_stat_replication")


def test_mistakes_are_refused_before_anything_happens(cluster: EmbeddedCluster) -> None:
    """Who cannot follow or take over is named, and nothing has changed."""
    primary, (first, second) = cluster.primary, cluster.replicas.values()
    with pytest.raises(ClusterError, match=r"primary is a primary: rewind\(\) it"):
        primary.follow(first)
    for change in (first.follow, first.rewind):
        with pytest.raises(ClusterError, match="replica_1 cannot"):
            change(first)
    with pytest.raises(ClusterError, match="primary cannot take over"):
        cluster.failover("primary")
    second.crash()
    with pytest.raises(ClusterError, match="replica_2 is not running"):
        first.rewind(second)
    with pytest.raises(ClusterError, match="replica_2 cannot take over"):
        cluster.failover("replica_2")
    assert (True, True, "streaming") == (primary.running, first.running, first.receiver_state())
    first.crash()
    with pytest.raises(ClusterError, match="no replica that runs can take over from primary"):
        cluster.failover()


@pytest.mark.parametrize("fault", ["none", "crash", "stop", "freeze"])
def test_healing_leads_back_from_anywhere(cluster: EmbeddedCluster, fault: str) -> None:
    """Whatever happened to the new leader, its data is kept under the first topology."""
    leader = cluster.failover()
    write(leader, "of the leader")
    if fault != "none":
        getattr(leader, fault)()
    cluster.primary.freeze()
    cluster.heal()
    assert [False, True, True] == in_recovery(cluster)
    assert ["primary", "replica", "replica"] == [node.role for node in cluster.nodes.values()]
    assert [{"of the leader"}] * 3 == everywhere(cluster)
