"""The proxy and each of its faults, seen from both of its sides: the socket and the server."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest

from lsn_consistency.testing import ClusterError, EmbeddedCluster, TcpProxy
from lsn_consistency.testing import proxy as proxies
from tests.cluster.harness import wait_until

SILENCE_SECONDS = 0.3
ANSWER_SECONDS = 30.0
APPLICATION = "through the proxy"

Connection = psycopg.Connection[tuple[object, ...]]


@pytest.fixture
def proxy(pg: EmbeddedCluster) -> Iterator[TcpProxy]:
    with TcpProxy(pg.primary) as proxy:
        yield proxy


def connect(proxy: TcpProxy) -> Connection:
    conninfo = proxy.conninfo_for(application_name=APPLICATION, connect_timeout=10)
    return psycopg.connect(conninfo, autocommit=True)


def send(connection: Connection, statement: bytes = b"SELECT 1") -> None:
    """Send a statement and do not wait for its answer."""
    connection.pgconn.send_query(statement)
    assert 0 == connection.pgconn.flush()


def readable(connection: Connection, seconds: float) -> bool:
    """Return whether anything comes within the time: data, an end or a reset."""
    return bool(select.select([connection.fileno()], [], [], seconds)[0])


def backends(pg: EmbeddedCluster) -> int:
    """Ask the server, not the proxy, how many connections came through the proxy."""
    statement = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{APPLICATION}'"
    return int(pg.primary.value(statement))


def is_reset(connection: Connection) -> bool:
    """Return whether the kernel reports a reset, which no orderly end leaves behind."""
    with socket.socket(fileno=os.dup(connection.fileno())) as side:
        assert readable(connection, ANSWER_SECONDS)
        try:
            side.recv(1)
        except ConnectionResetError:
            return True
        return False


@contextmanager
def both_ends() -> Iterator[tuple[TcpProxy, socket.socket, socket.socket]]:
    """Connect a client to a server that does nothing by itself, over a proxy."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        TcpProxy(f"host=127.0.0.1 port={listener.getsockname()[1]}") as proxy,
        closing(socket.create_connection((proxy.host, proxy.port))) as client,
    ):
        listener.settimeout(ANSWER_SECONDS)
        server, _ = listener.accept()
        server.settimeout(ANSWER_SECONDS)
        with server:
            yield proxy, client, server


# -- forwarding -----------------------------------------------------------------------------------


def test_connections_reach_the_server(pg: EmbeddedCluster, proxy: TcpProxy) -> None:
    """Several connections at once are served by the server behind the proxy."""
    connections = [connect(proxy) for _ in range(5)]
    asked = [link.execute("SELECT inet_server_port()").fetchone() for link in connections]
    assert [(pg.primary.port,)] * 5 == asked
    assert (5, 5) == (proxy.connections, backends(pg))
    assert proxy.port not in {node.port for node in pg.nodes.values()}
    for connection in connections:
        connection.close()
    wait_until(lambda: (proxy.connections, backends(pg)) == (0, 0))


def test_conninfo_is_that_of_the_server_over_the_proxy(
    pg: EmbeddedCluster, proxy: TcpProxy
) -> None:
    """Account, database and options are the server's; others can be asked for."""
    with psycopg.connect(proxy.conninfo) as connection:
        assert ("postgres",) == connection.execute("SELECT current_user").fetchone()
    with psycopg.connect(proxy.conninfo_for("app", application_name="a shop")) as connection:
        row = connection.execute("SELECT current_user, current_setting('application_name')")
        assert ("app", "a shop") == row.fetchone()
    with TcpProxy(pg.primary.conninfo_for("app")) as other, psycopg.connect(other.conninfo) as app:
        assert ("app",) == app.execute("SELECT current_user").fetchone()


def test_bulk_passes_unchanged_both_ways(proxy: TcpProxy) -> None:
    """Thirty megabytes up and down arrive as they were."""
    text = "".join(chr(32 + number % 90) for number in range(1_000_003)) * 30
    with connect(proxy) as connection:
        row = connection.execute("SELECT %s::text, md5(%s::text)", [text, text]).fetchone()
    assert row is not None
    assert text == row[0]


def test_an_end_passes_in_each_direction(pg: EmbeddedCluster, proxy: TcpProxy) -> None:
    """When one side goes the other is told."""
    connection = connect(proxy)
    pg.primary.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
        [APPLICATION],
    )
    # With the server's reason, if it came before the end.
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    connect(proxy).close()
    wait_until(lambda: (proxy.connections, backends(pg)) == (0, 0))


