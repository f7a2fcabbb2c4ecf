"""Commits that end where a page or a segment ends, and are waited for in vain (facts 2)."""

from __future__ import annotations

import psycopg

from lsn_consistency import Reason
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.conftest import OpenRouter
from tests.cluster.harness import App, Connection, insert_lsn

PAGE, PAGE_HEADER = 8192, 24
SEGMENT, SEGMENT_HEADER = 16 * 1024 * 1024, 40

COMMIT_RECORD = 40
"""Bytes of the commit record of a plain transaction: 34, aligned to 8."""

MESSAGE_OVERHEAD = 24 + 5 + 24 + 1
"""Record header, header of long data, xl_logical_message, and the end of the empty prefix."""

LEAST_MESSAGE = 512
"""A message above 255 bytes, so that the length of its header is always the same."""


def test_a_commit_that_ends_on_a_page_boundary_is_reached_within_the_wait(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """
    A commit whose insert position lies on a page header, idle primary: no fallback.

    Unnormalised, that position is past what any replica replays for up to 15 s.
    """
    with opened(wait_seconds=3.0) as app:
        for number in range(20):
            _commit_at_page_end(app, table, number)
            raw = insert_lsn(pg.primary)
            answer = app.ask(f"SELECT max(id) FROM {table}")
            if raw % PAGE == PAGE_HEADER and insert_lsn(pg.primary) == raw:
                break
    assert PAGE_HEADER == raw % PAGE
    assert (number, False, Reason.CAUGHT_UP) == (
        answer.value,
        answer.port == pg.primary.port,
        answer.route.reason,
    )
    assert answer.seconds < 1.0


def test_a_position_on_a_segment_header_is_reached_within_the_wait(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """After pg_switch_wal() on an idle primary the position is one that replicas reach."""
    with opened(wait_seconds=3.0) as app:
        for number in range(20):
            app.write(f"INSERT INTO {table} VALUES (%s)", [number])
            pg.primary.execute("SELECT pg_switch_wal()")
            raw = insert_lsn(pg.primary)
            app.capture()
            answer = app.ask(f"SELECT max(id) FROM {table}")
            if raw % SEGMENT == SEGMENT_HEADER and insert_lsn(pg.primary) == raw:
                break
    assert SEGMENT_HEADER == raw % SEGMENT
    assert (number, False, Reason.CAUGHT_UP) == (
        answer.value,
        answer.port == pg.primary.port,
        answer.route.reason,
    )
    assert answer.seconds < 1.0


def test_the_tokens_of_primary_reads_on_a_page_boundary_are_reached_too(
    opened: OpenRouter, pg: EmbeddedCluster, table: str
) -> None:
    """router.token(), capture() and a read on the primary normalise as a write does."""
    with opened(wait_seconds=3.0) as app:
        for number in range(20):
            _commit_at_page_end(app, table, number)
            raw = insert_lsn(pg.primary)
            with app.session() as session:
                app.read("SELECT 1", node="primary")
                answers = [
                    app.ask("SELECT 1", token=token)
                    for token in (
                        app.token(),
                        session.token,
                    )
                ]
            if raw % PAGE == PAGE_HEADER and insert_lsn(pg.primary) == raw:
                break
    assert PAGE_HEADER == raw % PAGE
    assert [Reason.CAUGHT_UP] * 2 == [answer.route.reason for answer in answers]
    assert pg.primary.port not in [answer.port for answer in answers]


def test_the_scenario_itself_ends_on_page_boundaries(pg: EmbeddedCluster, table: str) -> None:
    """The arithmetic holds on this server: else the tests above would prove nothing."""
    ends = []
    for number in range(5):
        with psycopg.connect(pg.primary.conninfo) as raw:
            _fill_page(Connection(App("blocking"), raw), table, number)
        ends.append(insert_lsn(pg.primary) % PAGE)
    assert ends.count(PAGE_HEADER) >= 3


def _commit_at_page_end(app: App, table: str, number: int) -> None:
    with app.writing() as conn:
        _fill_page(conn, table, number)


def _fill_page(conn: Connection, table: str, number: int) -> None:
    """Insert a row, and make the transaction as long as it takes to end where a page ends."""
    conn.execute(f"INSERT INTO {table} VALUES (%s)", [number])
    left = _left_of_page(conn) - COMMIT_RECORD - MESSAGE_OVERHEAD
    if left < LEAST_MESSAGE:
        # On to the next page, for a message that fits between this one and its end.
        _emit(conn, PAGE // 2)
        left = _left_of_page(conn) - COMMIT_RECORD - MESSAGE_OVERHEAD
    _emit(conn, left)


def _left_of_page(conn: Connection) -> int:
    text = conn.value("SELECT pg_current_wal_insert_lsn() - '0/0'")
    return PAGE - int(text) % PAGE


def _emit(conn: Connection, length: int) -> None:
    # Not transactional: a transactional one would make the commit record longer.
    conn.execute("SELECT pg_logical_emit_message(false, '', repeat('x', %s))", [length])
