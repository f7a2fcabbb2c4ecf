"""The containers do what their methods promise; above all, a network that is cut is silent."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from lsn_consistency.testing import ClusterError, ContainerCluster, ContainerNode
from lsn_consistency.testing._machines import open_engine
from tests.containers.traffic import AGAIN_SECONDS, FAULTS

SILENT_SECONDS = 1.5
CONNECT_SECONDS = 2
"""The least that libpq takes; the kernel gives up a neighbour that is gone after about three."""


def _silent(conn: psycopg.Connection[Any]) -> bool:
    """Send a query; return whether nothing at all comes back, neither data nor an end."""
    conn.pgconn.send_query(b"SELECT 1")
    conn.pgconn.flush()
    readable, _, _ = select.select([conn.pgconn.socket], [], [], SILENT_SECONDS)
    return not readable


def _answered(conn: psycopg.Connection[Any]) -> bool:
    """Return whether the query that was sent is answered after all."""
    readable, _, _ = select.select([conn.pgconn.socket], [], [], AGAIN_SECONDS)
    if readable:
        conn.pgconn.consume_input()
    return bool(readable) and conn.pgconn.get_result() is not None


@contextmanager
def _held(node: ContainerNode) -> Iterator[psycopg.Connection[Any]]:
    """Hold a connection over a fault; closing it must not wait for the server."""
    conn = node.connect()
    try:
        yield conn
    finally:
        conn.close()


@pytest.mark.parametrize("fault", ["disconnected", "paused"])
def test_a_node_that_is_cut_off_or_paused_is_silent_and_refuses_nothing(
    pg: ContainerCluster, fault: str
) -> None:
    """No byte and no end on an open connection, no answer to a new one; afterwards it goes on."""
    begin, end = FAULTS[fault]
    node = pg.replicas["replica_1"]
    with _held(node) as conn:
        begin(node)
        silent = _silent(conn)
        with pytest.raises(psycopg.errors.ConnectionTimeout):
            psycopg.connect(node.conninfo_for(connect_timeout=CONNECT_SECONDS))
        with pytest.raises(ClusterError, match=r"disconnected|frozen"):
            node.connect()
        running = node.running
        end(node)
        answered = _answered(conn)
    assert (True, True, True) == (silent, running, answered)
    assert 1 == node.value("SELECT 1")


@pytest.mark.parametrize("power_fails", [False, True])
def test_a_killed_machine_comes_back_under_its_address_with_its_data(
    pg: ContainerCluster, table: str, power_fails: bool
) -> None:
    """A kill ends connections, after disconnect() nobody is told; data and address stay."""
    node = pg.replicas["replica_1"]
    before = node.conninfo
    with _held(node) as conn:
        if power_fails:
            node.disconnect()
        node.kill()
        silent = _silent(conn)
        running = node.running
        with pytest.raises(psycopg.errors.ConnectionTimeout):
            psycopg.connect(node.conninfo_for(connect_timeout=CONNECT_SECONDS))
    pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
    node.reconnect()
    node.start()
    pg.wait_caught_up()
    assert (power_fails, False) == (silent, running)
    assert (before, 1) == (node.conninfo, node.value(f"SELECT count(*) FROM {table}"))


def test_a_paused_machine_can_be_killed(pg: ContainerCluster) -> None:
    """crash() needs no thaw() before it."""
    node = pg.replicas["replica_2"]
    node.freeze()
    node.crash()
    assert (False, False) == (node.running, node.frozen)


def test_a_replica_can_be_cut_off_from_the_primary_alone(pg: ContainerCluster, table: str) -> None:
    """disconnect("replication"): clients are served, nothing arrives, until reconnect()."""
    node = pg.replicas["replica_1"]
    node.disconnect("replication")
    pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
    target = pg.primary.value("SELECT pg_current_wal_insert_lsn()::text")
    other = pg.replicas["replica_2"]
    while not other.value(f"SELECT pg_last_wal_replay_lsn() >= '{target}'"):
        time.sleep(0.01)
    # wal_receiver_timeout is 5 s: the replica gives its primary up and finds no other way to it.
    ends = time.monotonic() + 7
    seen = set()
    while time.monotonic() < ends:
        seen.add(node.value(f"SELECT count(*) FROM {table}"))
        time.sleep(0.2)
    cut_off = node.disconnected
    node.reconnect()
    pg.wait_caught_up()
    assert ({0}, frozenset({"replication"})) == (seen, cut_off)
    assert 1 == node.value(f"SELECT count(*) FROM {table}")


def test_a_replica_can_be_cut_off_from_its_clients_alone(pg: ContainerCluster, table: str) -> None:
    """disconnect("clients"): it replicates, and run() still reaches it."""
    node = pg.replicas["replica_1"]
    node.disconnect("clients")
    pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
    count = ["-h", "127.0.0.1", "-p", str(node.port), "-Atc", f"SELECT count(*) FROM {table}"]
    ends = time.monotonic() + AGAIN_SECONDS
    while (found := node.run("psql", *count).strip()) != "1" and time.monotonic() < ends:
        time.sleep(0.05)
    with pytest.raises(ClusterError, match="disconnected"):
        node.value("SELECT 1")
    assert "1" == found


def test_heal_undoes_every_fault_at_once(pg: ContainerCluster, table: str) -> None:
    """Disconnected, then killed; paused, cut off: afterwards all are replicas without lag."""
    first, second = pg.replicas.values()
    first.disconnect()
    first.kill()
    second.disconnect("replication")
    second.pause()
    pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
    pg.heal()
    states = [(node.reachable, node.role, node.disconnected) for node in pg.replicas.values()]
    counts = [node.value(f"SELECT count(*) FROM {table}") for node in pg.nodes.values()]
    assert [(True, "replica", frozenset())] * 2 == states
    assert [1, 1, 1] == counts


def test_a_node_heals_itself_of_a_cut_as_of_any_other_fault(pg: ContainerCluster) -> None:
    """heal() of one node, replica or primary, connects it to both networks again."""
    for node in (pg.replicas["replica_1"], pg.primary):
        node.disconnect()
        node.crash()
        node.heal()
        assert (frozenset(), True) == (node.disconnected, node.reachable)
    pg.wait_caught_up()


def test_a_failover_under_partition_and_the_way_back(pg: ContainerCluster, table: str) -> None:
    """The cut off primary goes on alone; rewound it loses that and follows; heal() leads back."""
    pg.primary.disconnect()
    insert = ["-h", "127.0.0.1", "-p", str(pg.primary.port), "-c", f"INSERT INTO {table} VALUES"]
    pg.primary.run("psql", *insert[:-1], f"{insert[-1]} (1)")
    leader = pg.failover("replica_2")
    leader.execute(f"INSERT INTO {table} VALUES (2), (3)")
    pg.primary.reconnect()
    two_primaries = [node.value("SELECT pg_is_in_recovery()") for node in (pg.primary, leader)]
    pg.primary.rewind(leader)
    pg.wait_caught_up()
    rewound = pg.primary.execute(f"SELECT id FROM {table} ORDER BY id")
    pg.heal()
    healed = [node.execute(f"SELECT id FROM {table} ORDER BY id") for node in pg.nodes.values()]
    assert [False, False] == two_primaries
    assert [(2,), (3,)] == rewound
    assert [[(2,), (3,)]] * 3 == healed
    assert pg.primary is pg.leader


def test_an_unknown_network_is_an_error(pg: ContainerCluster) -> None:
    """A misspelt name disconnects nothing."""
    with pytest.raises(ClusterError, match="no network 'client'"):
        pg.primary.disconnect("client")  # type: ignore[arg-type]
    assert frozenset() == pg.primary.disconnected


def _left(image: str) -> list[str]:
    """Return the names of the containers and networks of this process that the engine has."""
    from testcontainers.core.labels import LABEL_SESSION_ID, SESSION_ID

    # Tests in other processes start and remove clusters meanwhile.
    ours = {"label": f"{LABEL_SESSION_ID}={SESSION_ID}"}
    engine = open_engine(image)
    try:
        containers = engine.client.containers.list(all=True, filters=ours)
        return [thing.name for thing in [*containers, *engine.client.networks.list(filters=ours)]]
    finally:
        engine.client.close()


def test_nothing_is_left_of_a_cluster(pg: ContainerCluster) -> None:
    """Containers and networks are removed, frozen and disconnected ones too, and after errors."""
    before = _left(pg.image)
    with ContainerCluster(replicas=1, image=pg.image) as cluster:
        during = _left(pg.image)
        cluster.replicas["replica_1"].disconnect()
        cluster.primary.freeze()
    with pytest.raises(ClusterError, match="no_such_setting"):
        ContainerCluster(replicas=0, image=pg.image, settings={"no_such_setting": "1"}).start()
    after = _left(pg.image)
    assert 4 == len(set(during) - set(before))
    assert [] == [name for name in after if name not in before]


def test_a_network_that_could_not_be_made_is_not_left(
    pg: ContainerCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network that is made to learn of a free range goes, also if the engine says no more."""

    def refuse(network: object) -> None:
        from docker.errors import DockerException

        raise DockerException("no answer")

    before = set(_left(pg.image))
    cluster = ContainerCluster(replicas=0, image=pg.image)
    with monkeypatch.context() as patch:
        patch.setattr("docker.models.networks.Network.reload", refuse)
        with pytest.raises(ClusterError, match="no answer"):
            cluster.start()
    assert before == set(_left(pg.image))


def test_a_missing_image_is_said_at_once(pg: ContainerCluster) -> None:
    """The error names the image and what is needed."""
    image = "lsn-consistency/no-such-image:0"
    with pytest.raises(ClusterError, match=f"no image {image}.*DOCKER_HOST"):
        ContainerCluster(image=image).start()
