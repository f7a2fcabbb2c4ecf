"""Routers whose every connection goes over a proxy, while the network to one node is broken."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import psycopg
import pytest

from lsn_consistency import Reason, Token, current_session
from lsn_consistency.events import NodeFailed
from lsn_consistency.testing import EmbeddedCluster, TcpProxy
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import Answer, App, Connection, Kind, open_router, wait_until

PROBE_TIMEOUT = 0.5
POLL = 0.3
WAIT = 0.2
OVERDUE = 0.25
"""How late a probe may be before a read stops believing the last one."""

SLACK = 0.6
"""For a busy machine."""

AGAIN_SECONDS = 30.0

Proxies = dict[str, TcpProxy]


@pytest.fixture
def proxies(pg: EmbeddedCluster) -> Iterator[Proxies]:
    """Offer a proxy before each node, by the node's name."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(TcpProxy(node)) for name, node in pg.nodes.items()}


@pytest.fixture
def over(kind: Kind, pg: EmbeddedCluster, proxies: Proxies) -> OpenRouter:
    """Offer `open_router` for this kind, with every node behind its proxy."""
    conninfos = {name: proxy.conninfo for name, proxy in proxies.items()}
    return partial(
        open_router,
        kind,
        pg,
        primary=conninfos.pop("primary"),
        replicas=conninfos,
        probe_timeout=PROBE_TIMEOUT,
        connect_timeout=1.0,
        poll_interval=POLL,
        wait_seconds=WAIT,
    )


def _wrote(app: App, table: str) -> Token:
    """Write a row that every read has to see, and return its token."""
    app.write(f"INSERT INTO {table} VALUES (1)")
    token = current_session().token
    assert token is not None
    return token


def _reads(app: App, table: str, token: Token, seconds: float) -> list[Answer]:
    """Read as new clients for a time; every read sees the row."""
    found = []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with app.session(token):
            found.append(app.ask(f"SELECT count(*) FROM {table}"))
        time.sleep(0.005)
    assert {1} == {answer.value for answer in found}
    return found


def _ports(answers: list[Answer]) -> set[int]:
    return {answer.port for answer in answers}


def _serves_again(app: App, table: str, token: Token, port: int) -> None:
    """Wait until reads reach a server."""
    wait_until(
        lambda: port in _ports(_reads(app, table, token, 0.2)),
        AGAIN_SECONDS,
        lambda: str(app.snapshot()),
    )


def test_reads_leave_a_replica_in_a_black_hole_and_come_back(
    over: OpenRouter, pg: EmbeddedCluster, proxies: Proxies, table: str
) -> None:
    """Nothing answers and nothing says so: reads go elsewhere within probe_timeout."""
    lost, well = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with over() as app:
        token = _wrote(app, table)
        pg.wait_caught_up()
        _serves_again(app, table, token, lost.port)
        proxies[lost.name].black_hole()
        time.sleep(POLL + OVERDUE)
        after = _reads(app, table, token, 1.5)
        proxies[lost.name].heal()
        _serves_again(app, table, token, lost.port)
    assert {well.port} == _ports(after)
    assert max(answer.seconds for answer in after) < PROBE_TIMEOUT + WAIT + SLACK


def test_with_every_replica_in_a_black_hole_the_primary_serves(
    over: OpenRouter, pg: EmbeddedCluster, proxies: Proxies, table: str
) -> None:
    """Without any replica that answers, reads stay within the limits and go to the primary."""
    with over() as app:
        token = _wrote(app, table)
        app.wait_healthy()
        for name in pg.replicas:
            proxies[name].black_hole()
        time.sleep(POLL + OVERDUE)
        after = _reads(app, table, token, 2.0)
    assert {pg.primary.port} == _ports(after)
    assert Reason.NO_REPLICA is after[-1].route.reason
    assert max(answer.seconds for answer in after) < 2 * (PROBE_TIMEOUT + SLACK) + WAIT


def test_reads_go_on_when_the_primary_is_in_a_black_hole(
    over: OpenRouter, pg: EmbeddedCluster, proxies: Proxies, table: str
) -> None:
    """Replicas that have the session's position need no word from the primary."""
    with over() as app:
        token = _wrote(app, table)
        pg.wait_caught_up()
        app.wait_healthy()
        proxies["primary"].black_hole()
        answers = _reads(app, table, token, 2.0)
        proxies["primary"].heal()
        wait_until(partial(_writes, app, table), AGAIN_SECONDS)
    assert _ports(answers) <= {node.port for node in pg.replicas.values()}
    assert max(answer.seconds for answer in answers) < PROBE_TIMEOUT + WAIT + SLACK


def _writes(app: App, table: str) -> bool:
    """Return whether the primary takes a write."""
    try:
        app.write(f"UPDATE {table} SET value = value + 1")
    except psycopg.OperationalError:
        return False
    return True


@pytest.mark.parametrize("nodes", ["one", "replicas", "all"])
def test_reads_do_not_fail_when_the_connections_of_the_pools_are_reset(
    over: OpenRouter, pg: EmbeddedCluster, proxies: Proxies, table: str, nodes: str
) -> None:
    """Whatever the pools hold is dead: no read fails, and nobody is left out for long."""
    broken = {"one": ["replica_1"], "replicas": list(pg.replicas), "all": list(proxies)}[nodes]
    with over() as app:
        token = _wrote(app, table)
        pg.wait_caught_up()
        app.wait_healthy()
        for _ in range(5):
            before = sum(proxy.connections for proxy in proxies.values())
            for name in broken:
                proxies[name].reset()
            answers = _reads(app, table, token, 0.3)
            assert before > 0
            assert max(answer.seconds for answer in answers) < PROBE_TIMEOUT + WAIT + SLACK
        for node in pg.replicas.values():
            _serves_again(app, table, token, node.port)


