"""Without the primary, behind a pooler: reads that are proven go on, and so do their sessions."""

from __future__ import annotations

import psycopg
import pytest

from lsn_consistency import Reason
from lsn_consistency.exceptions import NoNodeAvailableError
from lsn_consistency.testing import EmbeddedCluster
from tests.cluster.harness import wait_until
from tests.poolers.pgbouncer import OpenThrough


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("blocking", "transaction"), ("async", "transaction"), ("blocking", "session")],
    indirect=True,
)
def test_a_session_goes_on_reading_without_the_primary(
    through: OpenThrough, pg: EmbeddedCluster, table: str
) -> None:
    """
    The primary crashes, everything is behind the pooler: each read of the session is served.

    What a read has shown is asked of its own server, inside its transaction; the primary, which
    could not answer, is not needed for it.
    """
    with through() as app:
        app.write(f"INSERT INTO {table} VALUES (1)")
        token = app.token()
        pg.wait_caught_up()
        pg.primary.crash()
        with app.session(token) as session:
            answers = [app.ask(f"SELECT count(*) FROM {table}") for _ in range(10)]
            assert session.token.pin_until is None
        with pytest.raises((psycopg.OperationalError, NoNodeAvailableError)):
            app.write(f"INSERT INTO {table} VALUES (2)")
        pg.primary.start()
        wait_until(lambda: app.snapshot()["primary"]["healthy"])
        with app.session():
            app.write(f"INSERT INTO {table} VALUES (3)")
            assert 2 == app.ask(f"SELECT count(*) FROM {table}").value
    assert {1} == {answer.value for answer in answers}
    assert {replica.port for replica in pg.replicas.values()} >= {each.port for each in answers}
    assert {Reason.CAUGHT_UP, Reason.PRIMARY_DOWN} >= {each.route.reason for each in answers}
