"""Nothing is left of a cluster, however the process that started it ends."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

import lsn_consistency
from lsn_consistency.testing import EmbeddedCluster, find_programs
from lsn_consistency.testing._reaper import GRACE_SECONDS, process_table, processes_in, sweep
from lsn_consistency.testing.programs import CACHE_VARIABLE

WAIT_SECONDS = 60.0
ROOT = Path(next(iter(lsn_consistency.__path__))).parent

# Standard output is closed once the folder is printed: the test then reads its end, unless a
# server or the clean-up process holds it open.
RUNNING = """
import os, signal
from lsn_consistency.testing import EmbeddedCluster

signal.alarm(120)
with EmbeddedCluster(replicas=1) as pg:
    print(pg.primary.datadir.parent, flush=True)
    {extra}
    os.close(1)
    while True:
        signal.pause()
"""

STARTING = """
import os, signal
from lsn_consistency.testing import EmbeddedCluster
from lsn_consistency.testing._workspace import Workspace

signal.alarm(120)
pg = EmbeddedCluster(replicas=1)
make = Workspace.make

def tell(*arguments):
    workspace = make(*arguments)
    print(workspace.folder, flush=True)
    return workspace

def progress(text):
    if text.startswith({step!r}):
        os.close(1)

Workspace.make = tell
pg._report = progress
pg.start()
while True:
    signal.pause()
"""

FORKING = """
import os, sys
from lsn_consistency.testing import EmbeddedCluster

with EmbeddedCluster(replicas=0) as pg:
    child = os.fork()
    if child == 0:
        pg.stop()
        sys.exit(0)
    os.waitpid(child, 0)
    print(pg.primary.value("SELECT 42"))
"""

PLAIN = """
import os
from lsn_consistency.testing import EmbeddedCluster

with EmbeddedCluster(replicas=1) as pg:
    folder = pg.primary.datadir.parent
    pg.primary.execute("CREATE TABLE t (n int)")
    pg.wait_caught_up()
    rows = pg.replicas["replica_1"].value("SELECT count(*) FROM t")
    print(folder.stat().st_uid == os.geteuid(), rows)
print(folder.exists())
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@contextmanager
def running(script: str) -> Iterator[tuple[subprocess.Popen[str], Path, str]]:
    """Run a script until it closes its standard output, and return what it has printed there."""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            folder, *more = process.stdout.read().split()
            yield process, Path(folder), "".join(more)
        finally:
            process.kill()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def is_gone(folder: Path) -> bool:
    """Return whether no process names the folder, the clean-up one included, and it is removed."""
    named = [row for row in process_table().values() if str(folder) in " ".join(row.argv)]
    return not named and not processes_in(folder) and not folder.exists()


@pytest.mark.parametrize(
    ("number", "to_group"),
    [
        (signal.SIGKILL, False),
        (signal.SIGKILL, True),
        (signal.SIGTERM, False),
        (signal.SIGHUP, True),
        (signal.SIGINT, True),
    ],
)
def test_a_killed_process_leaves_nothing(number: signal.Signals, to_group: bool) -> None:
    """No server and no folder outlives the test process, whichever signal ends it."""
    with running(RUNNING.format(extra="")) as (process, folder, _):
        assert len(processes_in(folder)) > 2
        (os.killpg if to_group else os.kill)(process.pid, number)
        process.wait(WAIT_SECONDS)
        assert eventually(lambda: is_gone(folder))


def test_frozen_servers_of_a_killed_process_are_ended() -> None:
    """Servers that are held by SIGSTOP do not hold up the cleaning: they are woken to end."""
    freeze = "[node.freeze() for node in pg.nodes.values()]"
    with running(RUNNING.format(extra=freeze)) as (process, folder, _):
        assert {True} == {row.stopped for row in processes_in(folder)}
        started = time.monotonic()
        process.kill()
        process.wait(WAIT_SECONDS)
        assert eventually(lambda: is_gone(folder))
        assert time.monotonic() - started < GRACE_SECONDS


