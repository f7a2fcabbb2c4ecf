"""
The folder of one cluster and how programs are run in it.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lsn_consistency.testing import _reaper
from lsn_consistency.testing._errors import ClusterError, tail
from lsn_consistency.testing._guard import Guard
from lsn_consistency.testing.programs import (
    Account,
    Programs,
    Progress,
    find_programs,
    make_readable,
    unprivileged_account,
)

__all__ = [
    "LOOPBACK",
    "POLL_SECONDS",
    "PROGRAM_SECONDS",
    "Workspace",
    "free_port",
    "wait_until",
]

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.005
PROGRAM_SECONDS = 120.0
"""How long initdb or pg_basebackup may take."""
COLLECT_SECONDS = 1.0

# Below the ports that Linux and macOS hand out by themselves: the port of a stopped server must
# not become the local end of somebody's connection.
_FIRST_PORT, _LAST_PORT = 18_000, 32_000
_PORT_TRIALS = 200


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """
    Poll a condition until it holds or the seconds are over; return whether it held.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def free_port() -> int:
    """
    Return a TCP port of the loopback address that nobody listens on at the moment.

    Somebody may still be faster; a server that is refused its port must be given another.
    """
    for _ in range(_PORT_TRIALS):
        port = random.SystemRandom().randint(_FIRST_PORT, _LAST_PORT)
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise ClusterError(f"no free TCP port on {LOOPBACK} in {_PORT_TRIALS} trials")


@dataclass(frozen=True)
class Workspace:
    """
    A guarded temporary folder, and the programs and the account that work in it.
    """

    folder: Path
    programs: Programs
    account: Account | None
    guard: Guard
    spawned: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @classmethod
    def make(cls, bindir: str | os.PathLike[str] | None, progress: Progress) -> Workspace:
        """
        Find the programs, start the guard, make the folder. Raises `ClusterError`.
        """
        account = unprivileged_account()
        return cls.around(make_readable(find_programs(bindir), account, progress), account)

    @classmethod
    def around(cls, programs: Programs, account: Account | None) -> Workspace:
        """
        Start the guard and make the folder for programs that are found. Raises `ClusterError`.
        """
        folder = _parent(account) / f"lsn-consistency-{secrets.token_hex(6)}"
        guard = Guard(folder)
        workspace = cls(folder, programs, account, guard)
        try:
            folder.mkdir(mode=0o700)
            if account is not None:
                os.chown(folder, account.uid, account.gid)
        except BaseException:
            workspace.remove()
            raise
        return workspace

    def remove(self) -> None:
        """
        End every process in the folder, remove it, and end the guard.

        Raises `ClusterError` if something could not be cleared up.
        """
        gone = False
        try:
            gone = _reaper.sweep(self.folder)
        finally:
            if gone:
                self.guard.release()
            else:
                self.guard.abandon()
            self._collect()
        if self.folder.exists():
            raise ClusterError(f"could not clear up {self.folder}")

    def _collect(self) -> None:
        """Take note of the end of programs that the sweep has ended."""
        for program in self.spawned:
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(COLLECT_SECONDS)

    def spawn(self, log: Path, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """
        Start a program in a session of its own, its output appended to a log file.
        """
        self.spawned[:] = [known for known in self.spawned if known.poll() is None]
        with log.open("ab") as output:
            try:
                started = subprocess.Popen(
                    [self.programs.path(program), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=self.folder,
                    env=_environment(self.folder),
                    start_new_session=True,
                    user=self.account.uid if self.account else None,
                    group=self.account.gid if self.account else None,
                    extra_groups=[] if self.account else None,
                )
            except OSError as error:
                name = self.account.name if self.account else "this account"
                raise ClusterError(f"{program} could not be run as {name}: {error}") from error
        self.spawned.append(started)
        return started

    def finish(self, program: subprocess.Popen[bytes], log: Path) -> None:
        """
        Wait for a program that has to end; `ClusterError` with its output if it fails.
        """
        name = os.path.basename(str(program.args[0] if isinstance(program.args, list) else ""))
        try:
            status = program.wait(PROGRAM_SECONDS)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()
            problem = f"{name} took more than {PROGRAM_SECONDS:g} s"
            raise ClusterError(problem, tail(log)) from None
        if status != 0:
            raise ClusterError(f"{name} failed with status {status}", tail(log))


def _parent(account: Account | None) -> Path:
    """Return the temporary folder, or /tmp if the account may not enter the configured one."""
    configured = Path(tempfile.gettempdir()).resolve()
    if account is None or all(folder.stat().st_mode & 0o001 for folder in _line(configured)):
        return configured
    return Path("/tmp")


def _line(folder: Path) -> list[Path]:
    """Return a folder and all folders above it."""
    return [folder, *folder.parents]


def _environment(folder: Path) -> dict[str, str]:
    """Return our environment without what PostgreSQL's programs would obey in it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PG", "LC_", "LANG"))
    }
    return {**kept, "LC_ALL": "C", "HOME": str(folder)}
