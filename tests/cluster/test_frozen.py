"""A replica that hangs: its connections stay open and nothing answers."""

from __future__ import annotations

import time

import pytest

from lsn_consistency import Consistency, Reason, Token, current_session
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App

PROBE_TIMEOUT = 0.5
POLL = 0.3
OVERDUE = 0.25
"""How late a probe may be before a read stops believing the last one."""

SLACK = 0.35
"""For a busy machine."""


def _reads(app: App, table: str, token: Token, seconds: float) -> list[tuple[float, int, float]]:
    """Read as new clients for a time: when, from which port, how long it took."""
    found = []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with app.session(token):
            began = time.monotonic()
            answer = app.ask(f"SELECT count(*) FROM {table}")
        found.append((began, answer.port, answer.seconds))
        time.sleep(0.005)
    return found


@pytest.mark.parametrize("with_token", [True, False], ids=["token", "no token"])
def test_reads_leave_a_frozen_replica(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, with_token: bool
) -> None:
    """
    Replica frozen: once its probe is overdue reads go elsewhere within probe_timeout.

    Until then the last observation holds, and a statement that is sent hangs as on any server.
    """
    frozen, well = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with opened(probe_timeout=PROBE_TIMEOUT, poll_interval=POLL, wait_seconds=0.2) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        token = current_session().token if with_token else Token()
        before = _reads(app, table, token, 0.3)
        frozen.freeze()
        time.sleep(POLL + OVERDUE)
        overdue = time.monotonic()
        after = _reads(app, table, token, PROBE_TIMEOUT + 0.7)
        frozen.thaw()
        app.wait_for(lambda nodes: nodes[frozen.name]["healthy"])
        again = _reads(app, table, token, 0.3)
    assert {frozen.port, well.port} == {port for _, port, _ in before}
    assert {well.port} == {port for _, port, _ in after}
    assert max(seconds for _, _, seconds in after) < PROBE_TIMEOUT + SLACK
    known = [seconds for began, _, seconds in after if began > overdue + PROBE_TIMEOUT + SLACK]
    assert len(known) > 10
    assert max(known) < SLACK
    assert {frozen.port, well.port} == {port for _, port, _ in again}


def test_a_read_whose_position_the_frozen_replica_never_showed_does_not_try_it(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """Writes right after the freeze are read at once: nothing says that the frozen one has them."""
    frozen, well = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with opened(probe_timeout=PROBE_TIMEOUT, wait_seconds=2.0) as app:
        app.wait_healthy()
        frozen.freeze()
        answers = []
        for number in range(30):
            with app.session():
                app.write(f"INSERT INTO {table} VALUES (%s)", [number])
                answers.append(app.ask(f"SELECT count(*) FROM {table}"))
        frozen.thaw()
    assert [(number + 1, well.port) for number in range(30)] == [
        (answer.value, answer.port) for answer in answers
    ]
    assert max(answer.seconds for answer in answers) < SLACK


def test_with_every_replica_frozen_the_primary_serves_within_the_limits(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """All connections of all replica pools lead to frozen servers: the primary, within limits."""
    with opened(
        probe_timeout=PROBE_TIMEOUT, connect_timeout=1.0, poll_interval=POLL, wait_seconds=0.2
    ) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        token = current_session().token
        app.wait_healthy()
        for replica in pg.replicas.values():
            replica.freeze()
        time.sleep(POLL + OVERDUE)
        readers = app.each(30, lambda number: _reads(app, table, _some(token, number), 1.2))
        with app.session():
            last = app.ask("SELECT 1")
        for replica in pg.replicas.values():
            replica.thaw()
    reads = [read for found in readers for read in found]
    assert {pg.primary.port} == {port for _, port, _ in reads}
    # One after the other each of the two replicas may use up its limits.
    assert max(seconds for _, _, seconds in reads) < 2 * PROBE_TIMEOUT + 0.2 + 2 * SLACK
    assert (pg.primary.port, Reason.NO_REPLICA) == (last.port, last.route.reason)


def test_a_replica_that_freezes_while_it_is_read_does_not_hold_up_the_next_read(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """The pool of a frozen replica is empty and cannot grow: the next read goes elsewhere."""
    one = {"replica_1": pg.replicas["replica_1"].conninfo}
    frozen = pg.replicas["replica_1"]
    options = {"min_size": 1, "max_size": 2}
    with opened(
        replicas=one, probe_timeout=PROBE_TIMEOUT, connect_timeout=1.0, pool_options=options
    ) as app:
        app.wait_healthy()
        with app.session(), app.reading() as first, app.session(), app.reading() as second:
            held = (first.port, second.port)
            frozen.freeze()
            with app.session():
                answer = app.ask("SELECT 1")
            frozen.thaw()
    assert (frozen.port, frozen.port) == held
    assert pg.primary.port == answer.port
    assert answer.seconds < 1.0 + PROBE_TIMEOUT + SLACK


def test_a_router_opens_beside_a_frozen_replica(opened: OpenRouter, pg: EmbeddedCluster) -> None:
    """open() waits for a node that hangs no longer than open_timeout, and close() not at all."""
    pg.replicas["replica_1"].freeze()
    began = time.monotonic()
    with opened(open_timeout=1.5, connect_timeout=1.0) as app:
        opening = time.monotonic() - began
        answers = [app.ask("SELECT 1", consistency=Consistency.EVENTUAL) for _ in range(10)]
        closing = time.monotonic()
    closed = time.monotonic() - closing
    assert {pg.replicas["replica_2"].port} == {answer.port for answer in answers}
    assert opening < 1.5 + 1.0
    # psycopg gives an attempt to connect 2 s at least.
    assert closed < 3.5


def _some(token: Token, number: int) -> Token:
    return token if number % 2 else Token()
