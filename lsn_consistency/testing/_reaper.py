"""
Find, signal and sweep away the processes of a cluster's folder.

This file is imported by the testing kit and also run as a script, by its path: then it
waits on standard input until the test process closes it or dies, and clears up what that
process left behind. So it may import the standard library only, and nothing heavy.

A process is never judged by its number alone, which may have been given to another one by
now: it must be a PostgreSQL program that works in the folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Process", "alive", "process_table", "processes_in", "send", "sweep", "tree"]

GRACE_SECONDS = 5.0
"""How long a postmaster may take over an immediate shutdown before it is killed."""

SWEEP_SECONDS = 20.0
"""How long a sweep goes on in all; a process that survives SIGKILL for this long is left."""

POLL_SECONDS = 0.01
SETTLE_SECONDS = 0.1

RELEASED = b"released"
"""What the test process sends when it has cleared up itself."""

_PROGRAMS = frozenset({"postgres", "initdb", "pg_basebackup", "pg_rewind", "pgbouncer"})
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """
    One row of the process table; `state` is the letter that ps shows, Z for a zombie.
    """

    pid: int
    ppid: int
    state: str
    argv: tuple[str, ...]

    @property
    def stopped(self) -> bool:
        """
        True while the process is held by SIGSTOP.
        """
        return self.state.startswith(("T", "t"))


def process_table() -> dict[int, Process]:
    """
    Return every process that is alive, by its number; zombies are not alive.
    """
    rows = _from_proc() if (_PROC / "self" / "stat").exists() else _from_ps()
    return {row.pid: row for row in rows if not row.state.startswith(("Z", "X"))}


def _from_proc() -> list[Process]:
    """Read the process table of Linux, which is there also where ps is not."""
    rows = []
    for entry in os.listdir(_PROC):
        if entry.isdigit():
            # A process may end between the listing and the reading of its files.
            with contextlib.suppress(OSError, IndexError, ValueError):
                rows.append(_read_proc(int(entry)))
    return rows


def _read_proc(pid: int) -> Process:
    """Read one process; the name in parentheses may itself hold spaces and parentheses."""
    stat = (_PROC / str(pid) / "stat").read_text(errors="replace")
    state, ppid = stat.rpartition(")")[2].split()[:2]
    raw = (_PROC / str(pid) / "cmdline").read_bytes().rstrip(b"\0")
    argv = tuple(raw.decode("utf-8", "replace").split("\0"))
    return Process(pid, int(ppid), state, argv)


def _from_ps() -> list[Process]:
    """Ask ps, where there is no /proc (macOS and the BSDs)."""
    command = ["ps", "-A", "-ww", "-o", "pid=,ppid=,stat=,command="]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = []
    for line in listing.splitlines():
        with contextlib.suppress(ValueError):
            pid, ppid, state, command_line = line.split(None, 3)
            rows.append(Process(int(pid), int(ppid), state, tuple(command_line.split())))
    return rows


def alive(pid: int) -> bool:
    """
    Return whether a process of this number exists and is not a zombie.
    """
    return pid in process_table()


def tree(pid: int) -> list[Process]:
    """
    Return a process and all its descendants, parents before their children.
    """
    return _with_descendants(process_table(), {pid})


def _with_descendants(table: dict[int, Process], pids: set[int]) -> list[Process]:
    """Return the rows of these processes and of everything below them, each once."""
    found = {pid: table[pid] for pid in sorted(pids) if pid in table}
    waiting = list(found)
    # Each process enters the list once, so the walk ends even on a torn table.
    while waiting:
        parent = waiting.pop(0)
        for row in table.values():
            if row.ppid == parent and row.pid not in found:
                found[row.pid] = row
                waiting.append(row.pid)
    return list(found.values())


def send(processes: list[Process], number: signal.Signals) -> None:
    """
    Send a signal to each process; one that has ended meanwhile is passed over.
    """
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def processes_in(folder: Path) -> list[Process]:
    """
    Return the PostgreSQL processes that work in a folder, with all their descendants.

    Servers name the folder on their command line; their children rewrite theirs, but
    have the data directory as working directory, which also finds orphans.
    """
    table = process_table()
    return _with_descendants(table, {row.pid for row in table.values() if _works_in(row, folder)})


def _works_in(process: Process, folder: Path) -> bool:
    """Return whether this is one of our programs and names the folder or stands in it."""
    name = process.argv[0] if process.argv else ""
    if os.path.basename(name) not in _PROGRAMS and not name.startswith("postgres:"):
        return False
    inside = f"{folder}{os.sep}"
    if any(inside in f"{argument}{os.sep}" for argument in process.argv[1:]):
        return True
    try:
        return f"{os.readlink(_PROC / str(process.pid) / 'cwd')}{os.sep}".startswith(inside)
    except OSError:
        return False


def sweep(folder: Path) -> bool:
    """
    End every PostgreSQL process of a folder and remove the folder; return whether it is gone.

    The servers are asked for an immediate shutdown first, because that gives their shared
    memory back; what is left after a grace time is killed. Frozen processes are woken.
    """
    give_up = time.monotonic() + SWEEP_SECONDS
    kill_from = time.monotonic() + GRACE_SECONDS
    _ask(processes_in(folder))
    while (left := processes_in(folder)) and time.monotonic() < give_up:
        if time.monotonic() > kill_from:
            send(left, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    for lock_file in folder.glob("*/postmaster.pid"):
        _release_shared_memory(lock_file)
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _ask(processes: list[Process]) -> None:
    """Ask for an immediate shutdown, of processes that are able to hear it."""
    send(processes, signal.SIGQUIT)
    send(processes, signal.SIGCONT)


def _release_shared_memory(lock_file: Path) -> None:
    """
    Remove the System V segment that a killed server could not remove.

    The last field of the line "key id" in its lock file is the segment's number; the
    server's successor would do the same, but there will be none.
    """
    try:
        fields = lock_file.read_text().splitlines()[6].split()
        segment = int(fields[1])
    except (OSError, IndexError, ValueError):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).shmctl(segment, 0, None)


def main(folder: Path) -> None:
    """
    Wait until the test process lets go of the other end of standard input, then sweep.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read() == RELEASED:
        return
    give_up = time.monotonic() + SWEEP_SECONDS
    while time.monotonic() < give_up:
        gone = sweep(folder)
        # A program that was being started at that moment may only show up now.
        time.sleep(SETTLE_SECONDS)
        if gone and not processes_in(folder) and not folder.exists():
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
