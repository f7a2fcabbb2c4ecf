"""
The servers that suites measure on: one primary, two replicas, one table of a thousand rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from lsn_consistency.testing import EmbeddedCluster
from tests.benchmarks.findings import Bench

ROWS: Final = 1000
SELECT: Final = "SELECT name, price FROM items WHERE id = %s"
INSERT: Final = "INSERT INTO orders (item, quantity) VALUES (%s, 1)"

_TABLES: Final = f"""
    CREATE TABLE items (id int PRIMARY KEY, name text NOT NULL, price int NOT NULL);
    INSERT INTO items SELECT each, 'item ' || each, each FROM generate_series(1, {ROWS}) AS each;
    CREATE TABLE orders (id bigserial PRIMARY KEY, item int NOT NULL, quantity int NOT NULL)
"""


@contextmanager
def servers(bench: Bench, settings: Mapping[str, str] | None = None) -> Iterator[EmbeddedCluster]:
    """
    Start the servers, and note their version for the report.
    """
    with EmbeddedCluster(replicas=2, settings=settings, progress=bench.say) as pg:
        bench.data["postgresql"] = pg.primary.value("SHOW server_version")
        pg.primary.execute(_TABLES)
        pg.wait_caught_up()
        yield pg


def nodes(pg: EmbeddedCluster) -> dict[str, Any]:
    """
    Return the arguments of a router that name the servers.
    """
    replicas = {name: replica.conninfo for name, replica in pg.replicas.items()}
    return {"primary": pg.primary.conninfo, "replicas": replicas}


def is_measured(snapshot: Mapping[str, Mapping[str, Any]]) -> bool:
    """
    Tell whether a router knows the lag of every node, so that nothing is cold.
    """
    return all(node["healthy"] and node["lag_seconds"] is not None for node in snapshot.values())
