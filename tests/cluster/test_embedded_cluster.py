"""The embedded cluster and each of its faults, judged by what the servers themselves answer."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Iterator

import psycopg
import pytest

from lsn_consistency.lsn import Lsn
from lsn_consistency.testing import ClusterError, EmbeddedCluster, EmbeddedNode, Node
from lsn_consistency.testing._reaper import processes_in, tree
from lsn_consistency.testing.node import StopMode

WAIT_SECONDS = 10.0
SILENCE_SECONDS = 0.2


@pytest.fixture(scope="module")
def module_cluster() -> Iterator[EmbeddedCluster]:
    with EmbeddedCluster(replicas=2) as pg:
        pg.primary.execute("CREATE TABLE numbers (n int)")
        yield pg


@pytest.fixture
def cluster(module_cluster: EmbeddedCluster) -> EmbeddedCluster:
    module_cluster.heal()
    module_cluster.primary.execute("TRUNCATE numbers")
    module_cluster.wait_caught_up()
    return module_cluster


@pytest.fixture
def replica(cluster: EmbeddedCluster) -> EmbeddedNode:
    return cluster.replicas["replica_1"]


def insert(cluster: EmbeddedCluster) -> None:
    cluster.primary.execute("INSERT INTO numbers VALUES (1)")


def count(node: Node) -> int:
    return int(node.value("SELECT count(*) FROM numbers"))


def answers(connection: psycopg.Connection[object], seconds: float) -> bool:
    """Send a query without waiting for it, and return whether an answer comes."""
    connection.pgconn.send_query(b"SELECT 1")
    connection.pgconn.flush()
    return bool(select.select([connection.fileno()], [], [], seconds)[0])


def test_every_node_is_the_server_that_its_conninfo_names(cluster: EmbeddedCluster) -> None:
    """Names, roles and ports are those of the servers that answer."""
    statement = "SELECT inet_server_port(), pg_is_in_recovery(), current_setting('cluster_name')"
    answered = {}
    for name, node in cluster.nodes.items():
        with psycopg.connect(node.conninfo) as connection:
            answered[name] = connection.execute(statement).fetchone()
    expected = {
        name: (node.port, node.role == "replica", name) for name, node in cluster.nodes.items()
    }
    assert expected == answered
    assert ["primary", "replica_1", "replica_2"] == list(answered)


def test_replicas_are_streaming_when_the_cluster_is_up(cluster: EmbeddedCluster) -> None:
    """Both replicas stream from the primary, each under its own name."""
    statement = "SELECT application_name, state FROM pg_stat_replication ORDER BY 1"
    expected = [("replica_1", "streaming"), ("replica_2", "streaming")]
    assert expected == cluster.primary.execute(statement)


def test_app_is_a_plain_role_that_can_make_tables(cluster: EmbeddedCluster) -> None:
    """The account `app` has no privileges but those that an application needs."""
    with cluster.primary.connect(user="app") as connection:
        connection.execute("CREATE TABLE owned (n int)")
        connection.execute("DROP TABLE owned")
        row = connection.execute(
            "SELECT rolsuper, rolreplication, rolcreaterole, rolcreatedb,"
            " pg_has_role('pg_monitor', 'member') FROM pg_roles WHERE rolname = current_user"
        ).fetchone()
    assert (False,) * 5 == row


def test_conninfo_takes_any_libpq_option(cluster: EmbeddedCluster) -> None:
    """`conninfo_for` adds options and another account."""
    conninfo = cluster.primary.conninfo_for(user="app", application_name="a shop")
    with psycopg.connect(conninfo) as connection:
        row = connection.execute("SELECT current_user, current_setting('application_name')")
        assert ("app", "a shop") == row.fetchone()


def test_execute_passes_parameters_and_returns_rows(cluster: EmbeddedCluster) -> None:
    """Rows of a query come back; a statement without rows gives none."""
    assert [(3, "x")] == cluster.primary.execute("SELECT %s::int, %s::text", [3, "x"])
    assert [] == cluster.primary.execute("CREATE TABLE IF NOT EXISTS numbers (n int)")


def test_a_paused_replica_misses_what_is_written(
    cluster: EmbeddedCluster, replica: EmbeddedNode
) -> None:
    """Pausing holds one replica back; the other one goes on; resuming ends it."""
    replica.pause_replay()
    before = replica.replay_lsn()
    insert(cluster)
    cluster.wait_caught_up()
    assert (0, 1) == (count(replica), count(cluster.replicas["replica_2"]))
    assert before == replica.replay_lsn()
    replica.resume_replay()
    cluster.wait_caught_up()
    assert (1, False) == (count(replica), replica.paused)


def test_caught_up_includes_commits_that_are_not_on_disk(cluster: EmbeddedCluster) -> None:
    """After `synchronous_commit=off` the replicas have the row, although nobody flushed it."""
    with cluster.primary.connect() as connection:
        connection.execute("SET synchronous_commit = off")
        for number in range(1, 31):
            connection.execute("INSERT INTO numbers VALUES (%s)", [number])
            cluster.wait_caught_up()
            assert [number, number] == [count(node) for node in cluster.replicas.values()]


def test_caught_up_writes_nothing_on_an_idle_primary(cluster: EmbeddedCluster) -> None:
    """Waiting does not move the position of a primary whose commits are on disk."""
    insert(cluster)
    statement = "SELECT pg_current_wal_insert_lsn(), pg_current_wal_flush_lsn()"
    inserted, flushed = cluster.primary.execute(statement)[0]
    cluster.wait_caught_up()
    assert inserted == flushed
    assert (inserted, flushed) == cluster.primary.execute(statement)[0]


def test_the_error_says_who_is_behind_and_how_far(
    cluster: EmbeddedCluster, replica: EmbeddedNode
) -> None:
    """Who waits in vain is told the replica, the bytes and what it lacks."""
    replica.stop_replication()
    behind = replica.replay_lsn()
    insert(cluster)
    flushed = Lsn.parse(cluster.primary.value("SELECT pg_current_wal_flush_lsn()::text"))
    with pytest.raises(ClusterError) as caught:
        cluster.wait_caught_up(timeout=SILENCE_SECONDS)
    message = caught.value.message
    assert f"replica_1 is {flushed - behind} bytes behind" in message
    assert "walreceiver stopped" in message
    assert "replica_2" not in message


def test_an_apply_delay_holds_commits_back_for_its_seconds(
    cluster: EmbeddedCluster, replica: EmbeddedNode
) -> None:
    """A delayed replica shows a commit after the delay, and at once when the delay is over."""
    replica.apply_delay(0.5)
    started = time.monotonic()
    insert(cluster)
    assert 0 == count(replica)
    cluster.wait_caught_up()
    assert (1, True) == (count(replica), time.monotonic() - started >= 0.5)
    replica.apply_delay(0)
    assert "0" == replica.value("SHOW recovery_min_apply_delay")


def test_ending_a_delay_releases_what_it_holds_back(
    cluster: EmbeddedCluster, replica: EmbeddedNode
) -> None:
    """A long delay can be ended while a commit waits in it."""
    replica.apply_delay(3600)
    insert(cluster)
    assert 0 == count(replica)
    replica.apply_delay(0)
    cluster.wait_caught_up()
    assert 1 == count(replica)


@pytest.mark.parametrize("name", ["primary", "replica_1"])
def test_a_frozen_node_answers_nothing_until_it_is_thawed(
    cluster: EmbeddedCluster, name: str
) -> None:
    """Freezing holds every process; what was sent meanwhile is answered after the thaw."""
    node = cluster.nodes[name]
    with contextlib.closing(node.connect()) as connection:
        node.freeze()
        assert {True} == {process.stopped for process in tree(node.pid)}
        assert not answers(connection, SILENCE_SECONDS)
        node.thaw()
        assert select.select([connection.fileno()], [], [], WAIT_SECONDS)[0]
    assert {False} == {process.stopped for process in tree(node.pid)}


def test_a_frozen_node_says_so(replica: EmbeddedNode) -> None:
    """Asking a frozen node is an error at once, and not a wait."""
    replica.freeze()
    replica.freeze()
    with pytest.raises(ClusterError, match=r"replica_1 is frozen: thaw\(\) it first"):
        replica.execute("SELECT 1")


def test_a_crash_leaves_no_process_and_no_shutdown(
    cluster: EmbeddedCluster, replica: EmbeddedNode
) -> None:
    """A crashed replica has had no chance to shut down, and comes back on the same port."""
    port, pid = replica.port, replica.pid
    size = replica.log.stat().st_size
    replica.crash()
    assert [] == processes_in(replica.datadir)
    assert "shutting down" not in replica.log.read_text()[size:]
    with pytest.raises(ClusterError, match=r"replica_1 is not running: start\(\) it first"):
        replica.connect()
    replica.start()
    assert "interrupted while in recovery" in replica.log.read_text()[size:]
    assert (port, True) == (replica.port, replica.pid != pid)
    insert(cluster)
    cluster.wait_caught_up()
    assert 1 == count(replica)


def test_a_frozen_node_can_crash(replica: EmbeddedNode) -> None:
    """Killing works on processes that are held, and the start after it is a thawed one."""
    replica.freeze()
    replica.crash()
    assert ([], False) == (processes_in(replica.datadir), replica.running)
    replica.start()
    assert 0 == count(replica)


def test_a_crashed_backend_restarts_the_server_under_the_same_postmaster(
    replica: EmbeddedNode,
) -> None:
    """Every connection breaks, while the start time of the server stays what it was."""
    statement = "SELECT pg_postmaster_start_time()"
    started, pid = replica.value(statement), replica.pid
    with replica.connect() as bystander:
        replica.crash_backend()
        with pytest.raises(psycopg.OperationalError):
            bystander.execute("SELECT 1")
    assert (started, pid) == (replica.value(statement), replica.pid)


@pytest.mark.parametrize("mode", ["fast", "immediate", "smart"])
def test_a_frozen_node_can_be_stopped(replica: EmbeddedNode, mode: StopMode) -> None:
    """Every way of stopping works on a frozen node; the port survives."""
    port = replica.port
    replica.freeze()
    replica.stop(mode)
    assert (False, False, []) == (replica.running, replica.frozen, processes_in(replica.datadir))
    replica.start()
    assert port == replica.value("SELECT inet_server_port()")


def test_stopping_and_starting_twice_does_nothing(replica: EmbeddedNode) -> None:
    """A fault that is there already is no error."""
    pid = replica.pid
    replica.start()
    assert pid == replica.pid
    replica.stop()
    replica.stop()
    replica.crash()
    replica.restart()
    assert pid != replica.pid


@pytest.mark.parametrize("paused", [False, True])
def test_a_replica_cut_off_receives_nothing(
    cluster: EmbeddedCluster, replica: EmbeddedNode, paused: bool
) -> None:
    """Without replication the walreceiver is gone, also while replay is paused."""
    if paused:
        replica.pause_replay()
    replica.stop_replication()
    received = replica.value("SELECT pg_last_wal_receive_lsn()")
    insert(cluster)
    assert "stopped" == replica.receiver_state()
    assert received == replica.value("SELECT pg_last_wal_receive_lsn()")
    replica.start_replication()
    if paused:
        replica.resume_replay()
    cluster.wait_caught_up()
    assert (1, "streaming") == (count(replica), replica.receiver_state())


def test_a_promoted_replica_is_a_primary_until_it_is_healed(
    cluster: EmbeddedCluster, replica: EmbeddedNode
) -> None:
    """Promotion gives a second primary with a history of its own; healing throws it away."""
    replica.promote()
    replica.execute("INSERT INTO numbers VALUES (1), (2)")
    assert ("primary", 2) == (replica.role, count(replica))
    cluster.heal()
    insert(cluster)
    cluster.wait_caught_up()
    assert ("replica", 1) == (replica.role, count(replica))


def test_healing_undoes_every_fault_at_once(
    cluster: EmbeddedCluster, replica: EmbeddedNode
) -> None:
    """Whatever was done to the nodes, afterwards they run, stream and have caught up."""
    copies = [node.datadir.stat().st_ino for node in cluster.nodes.values()]
    other = cluster.replicas["replica_2"]
    replica.apply_delay(3600)
    replica.pause_replay()
    replica.stop_replication()
    replica.freeze()
    other.crash()
    insert(cluster)
    cluster.primary.freeze()
    cluster.heal()
    assert [1, 1, 1] == [count(node) for node in cluster.nodes.values()]
    assert ("walreceiver streaming, apply delay 0", False) == (replica.describe(), replica.paused)
    assert copies == [node.datadir.stat().st_ino for node in cluster.nodes.values()]


@pytest.mark.parametrize("fault", ["stop", "crash", "crash_backend"])
def test_healing_brings_the_primary_back(cluster: EmbeddedCluster, fault: str) -> None:
    """The primary is started again with its data, and its replicas find it."""
    insert(cluster)
    getattr(cluster.primary, fault)()
    cluster.heal()
    insert(cluster)
    cluster.wait_caught_up()
    assert [2, 2, 2] == [count(node) for node in cluster.nodes.values()]


def test_a_replica_that_lost_its_way_is_copied_anew(
    cluster: EmbeddedCluster, replica: EmbeddedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that cannot follow the primary any more is healed by a new copy."""
    monkeypatch.setattr("lsn_consistency.testing.node.REJOIN_SECONDS", SILENCE_SECONDS)
    replica.stop()
    (replica.datadir / "postgresql.auto.conf").write_text(
        "primary_conninfo = 'host=127.0.0.1 port=1'\n"
    )
    insert(cluster)
    cluster.heal()
    assert (1, "streaming") == (count(replica), replica.receiver_state())
