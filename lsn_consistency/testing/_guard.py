"""
The watcher that clears up a cluster when its test process is killed.

It is a process in a session of its own that holds one end of a pipe. However the test process
ends, SIGKILL included, the operating system closes the other end, and the watcher sweeps.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import weakref
from pathlib import Path

from lsn_consistency.testing import _reaper
from lsn_consistency.testing._errors import ClusterError

__all__ = ["Guard"]

_CLOSED = -1

RELEASE_SECONDS = 10.0
"""How long the watcher may take to end after it was told that nothing is left to do."""


class Guard:
    """
    Watch over a folder from now until `release()`, whatever becomes of this process.

    The folder need not exist yet: start the guard before anything that it should clear up.
    Raises `ClusterError` when the watcher cannot be started.
    """

    def __init__(self, folder: Path) -> None:
        # Isolated mode without site: nothing of the user's environment runs in the watcher, and
        # it is up in a few milliseconds. It keeps none of our output streams open.
        command = [sys.executable, "-I", "-S", _reaper.__file__, str(folder)]
        reading, self._pipe = os.pipe()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            self._close()
            raise ClusterError(f"the clean-up process could not be started: {error}") from error
        finally:
            os.close(reading)
        _guards.add(self)

    def release(self) -> None:
        """
        End the watcher because nothing is left to clear up; safe to call twice.
        """
        if self._pipe != _CLOSED:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._pipe, _reaper.RELEASED)
            self._end(RELEASE_SECONDS)

    def abandon(self) -> None:
        """
        Leave the clean-up to the watcher, as if this process had died, and wait for it.
        """
        self._end(RELEASE_SECONDS + _reaper.SWEEP_SECONDS)

    def _end(self, seconds: float) -> None:
        """Hang up and wait; a watcher that does not end in time is left to itself."""
        self._close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def _close(self) -> None:
        """Close our end of the pipe; a forked child calls it as well, for its copy."""
        pipe, self._pipe = self._pipe, _CLOSED
        if pipe != _CLOSED:
            os.close(pipe)


_guards: weakref.WeakSet[Guard] = weakref.WeakSet()


def _forget_guards() -> None:
    """Let go of every pipe in a forked child: only the process that made it may hold it."""
    for guard in list(_guards):
        guard._close()
    _guards.clear()


os.register_at_fork(after_in_child=_forget_guards)
