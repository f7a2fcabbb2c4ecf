"""The guard of the primary: how many fallback reads it serves at once, and what the rest get."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from lsn_consistency import Consistency, current_session
from lsn_consistency.events import FallbackLimited
from lsn_consistency.exceptions import FallbackLimitError
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App, wait_until


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