def test_a_server_that_is_down_breaks_new_connections() -> None:
    """A connection for which there is no server is reset."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with TcpProxy(f"host=127.0.0.1 port={nobody.getsockname()[1]}") as proxy:
            with closing(socket.create_connection((proxy.host, proxy.port))) as client:
                client.settimeout(ANSWER_SECONDS)
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
            wait_until(lambda: proxy.connections == 0)


def test_a_server_that_does_not_read_holds_its_client_back() -> None:
    """The proxy keeps a bounded number of bytes and takes no more."""
    with both_ends() as (_, client, server):
        client.setblocking(False)
        sent, block = 0, bytes(1 << 20)
        while select.select([], [client], [], SILENCE_SECONDS)[1]:
            sent += client.send(block)
            assert sent < 200 << 20
        received = 0
        while received < sent:
            received += len(server.recv(1 << 20))
    assert sent == received


# -- faults ---------------------------------------------------------------------------------------


def test_latency_delays_both_directions(proxy: TcpProxy) -> None:
    """A round trip takes twice the latency, until it is healed."""
    with connect(proxy) as connection:
        proxy.latency(0.2)
        began = time.monotonic()
        connection.execute("SELECT 1")
        assert time.monotonic() - began >= 0.4
        proxy.heal()
        fastest = min(_seconds(connection) for _ in range(20))
        assert fastest < 0.2


def _seconds(connection: Connection) -> float:
    began = time.monotonic()
    connection.execute("SELECT 1")
    return time.monotonic() - began


def test_latency_keeps_order_and_lets_many_bytes_travel_at_once(proxy: TcpProxy) -> None:
    """A hundred statements in one pipeline take one latency each way, and not a hundred."""
    with connect(proxy) as connection:
        proxy.latency(0.25)
        began = time.monotonic()
        with connection.pipeline():
            cursors = [connection.execute(f"SELECT {number}".encode()) for number in range(100)]
        seconds = time.monotonic() - began
        assert [(number,) for number in range(100)] == [cursor.fetchone() for cursor in cursors]
        assert 0.5 <= seconds < 100 * 2 * 0.25


def test_less_latency_overtakes_nothing(proxy: TcpProxy) -> None:
    """What is sent after the latency ended arrives after what was sent before."""
    with both_ends() as (slow, client, server):
        slow.latency(0.3)
        client.sendall(b"a")
        assert not select.select([server], [], [], 0.05)[0]
        slow.latency(0)
        client.sendall(b"b")
        client.shutdown(socket.SHUT_WR)
        assert b"ab" == b"".join(iter(lambda: server.recv(8), b""))


def test_a_black_hole_takes_everything_and_answers_nothing(
    pg: EmbeddedCluster, proxy: TcpProxy
) -> None:
    """Old and new connections get no answer, no end and no refusal; healing resets them."""
    with closing(connect(proxy)) as connection:
        proxy.black_hole()
        send(connection, b"CREATE TABLE never_made ()")
        with closing(socket.create_connection((proxy.host, proxy.port))) as newcomer:
            newcomer.sendall(b"hello")
            sides = [connection.fileno(), newcomer.fileno()]
            assert ([], [], []) == select.select(sides, [], [], SILENCE_SECONDS)
            assert pg.primary.value("SELECT to_regclass('never_made')") is None
            proxy.heal()
            newcomer.settimeout(ANSWER_SECONDS)
            with pytest.raises(ConnectionResetError):
                newcomer.recv(1)
        assert is_reset(connection)
    with closing(connect(proxy)) as connection:
        connection.execute("SELECT 1")


def test_a_black_hole_swallows_answers_and_ends(pg: EmbeddedCluster, proxy: TcpProxy) -> None:
    """What the server sends vanishes too, also the news that it has crashed."""
    with closing(connect(proxy)) as waiting, closing(connect(proxy)) as idle:
        send(waiting, b"SELECT pg_sleep(0.2)")
        wait_until(lambda: _sleeping(pg))
        proxy.black_hole()
        pg.primary.crash()
        assert not readable(waiting, SILENCE_SECONDS)
        assert not readable(idle, 0)
        pg.primary.start()
        assert not readable(idle, SILENCE_SECONDS)
        proxy.heal()
        assert (True, True) == (is_reset(waiting), is_reset(idle))


def _sleeping(pg: EmbeddedCluster) -> bool:
    return bool(
        pg.primary.value("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
    )


def test_a_connection_that_was_silent_survives_a_black_hole(
    pg: EmbeddedCluster, proxy: TcpProxy
) -> None:
    """Nothing was lost on it, so it goes on with the same backend."""
    with connect(proxy) as connection:
        pid = connection.execute("SELECT pg_backend_pid()").fetchone()
        proxy.black_hole()
        proxy.heal()
        assert pid == connection.execute("SELECT pg_backend_pid()").fetchone()


def test_a_black_hole_drops_what_is_on_its_way(proxy: TcpProxy) -> None:
    """Bytes that latency holds back do not come out of the hole."""
    with closing(connect(proxy)) as connection:
        proxy.latency(0.2)
        send(connection)
        proxy.black_hole()
        assert not readable(connection, 2 * SILENCE_SECONDS)
        proxy.heal()
        assert is_reset(connection)


def test_a_reset_breaks_what_is_there_and_nothing_else(
    pg: EmbeddedCluster, proxy: TcpProxy
) -> None:
    """Both sides of every connection see it; new connections work at once."""
    with closing(connect(proxy)) as one, closing(connect(proxy)) as two:
        assert 2 == backends(pg)
        proxy.reset()
        assert (True, True, 0) == (is_reset(one), is_reset(two), proxy.connections)
        with pytest.raises(psycopg.OperationalError):
            one.execute("SELECT 1")
    wait_until(lambda: backends(pg) == 0)
    with closing(connect(proxy)) as three:
        assert (1,) == three.execute("SELECT 1").fetchone()


def test_a_half_open_connection_is_over_at_the_server_only(
    pg: EmbeddedCluster, proxy: TcpProxy
) -> None:
    """The server has closed, the client can send and is never told; healing resets it."""
    with closing(connect(proxy)) as old:
        proxy.half_open()
        wait_until(lambda: backends(pg) == 0)
        send(old)
        assert not readable(old, SILENCE_SECONDS)
        with closing(connect(proxy)) as new:
            assert (1,) == new.execute("SELECT 1").fetchone()
            proxy.heal()
            assert is_reset(old)
            assert (1,) == new.execute("SELECT 1").fetchone()


def test_refused_connections_are_refused_and_the_others_go_on(proxy: TcpProxy) -> None:
    """New connections are refused as by a host without a server, until the same port is healed."""
    port = proxy.port
    with closing(connect(proxy)) as connection:
        proxy.refuse()
        proxy.refuse()
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((proxy.host, proxy.port))
        assert (1,) == connection.execute("SELECT 1").fetchone()
        proxy.heal()
        assert port == proxy.port
        connect(proxy).close()
        assert (1,) == connection.execute("SELECT 1").fetchone()


# -- life -----------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_closed_proxy(pg: EmbeddedCluster) -> None:
    """Threads and sockets are gone, under every fault, and the server's connections too."""
    descriptors = Path("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd")
    # What earlier tests left in cycles is not counted, for it may go at any time.
    gc.collect()
    before = (threading.active_count(), len(list(descriptors.iterdir())))
    for fault in ("heal", "black_hole", "half_open", "refuse", "reset"):
        with (
            TcpProxy(pg.primary) as proxy,
            closing(connect(proxy)) as connection,
            closing(connect(proxy)) as other,
        ):
            getattr(proxy, fault)()
            if fault != "reset":
                send(other)
            proxy.close()
            assert is_reset(connection)
        assert before == (threading.active_count(), len(list(descriptors.iterdir())))
    wait_until(lambda: backends(pg) == 0)