def test_a_read_that_was_running_when_its_connection_is_reset_fails_as_itself(
    over: OpenRouter, pg: EmbeddedCluster, proxies: Proxies, table: str
) -> None:
    """An error after the read has begun is the caller's, and `run_read` answers elsewhere."""
    ports = {node.port: proxies[name] for name, node in pg.nodes.items()}
    with over() as app:
        app.wait_healthy()
        with pytest.raises(psycopg.OperationalError):
            _reset_and_read(app, ports)
        seen: list[int] = []

        def once_reset(conn: Connection) -> int:
            seen.append(conn.port)
            if len(seen) == 1:
                ports[seen[0]].reset()
            return int(conn.value("SELECT 42"))

        assert 42 == app.run_read(once_reset)
    assert (2, 2) == (len(seen), len(set(seen)))


def _reset_and_read(app: App, ports: dict[int, TcpProxy]) -> None:
    with app.reading() as conn:
        ports[conn.port].reset()
        conn.execute("SELECT 1")


def test_reads_leave_half_open_connections(
    over: OpenRouter, pg: EmbeddedCluster, proxies: Proxies, table: str
) -> None:
    """
    Connections that are over at the server only are found out before a read is sent over them.

    New connections work, so the replica serves again before anything is healed.
    """
    half = pg.replicas["replica_1"]
    with over() as app:
        token = _wrote(app, table)
        pg.wait_caught_up()
        _serves_again(app, table, token, half.port)
        app.events.clear()
        proxies[half.name].half_open()
        # Once its monitor has failed and is well again, nothing but the connections is dead.
        wait_until(lambda: half.name in {event.name for event in app.events_of(NodeFailed)})
        app.wait_for(lambda nodes: nodes[half.name]["healthy"])
        try:
            # A read that is sent over a dead connection would wait for ever.
            [reading] = app.start_each(1, lambda _: _reads(app, table, token, 1.5))
            answers = reading.result(AGAIN_SECONDS)
            _serves_again(app, table, token, half.port)
        finally:
            proxies[half.name].heal()
    assert _ports(answers) <= {node.port for node in pg.replicas.values()}
    assert max(answer.seconds for answer in answers) < PROBE_TIMEOUT + WAIT + SLACK


def test_a_refused_replica_is_left_and_comes_back(
    over: OpenRouter, pg: EmbeddedCluster, proxies: Proxies, table: str
) -> None:
    """Connections are reset and new ones refused, as of a server that is gone."""
    gone, well = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with over() as app:
        token = _wrote(app, table)
        pg.wait_caught_up()
        _serves_again(app, table, token, gone.port)
        proxies[gone.name].refuse()
        proxies[gone.name].reset()
        app.wait_for(lambda nodes: not nodes[gone.name]["healthy"])
        answers = _reads(app, table, token, 1.0)
        proxies[gone.name].heal()
        _serves_again(app, table, token, gone.port)
    assert {well.port} == _ports(answers)
    assert max(answer.seconds for answer in answers) < PROBE_TIMEOUT + WAIT + SLACK


def test_a_replica_with_latency_serves_and_never_serves_the_past(
    over: OpenRouter, pg: EmbeddedCluster, proxies: Proxies, table: str
) -> None:
    """Latency on one replica makes its reads slow, and no read of it too old."""
    far = pg.replicas["replica_1"]
    with over() as app:
        app.wait_healthy()
        proxies[far.name].latency(0.05)
        answers = []
        for number in range(25):
            with app.session():
                app.write(f"INSERT INTO {table} VALUES (%s)", [number])
                for _ in range(2):
                    answers.append((number + 1, app.ask(f"SELECT count(*) FROM {table}")))
        slow = _answer_of(app, far.port)
        assert app.snapshot()[far.name]["healthy"]
    assert [count for count, _ in answers] == [answer.value for _, answer in answers]
    # The statement and the question for the port: two round trips.
    assert slow.seconds >= 0.2


def _answer_of(app: App, port: int) -> Answer:
    """Wait until a read reaches a server, and return its answer."""
    found: list[Answer] = []

    def asked() -> bool:
        with app.session():
            found.append(app.ask("SELECT 1"))
        return found[-1].port == port

    wait_until(asked, AGAIN_SECONDS, lambda: str(app.snapshot()))
    return found[-1]


def test_a_router_opens_and_closes_beside_a_black_hole(
    over: OpenRouter, pg: EmbeddedCluster, proxies: Proxies
) -> None:
    """A node that swallows everything does not hold up open() or close()."""
    proxies["replica_1"].black_hole()
    began = time.monotonic()
    with over(open_timeout=1.5) as app:
        opened = time.monotonic() - began
        answers = [app.ask("SELECT 1") for _ in range(10)]
        closing = time.monotonic()
    closed = time.monotonic() - closing
    assert pg.replicas["replica_1"].port not in _ports(answers)
    assert opened < 1.5 + 1.0 + SLACK
    # psycopg gives an attempt to connect 2 s at least.
    assert closed < 3.5 + SLACK
