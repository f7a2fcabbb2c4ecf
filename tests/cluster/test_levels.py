"""The consistency levels on a real cluster, and what a session keeps from read to read."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from lsn_consistency import Consistency, Lsn, Reason, Token, consistency, current_session
from lsn_consistency.events import FallbackLimited
from lsn_consistency.exceptions import ConfigurationError, FallbackLimitError
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App, Connection, wait_until

DROPPED_TABLES = 1000

# Monotonic reads


def test_a_session_that_read_from_one_replica_never_reads_an_older_state_from_another(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """
    Monotonic reads at CAUSAL: the replica that is behind what was seen serves nothing.

    The session only reads; another client writes. Its first replica then stops.
    """
    ahead, behind = pg.replicas["replica_1"], pg.replicas["replica_2"]
    with opened(wait_seconds=0.2, max_lag_seconds=30.0, pin_seconds=30.0) as app:
        behind.pause_replay()
        pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
        wait_until(lambda: ahead.value(f"SELECT count(*) FROM {table}") == 1)
        with app.session():
            first = app.ask(f"SELECT count(*) FROM {table}", node=ahead.name)
            others = [app.ask(f"SELECT count(*) FROM {table}") for _ in range(10)]
            ahead.stop()
            without = app.ask(f"SELECT count(*) FROM {table}")
    assert (1, ahead.port) == (first.value, first.port)
    assert {(1, ahead.port)} == {(answer.value, answer.port) for answer in others}
    assert (1, pg.primary.port) == (without.value, without.port)


def test_a_session_that_read_from_the_primary_does_not_go_back_on_a_replica(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """Monotonic reads: what a fallback read saw on the primary counts as well."""
    with opened(wait_seconds=0.1, max_lag_seconds=30.0, pin_seconds=30.0) as app:
        app.wait_healthy()
        for replica in pg.replicas.values():
            replica.pause_replay()
        pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
        counts = []
        with app.session():
            counts.append(app.ask(f"SELECT count(*) FROM {table}", node="primary"))
            counts += [app.ask(f"SELECT count(*) FROM {table}") for _ in range(3)]
    assert [(1, pg.primary.port)] * 4 == [(answer.value, answer.port) for answer in counts]


def test_reads_never_go_back_while_both_replicas_and_the_primary_move(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """Monotonic reads under load, each read a new choice."""
    pg.primary.execute(f"INSERT INTO {table} VALUES (0)")
    pg.wait_caught_up()
    done = threading.Event()

    def write() -> None:
        with pg.primary.connect() as conn:
            while not done.wait(0.001):
                conn.execute(f"UPDATE {table} SET value = value + 1".encode())

    thread = threading.Thread(target=write, name="scenario load")
    thread.start()
    try:
        with opened(wait_seconds=2.0) as app:
            seen = app.each(3, lambda _: _wandering_reads(app, table, 150))
    finally:
        done.set()
        thread.join()
    ports = Counter(port for reads in seen for _, port in reads)
    assert {replica.port for replica in pg.replicas.values()} <= set(ports)
    for reads in seen:
        values = [value for value, _ in reads]
        assert sorted(values) == values


def _wandering_reads(app: App, table: str, count: int) -> list[tuple[int, int]]:
    found = []
    with app.session() as session:
        for _ in range(count):
            # Without a node of its own the session may be sent anywhere.
            session.node = None
            answer = app.ask(f"SELECT value FROM {table}")
            found.append((answer.value, answer.port))
    return found


def test_a_commit_that_is_seen_before_its_position_is_replayed_is_not_unseen(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """
    Monotonic reads: replay shows a commit that drops many tables long before its position
    covers it (facts 3); a session that saw it needs more than the replay position.
    """
    ahead, behind = pg.replicas["replica_1"], pg.replicas["replica_2"]
    names = ", ".join(f"many_{number}" for number in range(DROPPED_TABLES))
    pg.primary.execute(
        "DO $$ BEGIN FOR n IN 0 .. "
        f"{DROPPED_TABLES - 1} LOOP EXECUTE format('CREATE TABLE many_%s ()', n); END LOOP; END $$"
    )
    with (
        opened(wait_seconds=0.05, max_lag_seconds=60.0, pin_seconds=60.0) as app,
        pg.primary.connect(autocommit=False) as writer,
        ahead.connect() as witness,
    ):
        writer.execute(f"INSERT INTO {table} VALUES (1)".encode())
        writer.execute(f"DROP TABLE {names}".encode())
        pg.wait_caught_up()
        behind.pause_replay()
        before = behind.replay_lsn()
        committing = app.start_each(1, lambda _: writer.commit())
        with app.session() as session:
            app.read("SELECT 1", node=ahead.name, consistency=Consistency.EVENTUAL)
            count = 0
            while not count:
                count = app.ask(f"SELECT count(*) FROM {table}", node=ahead.name).value
            replayed = witness.execute("SELECT pg_last_wal_replay_lsn()::text").fetchone()
            ahead.stop("immediate")
            again = app.ask(f"SELECT count(*) FROM {table}")
            token = session.token
        committing[0].result(10)
    assert replayed is not None
    # The situation was there: seen, and the position from before the commit was still shown.
    assert before == Lsn.parse(replayed[0])
    assert (1, pg.primary.port) == (again.value, again.port)
    assert [True] == [each.lsn > before for each in token.positions.values()]


def test_read_your_writes_does_not_advance_on_reads(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """READ_YOUR_WRITES: own writes only; reads leave the token alone, also on the primary."""
    level = Consistency.READ_YOUR_WRITES
    with opened(consistency=level, wait_seconds=5.0) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        token = current_session().token
        pg.primary.execute(f"INSERT INTO {table} VALUES (2)")
        answers = [app.ask(f"SELECT count(*) FROM {table}") for _ in range(3)]
        app.ask("SELECT 1", consistency=Consistency.STRONG)
        app.ask("SELECT 1", node="primary")
        unchanged = current_session().token
        app.ask("SELECT 1", consistency=Consistency.CAUSAL)
        moved = current_session().token
    assert token.positions
    assert token == unchanged
    assert min(answer.value for answer in answers) >= 1
    assert token.merge(moved) == moved != token


def test_causal_reads_advance_past_what_they_saw(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """CAUSAL: a token taken after a read makes another client see at least as much."""
    with opened(wait_seconds=5.0, max_lag_seconds=30.0, pin_seconds=30.0) as app:
        ahead, behind = pg.replicas["replica_1"], pg.replicas["replica_2"]
        behind.pause_replay()
        pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
        wait_until(lambda: ahead.value(f"SELECT count(*) FROM {table}") == 1)
        with app.session() as session:
            app.ask("SELECT 1", node=ahead.name)
            token = session.token
        with app.session(token):
            answers = [app.ask(f"SELECT count(*) FROM {table}") for _ in range(10)]
    assert {(1, ahead.port)} == {(answer.value, answer.port) for answer in answers}


# Levels


def test_strong_reads_are_the_primarys(opened: OpenRouter, pg: EmbeddedCluster) -> None:
    """STRONG: primary only, by call, by block, by decorator and by router."""
    with opened() as app:

        @consistency(Consistency.STRONG)
        def decorated() -> Any:
            return app.ask("SELECT 1")

        answers = [app.ask("SELECT 1", consistency=Consistency.STRONG), decorated()]
        with consistency(Consistency.STRONG):
            answers.append(app.ask("SELECT 1"))
            weaker = app.ask("SELECT 1", consistency=Consistency.EVENTUAL)
        after = app.ask("SELECT 1", consistency=Consistency.EVENTUAL)
    with opened(consistency=Consistency.STRONG) as app:
        answers.append(app.ask("SELECT 1"))
    assert [(pg.primary.port, Reason.PRIMARY_REQUIRED)] * 4 == [
        (answer.port, answer.route.reason) for answer in answers
    ]
    assert pg.primary.port not in (weaker.port, after.port)


def test_eventual_reads_take_any_healthy_replica(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """EVENTUAL: any healthy replica, behind its session's writes or the lag bound or not."""
    with opened(max_lag_seconds=0.3, wait_seconds=1.0, poll_interval=0.1) as app:
        app.wait_healthy()
        for replica in pg.replicas.values():
            replica.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        wait_until(lambda: app.choose(consistency=Consistency.bounded(0.3)).is_primary)
        answers = []
        for _ in range(40):
            with app.session(current_session().token):
                level = Consistency.EVENTUAL
                answers.append(app.ask(f"SELECT count(*) FROM {table}", consistency=level))
    assert {replica.port for replica in pg.replicas.values()} == {each.port for each in answers}
    assert {0} == {answer.value for answer in answers}
    assert max(answer.seconds for answer in answers) < 0.3