@pytest.mark.parametrize("step", ["initialising", "starting", "copying", "waiting"])
def test_a_process_killed_while_it_starts_a_cluster_leaves_nothing(step: str) -> None:
    """At every step of the start there is somebody to clear up."""
    with running(STARTING.format(step=step)) as (process, folder, _):
        process.kill()
        process.wait(WAIT_SECONDS)
        assert eventually(lambda: is_gone(folder))


def test_a_forked_child_does_not_keep_the_cluster_alive() -> None:
    """A child that outlives the test process does not hold back the cleaning."""
    fork = "child = os.fork() or (os.close(1), signal.pause()); print(child, flush=True)"
    with running(RUNNING.format(extra=fork)) as (process, folder, child):
        process.kill()
        process.wait(WAIT_SECONDS)
        try:
            assert eventually(lambda: is_gone(folder))
            assert int(child) in process_table()
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_a_forked_child_that_ends_does_not_end_the_cluster() -> None:
    """The cluster belongs to the process that started it: `stop()` elsewhere does nothing."""
    told = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, env=environment()
    )
    assert ("42\n", "", 0) == (told.stdout, told.stderr, told.returncode)


def test_only_postgres_in_the_folder_is_swept(tmp_path: Path) -> None:
    """A stranger is spared whose number is in a lock file and who names the folder."""
    datadir = tmp_path / "cluster" / "primary"
    datadir.mkdir(parents=True)
    wait = "import sys; sys.stdin.read()"
    command = [sys.executable, "-c", wait, "-D", str(datadir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=datadir) as stranger:
        (datadir / "postmaster.pid").write_text(f"{stranger.pid}\n{datadir}\n")
        assert sweep(datadir.parent)
        assert (False, None) == (datadir.exists(), stranger.poll())


def test_killed_servers_leave_no_shared_memory() -> None:
    """The segment of a server that was killed is removed with its folder."""
    with EmbeddedCluster(replicas=0) as pg:
        lock_file = pg.primary.datadir / "postmaster.pid"
        segment = int(lock_file.read_text().splitlines()[6].split()[1])
        pg.primary.crash()
        assert lock_file.exists()
    known = subprocess.run(["ipcs", "-m"], capture_output=True, text=True, check=True).stdout
    assert str(segment) not in known.split()


def as_nobody(python: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script under the account nobody, with the packages that we have ourselves."""
    packages = os.pathsep.join([str(ROOT), str(Path(psycopg.__file__).parents[1])])
    return subprocess.run(
        [python, "-c", script],
        env={**os.environ, "PYTHONPATH": packages},
        cwd="/",
        user="nobody",
        group=pwd.getpwnam("nobody").pw_gid,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
    )


def python_for_nobody() -> str | None:
    """Return an interpreter like ours that another account can run, if we are root."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        with suppress(OSError, KeyError):
            if os.geteuid() == 0 and 0 == as_nobody(python, "import psycopg").returncode:
                return python
    return None


def test_a_plain_user_runs_a_cluster() -> None:
    """Without root the servers run under the account of the test itself."""
    python = python_for_nobody()
    if python is None:
        pytest.skip("not root, or no interpreter that is open to all accounts")
    told = as_nobody(python, PLAIN)
    assert ("True 0\nFalse\n", "", 0) == (told.stdout, told.stderr, told.returncode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes to another account")
def test_programs_that_the_account_cannot_read_are_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL in an environment that only root can enter works, by a copy made once."""
    source = find_programs().bindir.resolve().parent
    if not (source / "share").is_dir():
        pytest.skip("the PostgreSQL here is installed in the system and cannot be moved")
    package = source.parent
    for folder in (package, package.with_name(f"{package.name}.libs")):
        if folder.is_dir():
            shutil.copytree(folder, tmp_path / "closed" / folder.name, symlinks=True)
    (tmp_path / "closed").chmod(0o700)
    bindir = tmp_path / "closed" / package.name / source.name / "bin"
    steps: list[str] = []
    with tempfile.TemporaryDirectory() as cache:
        os.chmod(cache, 0o755)
        monkeypatch.setenv(CACHE_VARIABLE, cache)
        for _ in range(2):
            with EmbeddedCluster(replicas=0, bindir=bindir, progress=steps.append) as pg:
                assert 1 == pg.primary.value("SELECT 1")
    assert 1 == len([step for step in steps if step.startswith("copying PostgreSQL to ")])
