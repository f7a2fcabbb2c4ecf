"""The pooler of the testing kit itself: it runs, it is refused in words, it leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psycopg
import pytest

from lsn_consistency.testing import (
    ClusterError,
    EmbeddedCluster,
    PgBouncer,
    ProgramsNotFoundError,
    find_pgbouncer,
)
from lsn_consistency.testing._reaper import alive
from lsn_consistency.testing.pgbouncer import PROGRAM_VARIABLE
from tests.cluster.harness import wait_until


def test_it_stands_before_one_node_or_several(pg: EmbeddedCluster) -> None:
    """One node gives the entry postgres; a mapping gives an entry by each name."""
    with PgBouncer(pg.primary) as one, PgBouncer(pg.nodes, "session") as all_nodes:
        assert pg.primary.port == _port(one.conninfo)
        for name, node in pg.nodes.items():
            assert node.port == _port(all_nodes.conninfo_for(name, user="app"))
    assert not one.running


def test_it_does_not_run_as_root(pg: EmbeddedCluster) -> None:
    """It runs as the account that the servers run as."""
    with PgBouncer(pg.primary) as pooler:
        owner = os.stat(f"/proc/{pooler.pid}").st_uid
    assert pg.primary.datadir.stat().st_uid == owner
    assert owner != 0


def test_a_setting_that_it_does_not_take_is_reported(pg: EmbeddedCluster) -> None:
    """What PgBouncer says is in the error, and nothing is left."""
    pooler = PgBouncer(pg.primary, settings={"pool_size_of_dreams": "1"})
    with pytest.raises(ClusterError, match="pool_size_of_dreams"):
        pooler.start()
    assert not pooler.running


def test_without_the_program_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that was ordered and is none is refused by name."""
    monkeypatch.setenv(PROGRAM_VARIABLE, "/nowhere/pgbouncer")
    with pytest.raises(ProgramsNotFoundError, match=r"/nowhere/pgbouncer.*apt-get install"):
        find_pgbouncer()
    monkeypatch.setenv(PROGRAM_VARIABLE, sys.executable)
    with pytest.raises(ProgramsNotFoundError, match="is not PgBouncer"):
        find_pgbouncer()


def test_the_console_raises_what_it_is_told(pg: EmbeddedCluster) -> None:
    """A command that the console refuses is an error that names it."""
    with PgBouncer(pg.primary) as pooler:
        with pytest.raises(psycopg.OperationalError, match="PAUSE nobody"):
            pooler.pause("nobody")
        assert {"name": "postgres", "port": str(pg.primary.port)} == {
            key: value
            for key, value in pooler.admin("SHOW DATABASES")[-1].items()
            if key in ("name", "port")
        }


def test_a_killed_test_process_leaves_no_pooler(pg: EmbeddedCluster, tmp_path: Path) -> None:
    """However the process ends that started it: PgBouncer ends too, and its folder is removed."""
    script = f"""
        import os, signal
        from lsn_consistency.testing import PgBouncer
        pooler = PgBouncer({{"main": "host=127.0.0.1 port={pg.primary.port} dbname=postgres"}})
        pooler.start()
        print(pooler.pid, pooler._workspace.folder, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        cwd=root,
        timeout=60,
        text=True,
    )
    assert -signal.SIGKILL == ended.returncode
    pid, folder = ended.stdout.split()
    wait_until(lambda: not alive(int(pid)) and not Path(folder).exists(), 30)


def _port(conninfo: str) -> int:
    """Ask who is at the other end."""
    with psycopg.connect(conninfo) as conn:
        row = conn.execute("SELECT inet_server_port()").fetchone()
    assert row is not None
    return int(row[0])