def test_a_lookup_of_a_host_name_leaves_no_thread() -> None:
    """Threads are gone when close() returns, also those that resolve the name of the server."""
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(20):
            with (
                TcpProxy(f"host=localhost port={listener.getsockname()[1]}") as proxy,
                closing(socket.create_connection((proxy.host, proxy.port))),
            ):
                listener.accept()[0].close()
            assert before == threading.active_count()


def test_a_port_that_somebody_took_is_an_error_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A refusing proxy keeps nobody off its port who insists; heal() and start() say so."""
    bound = proxies._bound

    def bound_too_late(port: int) -> socket.socket:
        listener = bound(port)
        rivals.append(_listening(port))
        return listener

    rivals: list[socket.socket] = []
    threads = threading.active_count()
    with TcpProxy("host=127.0.0.1 port=1") as proxy:
        proxy.refuse()
        with _listening(proxy.port), pytest.raises(ClusterError, match=f"port {proxy.port} has"):
            proxy.heal()
        proxy.heal()
        socket.create_connection((proxy.host, proxy.port)).close()
    monkeypatch.setattr(proxies, "_bound", bound_too_late)
    with pytest.raises(ClusterError, match="has been taken"):
        proxy.start()
    assert threads == threading.active_count()
    for rival in rivals:
        rival.close()
    monkeypatch.undo()
    with proxy:
        socket.create_connection((proxy.host, proxy.port)).close()


def _listening(port: int) -> socket.socket:
    """Listen on a port that somebody else is bound to, as PostgreSQL would."""
    rival = socket.socket()
    rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    rival.bind(("127.0.0.1", port))
    rival.listen()
    return rival


def test_a_proxy_runs_once_at_a_time_and_again_on_its_port(pg: EmbeddedCluster) -> None:
    """Starting twice is an error; a closed proxy says so, and starts again without faults."""
    proxy = TcpProxy(pg.primary)
    with pytest.raises(ClusterError, match="the proxy is not running"):
        proxy.reset()
    with proxy:
        port = proxy.port
        proxy.refuse()
        with pytest.raises(ClusterError, match="running already"):
            proxy.start()
    proxy.close()
    with proxy, closing(connect(proxy)):
        assert port == proxy.port


def test_a_proxy_serves_the_event_loop_that_breaks_it(proxy: TcpProxy) -> None:
    """Async connections over it work from the loop that calls its methods, and it runs on."""

    async def scenario() -> int:
        async with await psycopg.AsyncConnection.connect(proxy.conninfo) as connection:
            proxy.latency(0.2)
            answer = asyncio.create_task(connection.execute("SELECT 1"))
            turns = 0
            while not answer.done():
                await asyncio.sleep(0.01)
                turns += 1
            proxy.heal()
            assert (1,) == await (await answer).fetchone()
        return turns

    assert asyncio.run(scenario()) > 2