def test_sticky_reads_stay_on_the_primary_for_their_time(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """sticky(seconds): the primary for that long after a write, replicas before and after."""
    with opened(consistency=Consistency.sticky(0.6)) as app:
        before = app.ask("SELECT 1")
        app.write(f"INSERT INTO {table} VALUES (1)")
        wrote = time.monotonic()
        during = [app.ask(f"SELECT count(*) FROM {table}")]
        time.sleep(0.3)
        during.append(app.ask(f"SELECT count(*) FROM {table}"))
        token = current_session().token
        time.sleep(max(0.0, wrote + 0.65 - time.monotonic()))
        after = app.ask("SELECT 1")
    assert [(1, pg.primary.port, Reason.PRIMARY_REQUIRED)] * 2 == [
        (answer.value, answer.port, answer.route.reason) for answer in during
    ]
    assert pg.primary.port not in (before.port, after.port)
    # It needs no LSN, so it takes none.
    assert {} == dict(token.positions)


# Tokens and nodes given by hand


def test_an_explicit_token_takes_the_place_of_the_sessions(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """read(token) and choose(token): that position is reached, whatever the session holds."""
    paused = {"replica_1": pg.replicas["replica_1"]}
    nodes = {name: node.conninfo for name, node in paused.items()}
    with opened(replicas=nodes, wait_seconds=0.1, max_lag_seconds=30.0, pin_seconds=30.0) as app:
        old = app.token()
        app.choose(old, timeout=5.0)
        paused["replica_1"].pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        new = current_session().token
        with app.session():
            asked = app.ask(f"SELECT count(*) FROM {table}", token=new)
        with app.session(new):
            older = app.ask(f"SELECT count(*) FROM {table}", token=old)
            nothing = app.ask(f"SELECT count(*) FROM {table}", token=Token())
            chosen = app.choose(old)
            own = app.choose()
    port = paused["replica_1"].port
    assert (1, pg.primary.port, Reason.NOT_CAUGHT_UP) == (
        asked.value,
        asked.port,
        asked.route.reason,
    )
    assert [(0, port)] * 2 == [(each.value, each.port) for each in (older, nothing)]
    assert (("replica_1", Reason.CAUGHT_UP), ("primary", Reason.NOT_CAUGHT_UP)) == (
        (chosen.name, chosen.reason),
        (own.name, own.reason),
    )


def test_a_node_can_be_forced(opened: OpenRouter, pg: EmbeddedCluster, table: str) -> None:
    """node= names a node and skips the decision: FORCED, read-only, the primary too."""
    with opened(wait_seconds=5.0, connect_timeout=0.5) as app:
        pg.replicas["replica_2"].pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        answers = {name: app.ask(f"SELECT count(*) FROM {table}", node=name) for name in pg.nodes}
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            app.read(f"INSERT INTO {table} VALUES (2)", node="primary")
        with pytest.raises(ConfigurationError, match="nowhere"):
            app.read("SELECT 1", node="nowhere")
        pg.replicas["replica_1"].stop("immediate")
        with pytest.raises((psycopg.OperationalError, psycopg.errors.Error)):
            app.read("SELECT 1", node="replica_1")
    assert {name: node.port for name, node in pg.nodes.items()} == {
        name: answer.port for name, answer in answers.items()
    }
    assert {Reason.FORCED} == {answer.route.reason for answer in answers.values()}
    assert 0 == answers["replica_2"].value


def test_choose_waits_as_long_as_it_is_told(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """choose(timeout=) takes the place of wait_seconds, and comes back when a replica is there."""
    with opened(wait_seconds=20.0) as app:
        for replica in pg.replicas.values():
            replica.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        began = time.monotonic()
        at_once, later = app.choose(timeout=0.0), app.choose(timeout=0.3)
        took = time.monotonic() - began
        waiting = app.start_each(1, lambda _: app.choose(timeout=10.0))
        wait_until(lambda: 1 == len(app.cluster_state.positions))
        pg.replicas["replica_2"].resume_replay()
        resumed = time.monotonic()
        route = waiting[0].result(10)
        released = time.monotonic() - resumed
    assert [Reason.NOT_CAUGHT_UP] * 2 == [at_once.reason, later.reason]
    assert at_once.waited_seconds < 0.2
    assert 0.3 <= later.waited_seconds
    assert took < 0.8
    assert ("replica_2", Reason.CAUGHT_UP) == (route.name, route.reason)
    assert released < 0.3


# Balance


def test_a_unit_of_work_keeps_its_replica(opened: OpenRouter, pg: EmbeddedCluster) -> None:
    """One replica per unit of work, and other units use the others."""
    with opened() as app:
        app.wait_healthy()
        used = []
        for _ in range(30):
            with app.session():
                used.append({app.where() for _ in range(5)})
    assert {1} == {len(ports) for ports in used}
    counts = Counter(port for ports in used for port in ports)
    assert {replica.port for replica in pg.replicas.values()} == set(counts)
    assert min(counts.values()) >= 3


def test_weights_share_the_reads(opened: OpenRouter, pg: EmbeddedCluster) -> None:
    """Weights: a replica with a ninth of the weight gets about that share of the reads."""
    with opened(weights={"replica_1": 9.0, "replica_2": 1.0}) as app:
        app.wait_healthy()
        counts: Counter[int] = Counter()
        for _ in range(200):
            with app.session():
                counts[app.where()] += 1
    assert 200 == sum(counts.values())
    # Two draws of one in ten: between 0 and about 40 of 200 with a chance beyond one in a million.
    assert counts[pg.replicas["replica_2"].port] < 60
    assert counts[pg.replicas["replica_1"].port] > 140


# The primary's guard


def _hold_reads_on_the_primary(
    app: App, count: int, release: threading.Event
) -> tuple[list[Any], list[int]]:
    """Start reads that hold their connection; return their futures once they all have one."""
    ports: list[int] = []

    def hold(_: int) -> None:
        with app.session(current_session().token), app.reading() as conn:
            ports.append(conn.port)
            release.wait(20)

    futures = app.start_each(count, hold)
    wait_until(lambda: len(ports) == count)
    return futures, ports


@pytest.mark.parametrize("action", ["wait", "error", "stale"])
def test_the_primary_serves_no_more_fallback_reads_than_allowed(
    opened: OpenRouter, pg: EmbeddedCluster, table: str, action: str
) -> None:
    """max_fallback_reads: over it a read waits, fails, or is served stale and says so."""
    release = threading.Event()
    with opened(
        wait_seconds=0.05,
        max_fallback_reads=2,
        on_fallback_limit=action,
        fallback_wait_seconds=0.4,
        pool_options={"min_size": 4},
    ) as app:
        for replica in pg.replicas.values():
            replica.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        holders, ports = _hold_reads_on_the_primary(app, 2, release)
        try:
            third = _third_read(app, table, action)
            strong = app.ask(f"SELECT count(*) FROM {table}", consistency=Consistency.STRONG)
        finally:
            release.set()
        for holder in holders:
            holder.result(10)
        after = app.ask(f"SELECT count(*) FROM {table}")
        limited = app.events_of(FallbackLimited)
    replica_ports = {replica.port for replica in pg.replicas.values()}
    if action == "stale":
        assert (0, True) == (third.value, third.route.stale)
        assert third.port in replica_ports
    else:
        assert isinstance(third, FallbackLimitError)
        assert (2, True) == (third.limit, third.retry_after_seconds > 0)
    assert [pg.primary.port] * 2 == ports
    assert [(2, action)] == [(event.limit, event.action) for event in limited]
    assert (1, pg.primary.port) == (strong.value, strong.port)
    assert (1, pg.primary.port, False) == (after.value, after.port, after.route.stale)


def _third_read(app: App, table: str, action: str) -> Any:
    if action == "stale":
        return app.ask(f"SELECT count(*) FROM {table}")
    began = time.monotonic()
    with pytest.raises(FallbackLimitError) as raised:
        app.ask(f"SELECT count(*) FROM {table}")
    took = time.monotonic() - began
    assert (took >= 0.4) == (action == "wait")
    assert took < 1.0
    return raised.value


def test_a_read_that_waits_for_its_turn_on_the_primary_gets_it(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """on_fallback_limit="wait": it is served as soon as another is done."""
    release = threading.Event()
    with opened(wait_seconds=0.05, max_fallback_reads=1, fallback_wait_seconds=10.0) as app:
        for replica in pg.replicas.values():
            replica.pause_replay()
        app.write(f"INSERT INTO {table} VALUES (1)")
        holders, _ = _hold_reads_on_the_primary(app, 1, release)
        waiting = app.start_each(
            5, lambda _: app.run_read(lambda conn: conn.value(f"SELECT count(*) FROM {table}"))
        )
        wait_until(lambda: 5 == len(app.cluster_state.fallback_turns))
        release.set()
        counts = [waiter.result(5) for waiter in [*holders, *waiting]]
        left = (app.cluster_state.fallback_reads, len(app.cluster_state.fallback_turns))
    assert [None, 1, 1, 1, 1, 1] == counts
    assert (0, 0) == left


# Writes


def _write_and_raise(
    app: App, table: str, before: Callable[[Connection], Any] = lambda _: None
) -> None:
    with app.writing() as conn:
        conn.execute(f"INSERT INTO {table} VALUES (1)")
        before(conn)
        raise ZeroDivisionError


def test_a_write_that_raises_rolls_back(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """An exception in the block rolls the transaction back, and the connection is used again."""
    with opened(wait_seconds=5.0) as app:
        with pytest.raises(ZeroDivisionError):
            _write_and_raise(app, table)
        with pytest.raises(psycopg.errors.UniqueViolation):
            app.write(f"INSERT INTO {table} VALUES (2), (2)")
        app.write(f"INSERT INTO {table} VALUES (3)")
        rows = app.read(f"SELECT id FROM {table}")
    assert [(3,)] == rows


def test_a_block_that_commits_and_then_raises_still_advances_the_session(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """An explicit commit counts, whatever happens after it."""
    with opened(wait_seconds=0.1) as app:
        app.wait_healthy()
        for replica in pg.replicas.values():
            replica.pause_replay()
        with app.session() as session:
            with pytest.raises(ZeroDivisionError):
                _write_and_raise(app, table, Connection.commit)
            answer = app.ask(f"SELECT count(*) FROM {table}")
            wrote = session.wrote
    assert (1, pg.primary.port, True) == (answer.value, answer.port, wrote)


def test_capture_covers_what_another_engine_committed(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """capture() after a commit that the router has not seen: the next read sees it."""
    with opened(wait_seconds=0.1) as app:
        app.wait_healthy()
        for replica in pg.replicas.values():
            replica.pause_replay()
        pg.primary.execute(f"INSERT INTO {table} VALUES (1)")
        app.capture()
        answer = app.ask(f"SELECT count(*) FROM {table}")
    assert (1, pg.primary.port) == (answer.value, answer.port)


# run_read


def test_run_read_goes_to_another_node_after_a_recovery_conflict(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """A replica that cancels the statement (40001) is not asked twice; another node answers."""
    pg.primary.execute(f"INSERT INTO {table} SELECT generate_series(1, 500)")
    first = pg.replicas["replica_1"]
    first.configure("max_standby_streaming_delay", "10ms")
    pg.wait_caught_up()
    ports: list[int] = []

    def conflicting(conn: Connection) -> int:
        ports.append(conn.port)
        before = conn.value(f"SELECT count(*) FROM {table}")
        if len(ports) == 1:
            # The snapshot needs rows that the primary removes for good.
            pg.primary.execute(f"DELETE FROM {table} WHERE id <= 250")
            pg.primary.execute(f"VACUUM {table}")
            conn.value("SELECT count(*) FROM pg_sleep(10)")
        return int(before)

    try:
        with opened(weights={"replica_1": 1000.0, "replica_2": 0.001}) as app:
            app.wait_healthy()
            count = app.run_read(_in_repeatable_read(conflicting))
    finally:
        first.configure("max_standby_streaming_delay", "30s")
    assert first.port == ports[0]
    assert 2 == len(ports)
    assert first.port != ports[1]
    assert count in (250, 500)


def _in_repeatable_read(function: Any) -> Any:
    def wrapped(conn: Connection) -> Any:
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        return function(conn)

    return wrapped


def test_run_read_goes_to_nodes_where_it_has_not_run_after_its_connection_is_ended(
    opened: OpenRouter, pg: EmbeddedCluster
) -> None:
    """Ended on each replica it runs on the other one, then on the primary; never twice on one."""
    nodes = {node.port: node for node in pg.nodes.values()}
    ports: list[int] = []

    def ended(conn: Connection) -> int:
        ports.append(conn.port)
        if conn.port != pg.primary.port:
            pid = conn.raw.info.backend_pid
            nodes[conn.port].execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        return int(conn.value("SELECT 42"))

    with opened() as app:
        app.wait_healthy()
        result = app.run_read(ended)
    assert 42 == result
    assert {replica.port for replica in pg.replicas.values()} == set(ports[:2])
    assert [pg.primary.port] == ports[2:]


def test_run_read_runs_a_function_that_fails_by_itself_only_once(opened: OpenRouter) -> None:
    """What is not the node's fault is raised: an error in SQL, a time-out, an exception."""
    calls: list[str] = []

    def slow(conn: Connection) -> None:
        calls.append("slow")
        conn.execute("SET LOCAL statement_timeout = 20")
        conn.execute("SELECT pg_sleep(5)")

    def wrong(conn: Connection) -> None:
        calls.append("wrong")
        conn.execute("SELECT nonsense")

    with opened() as app:
        with pytest.raises(psycopg.errors.QueryCanceled):
            app.run_read(slow)
        with pytest.raises(psycopg.errors.UndefinedColumn):
            app.run_read(wrong)
    assert ["slow", "wrong"] == calls
