"""The code of the README and the documents runs, and prints what they say it prints."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lsn_consistency import Router, Session
from lsn_consistency.testing import EmbeddedCluster
from tests.examples.documents import ROOT, Block, blocks, python_blocks
from tests.examples.serving import answer, client, running

README = ROOT / "README.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
ORDERS = "CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY, item text)"


def test_application(pg_cluster: EmbeddedCluster, database: str, tmp_path: Path) -> None:
    """The first block is a whole application whose clients see what they wrote, at any lag."""
    primary, replica = pg_cluster.primary, pg_cluster.replicas["replica_1"]
    with primary.connect(dbname=database) as conn:
        conn.execute(ORDERS)
    code = python_blocks(README)[0].text
    for name, node in {"pg0": primary, "pg1": replica}.items():
        assert f'"host={name} dbname=shop"' in code
        code = code.replace(f"host={name} dbname=shop", node.conninfo_for(dbname=database))
    (tmp_path / "readme_app.py").write_text(f'KEY = "a key"\n{code}')
    pg_cluster.wait_caught_up()
    command = "uvicorn readme_app:app --port 8000"
    with running(command, tmp_path / "log", {}, tmp_path) as url, client(url) as http:
        replica.pause_replay()
        assert 201 == http.post("/orders", json="tea").status_code
        assert ["tea"] == answer(http.get("/orders"))
        assert [] == replica_items(replica, database)
        replica.resume_replay()
        pg_cluster.wait_caught_up()
        assert ["tea"] == answer(http.get("/orders"))


def replica_items(replica: Any, database: str) -> list[Any]:
    with replica.connect(dbname=database) as conn:
        rows: list[Any] = conn.execute("SELECT item FROM orders").fetchall()
    return rows


def test_other_ways(pg_cluster: EmbeddedCluster, database: str) -> None:
    """The header between services, and the choice, work as they stand in the README."""
    _, header, choice = python_blocks(README)
    nodes = {name: node.conninfo_for(dbname=database) for name, node in pg_cluster.nodes.items()}
    with pg_cluster.primary.connect(dbname=database) as conn:
        conn.execute(ORDERS)
    pg_cluster.wait_caught_up()
    for replica in pg_cluster.replicas.values():
        replica.pause_replay()
    with Router(primary=nodes.pop("primary"), replicas=nodes) as router, Session():
        names: dict[str, Any] = {"KEY": "a key", "router": router}
        exec(header.text, names)
        assert [("tea",)] == names["orders"]
        assert ["X-Consistency-Token"] == list(names["headers"])
        pg_cluster.heal()
        deadline = time.monotonic() + 10
        while router.choose().is_primary and time.monotonic() < deadline:
            time.sleep(0.01)
        printed = run(choice, names)
        assert re.fullmatch(r"replica_\d replica (within_lag|caught_up) [\d.e-]+\n", printed)


def run(block: Block, names: dict[str, Any]) -> str:
    """Execute a block and return what it printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(block.text, names)
    return output.getvalue()


@pytest.mark.parametrize("name", ["demo", "test"])
def test_commands(name: str) -> None:
    """Each of the two commands is one line that starts from nothing."""
    (block,) = [each for each in blocks(README) if each.marker == f"command: {name}"]
    (line,) = block.text.splitlines()
    environment, install, last = line.split(" && ")
    assert "python3 -m venv .venv" == environment
    assert f".venv/bin/pip install -e '.[{name}]'" == install
    ending = {"demo": "lsn-consistency demo", "test": "python -m pytest"}
    assert f".venv/bin/{ending[name]}" == last


def test_tutorial(tmp_path: Path) -> None:
    """The tutorial, typed in from top to bottom, prints what stands below each step."""
    steps = [each for each in blocks(TUTORIAL) if each.language in ("python", "text")]
    script, expected = [], []
    for number, step in enumerate(steps):
        if step.language == "python":
            script.append(step.text + f'\nprint("--- {number}")\n')
            shown = steps[number + 1].text if steps[number + 1 :] else ""
            silent = not shown or steps[number + 1].language != "text"
            expected.append(("" if silent else shown) + f"--- {number}\n")
    printed = python(tmp_path, "tutorial.py", "".join(script))
    assert "".join(expected) == printed


def test_users_tests(tmp_path: Path) -> None:
    """The tests that docs/testing.md shows pass, on a cluster of their own."""
    (block,) = [
        each for each in blocks(ROOT / "docs" / "testing.md") if each.marker == "run: pytest"
    ]
    (tmp_path / "test_orders.py").write_text(block.text)
    plugin = "lsn_consistency.testing.pytest_plugin"
    arguments = ["-p", "no:lsn_consistency", "-p", plugin, "-p", "no:cacheprovider"]
    script = f"import pytest, sys\nsys.exit(pytest.main({[*arguments, str(tmp_path)]!r}))\n"
    assert "2 passed" in python(tmp_path, "run.py", script)


def test_kit_without_pytest() -> None:
    """Every block of docs/testing.md that makes an embedded cluster runs as it stands there."""
    found = [
        each
        for each in python_blocks(ROOT / "docs" / "testing.md")
        if "with EmbeddedCluster(" in each.text
    ]
    assert found
    for block in found:
        exec(block.text, {})


def test_token_format() -> None:
    """The example of a token text is one."""
    for block in python_blocks(ROOT / "docs" / "token-format.md"):
        exec(block.text, {})


def test_grants(pg_cluster: EmbeddedCluster) -> None:
    """PostgreSQL takes the statements of docs/grants.md."""
    pg_cluster.primary.execute("DROP ROLE IF EXISTS shop")
    pg_cluster.primary.execute("CREATE ROLE shop")
    statements = [each for each in blocks(ROOT / "docs" / "grants.md") if each.language == "sql"]
    assert 3 == len(statements)
    for block in statements:
        pg_cluster.primary.execute(block.text)
    pg_cluster.primary.execute("DROP OWNED BY shop")


def python(folder: Path, name: str, script: str) -> str:
    """Run a script in a process of its own, with every warning an error."""
    (folder / name).write_text(script)
    ignored = ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")
    environment = {key: value for key, value in os.environ.items() if key not in ignored}
    done = subprocess.run(
        [sys.executable, "-W", "error", name],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout
