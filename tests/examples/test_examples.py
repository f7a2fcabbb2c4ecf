"""
The examples do what they say, on a real cluster.

Each is started by the command in its own docstring. Both replicas are paused before the write, so
that a read which is not routed by the token would miss it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from lsn_consistency import Lsn, TokenCodec
from lsn_consistency.testing import EmbeddedCluster
from tests.examples.serving import (
    ROOT,
    answer,
    client,
    documented_commands,
    node_variables,
    running,
)

HEADER = "X-Consistency-Token"
# A machine that stalls lets a paused replica pass the lag bound; the primary serves either way.
FALLBACKS = {"not_caught_up", "lag_exceeded"}


@contextmanager
def example(
    name: str, pg: EmbeddedCluster, database: str, tmp_path: Path
) -> Iterator[httpx.Client]:
    (command,) = documented_commands(name)
    with (
        running(command, tmp_path / "log", node_variables(pg, database)) as url,
        client(url) as session,
    ):
        # What the application made when it started is on the replicas before they are paused.
        pg.wait_caught_up()
        yield session


@contextmanager
def paused(pg: EmbeddedCluster) -> Iterator[None]:
    with ExitStack() as resume:
        for replica in pg.replicas.values():
            replica.pause_replay()
            resume.callback(replica.resume_replay)
        yield


def test_every_example_is_tested() -> None:
    """An example that is added gets a test here."""
    names = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__"}
    assert {"starlette_app", "fastapi_app", "blocking_app", "two_services"} == names


def test_starlette(pg_cluster: EmbeddedCluster, database: str, tmp_path: Path) -> None:
    """With cookies alone, an order is seen at once: on the primary, and later on a replica."""
    replica_ports = {replica.port for replica in pg_cluster.replicas.values()}
    with example("starlette_app", pg_cluster, database, tmp_path) as http:
        with paused(pg_cluster):
            placed = http.post("/orders", json={"item": "tea"})
            assert 201 == placed.status_code
            assert all(name.startswith("consistency_token") for name in http.cookies)
            shown = answer(http.get("/orders"))
            assert shown.pop("reason") in FALLBACKS
            assert {"items": ["tea"], "port": pg_cluster.primary.port} == shown
        pg_cluster.wait_caught_up()
        later = answer(http.get("/orders"))
        assert ["tea"] == later["items"]
        assert "caught_up" == later["reason"]
        assert later["port"] in replica_ports
        nodes = answer(http.get("/nodes"))
        assert {"primary": "primary", "replica_1": "replica", "replica_2": "replica"} == {
            name: node["role"] for name, node in nodes.items()
        }


def test_fastapi(pg_cluster: EmbeddedCluster, database: str, tmp_path: Path) -> None:
    """With the header alone, each route keeps the promise of its level."""
    with example("fastapi_app", pg_cluster, database, tmp_path) as http:
        with paused(pg_cluster):
            credited = http.post("/accounts/ann", params={"amount": 5})
            http.cookies.clear()
            headers = {HEADER: credited.headers[HEADER]}
            shown = answer(http.get("/accounts/ann", headers=headers))
            assert shown.pop("reason") in FALLBACKS
            assert {"balance": 5, "role": "primary"} == shown
            board = answer(http.get("/leaderboard", headers=headers))
            assert {"names": [], "role": "replica", "reason": "within_lag"} == board
            refused = http.delete("/accounts/ann", headers=headers)
            assert (409, "the account is not empty") == (
                refused.status_code,
                refused.json()["detail"],
            )
        http.cookies.clear()
        pg_cluster.wait_caught_up()
        shown = answer(http.get("/accounts/ann", headers=headers))
        assert {"balance": 5, "role": "replica", "reason": "caught_up"} == shown
        answer(http.post("/accounts/ann", params={"amount": -5}))
        closed = answer(http.delete("/accounts/ann"))
        assert {"role": "primary", "reason": "primary_required"} == closed


def test_blocking(pg_cluster: EmbeddedCluster, database: str, tmp_path: Path) -> None:
    """A job finds the order that its headers stand for, and the client sees what the job wrote."""
    with example("blocking_app", pg_cluster, database, tmp_path) as http:
        with paused(pg_cluster):
            placed = http.post("/orders")
            number = answer(placed)["order"]
            headers = {HEADER: placed.headers[HEADER]}
            shown = http.get("/receipts?wait", headers=headers)
            content = answer(shown)
            assert content.pop("reason") in FALLBACKS
            assert {"receipts": [[number, True]], "role": "primary"} == content
        pg_cluster.wait_caught_up()
        headers = {HEADER: shown.headers[HEADER]}
        later = answer(http.get("/receipts", headers=headers))
        assert {
            "receipts": [[number, True]],
            "role": "replica",
            "reason": "caught_up",
        } == later


def test_two_services(pg_cluster: EmbeddedCluster, database: str, tmp_path: Path) -> None:
    """Billing finds the order, and the client sees billing's invoice without having asked it."""
    run_billing, run_orders = documented_commands("two_services")
    variables = node_variables(pg_cluster, database)
    with (
        running(run_billing, tmp_path / "billing", variables) as billing_url,
        running(
            run_orders, tmp_path / "orders", {**variables, "BILLING_URL": billing_url}
        ) as orders_url,
        client(orders_url) as orders,
        client(billing_url) as billing,
    ):
        with pg_cluster.primary.connect(dbname=database) as conn:
            conn.execute("CREATE TABLE service_orders (item text)")
            conn.execute(
                "CREATE TABLE service_invoices"
                " (item text, written_after pg_lsn DEFAULT pg_current_wal_insert_lsn())"
            )
        pg_cluster.wait_caught_up()
        with paused(pg_cluster):
            placed = orders.post("/orders", json={"item": "tea"})
            assert {"orders_found": 1, "role": "primary"} == answer(placed)
            headers = {HEADER: placed.headers[HEADER]}
            shown = answer(billing.get("/invoices", headers=headers))
            assert {"items": ["tea"], "role": "primary"} == shown
        pg_cluster.wait_caught_up()
        later = answer(billing.get("/invoices", headers=headers))
        assert {"items": ["tea"], "role": "replica"} == later
        with pg_cluster.primary.connect(dbname=database) as conn:
            ((lsn,),) = conn.execute("SELECT written_after::text FROM service_invoices").fetchall()
    token = TokenCodec("for-the-example-only").decode(headers[HEADER])
    (position,) = token.positions.values()
    assert position.lsn > Lsn.parse(lsn)


@pytest.mark.parametrize("name", ["starlette_app", "fastapi_app", "blocking_app", "two_services"])
def test_docstring_names_the_variables(name: str) -> None:
    """The docstring says which environment variables the example needs."""
    text = (ROOT / "examples" / f"{name}.py").read_text()
    for variable in ("PRIMARY", "REPLICA_1", "REPLICA_2"):
        assert f'export {variable}="' in text
        assert f'os.environ["{variable}"]' in text
