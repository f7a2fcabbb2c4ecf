"""Behind a pooler the check and the read share one transaction, by the server's own log."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from lsn_consistency.testing import EmbeddedCluster, PgBouncer, Replica
from tests.cluster.harness import App, wait_until
from tests.poolers.pgbouncer import OpenThrough

READERS = 4
READS = 10

# A statement of several lines goes on in lines that begin with a tab.
_RECORD = re.compile(
    r"^\S+ \S+ \S+ \[(\d+)\] \S* LOG:  (?:statement|execute [^:]*): (.*(?:\n\t.*)*)", re.MULTILINE
)
BEGIN = "begin isolation level read committed read only"
CHECK = "pg_last_wal_replay_lsn"
_MARK = re.compile(r"/\* read (\d+) \*/")


@dataclass(frozen=True)
class Statement:
    """One statement, as the server has logged it, and the backend that ran it."""

    pid: int
    text: str

    @property
    def mark(self) -> int | None:
        """Return the number of the read that it belongs to."""
        found = _MARK.search(self.text)
        return None if found is None else int(found[1])


def test_each_read_is_checked_in_its_own_transaction(
    through: OpenThrough, pg: EmbeddedCluster, pooler: PgBouncer, table: str
) -> None:
    """What one backend saw of each read: begin, check, the statements, commit; in this order."""
    replica = pg.replicas["replica_1"]
    if pooler.pool_mode == "transaction":
        # Fewer backends than the router has connections, so they take turns.
        pooler.configure("default_pool_size", READERS - 1)
    with through("replica_1", only="replica_1", wait_seconds=10.0) as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        token = app.token()

        def reader(number: int) -> set[tuple[int, int]]:
            found = set()
            for turn in range(READS):
                mark = f"/* read {number * READS + turn} */"
                with app.session(token), app.reading() as conn:
                    row = conn.execute(f"SELECT {mark} pg_backend_pid(), count(*) FROM {table}")[0]
                    assert row == tuple(conn.execute(f"SELECT {mark} pg_backend_pid(), 1")[0])
                    found.add((conn.raw.info.backend_pid, row[0]))
            return found

        with _logging(replica) as statements:
            pairs = set().union(*app.each(READERS, reader))
            wait_until(lambda: len(_marks(statements())) == READERS * READS)
    _check_order(statements(), {pid for _, pid in pairs})
    # In transaction mode the log proves something: one connection has had several backends.
    assert (pooler.pool_mode == "transaction") == (len(pairs) > len({one for one, _ in pairs}))


@pytest.mark.parametrize("mode", ["transaction"], indirect=True)
def test_on_a_direct_connection_nothing_is_added(
    through: OpenThrough, pg: EmbeddedCluster, table: str
) -> None:
    """A node that no pooler hides: the read's transaction holds the user's statement alone."""
    replica = pg.replicas["replica_1"]
    with through("primary", only="replica_1", wait_seconds=10.0) as app:
        _read(app, table, 0)
        with _logging(replica) as statements:
            _read(app, table, 1)
            wait_until(lambda: _marks(statements()))
    (marked,) = (each for each in statements() if each.mark == 1)
    texts = [each.text for each in statements() if each.pid == marked.pid]
    at = texts.index(marked.text)
    assert texts[at - 1].upper().startswith("BEGIN")
    assert not any("isolation level" in text.lower() for text in texts)


@contextmanager
def _logging(replica: Replica) -> Iterator[Callable[[], list[Statement]]]:
    """Have a server log its statements; yield what returns those since then."""
    replica.configure("log_statement", "all")
    mark = replica.log_mark()

    def statements() -> list[Statement]:
        records = _RECORD.findall(replica.log_since(mark))
        return [Statement(int(pid), said.strip()) for pid, said in records]

    try:
        yield statements
    finally:
        replica.configure("log_statement", "none")


def _read(app: App, table: str, number: int) -> None:
    with app.session():
        app.read(f"SELECT /* read {number} */ count(*) FROM {table}")


def _check_order(statements: list[Statement], pids: set[int]) -> None:
    """See that each read ran as begin, check, statements, commit on one backend."""
    for mark in range(READERS * READS):
        (pid,) = {each.pid for each in statements if each.mark == mark}
        assert pid in pids
        ran = [each for each in statements if each.pid == pid]
        first, second = (at for at, each in enumerate(ran) if each.mark == mark)
        assert (BEGIN, first + 1) == (ran[first - 2].text, second)
        assert CHECK in ran[first - 1].text
        after = [each.text for each in ran[second + 1 : second + 3]]
        # What has been shown may be asked for before the transaction ends.
        assert "COMMIT" in (after if CHECK in after[0] else after[:1])


def _marks(statements: list[Statement]) -> set[int]:
    """Return the reads whose commit has been logged."""
    open_reads: dict[int, int] = {}
    done = set()
    for each in statements:
        if each.mark is not None:
            open_reads[each.pid] = each.mark
        elif each.text == "COMMIT" and each.pid in open_reads:
            done.add(open_reads.pop(each.pid))
    return done
