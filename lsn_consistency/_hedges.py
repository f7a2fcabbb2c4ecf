"""
Two runs of one read at once: which one counts, and how often that may happen.

Hedged requests are those of Dean and Barroso, "The Tail at Scale" (2013): ask a second server when
the first is slow, and take the first answer. A budget keeps them a small share of the reads, so
that a cluster which is slow as a whole is not asked twice for everything.

Nothing here waits or does I/O. Everything may be called from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from lsn_consistency._retries import Ended

BURST: Final = 10.0
"""How many hedges may follow each other when many reads went without."""


class HedgeBudget:
    """
    Allow hedges for at most a share of the reads: a token bucket filled by reads, not by time.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._lock = threading.Lock()
        self._held = BURST if share else 0.0

    def earn(self) -> None:
        """
        Count one read that could be hedged.
        """
        with self._lock:
            self._held = min(BURST, self._held + self._share)

    def spend(self) -> bool:
        """
        Take one hedge; False if the share is used up.
        """
        with self._lock:
            if self._held < 1.0:
                return False
            self._held -= 1.0
            return True

    def refund(self) -> None:
        """
        Give back what was taken for a hedge that did not come about.
        """
        with self._lock:
            self._held = min(BURST, self._held + 1.0)


class Race:
    """
    Let one of the runs of a read win; the others are losers, whatever they end with.

    A race is over when the winner has done everything that belongs to its read, or when no run is
    left. ``closed`` tells that nobody waits for an answer any more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake: Callable[[], object] | None = None
        self._claimed: Run | None = None
        self._closed = False
        self.runs: list[Run] = []

    def enter(self) -> Run:
        """
        Add a run.
        """
        with self._lock:
            run = Run(self)
            self.runs.append(run)
            return run

    def claim(self, run: Run) -> bool:
        """
        Let ``run`` be the winner; False if there is one already, or nobody waits.
        """
        with self._lock:
            if self._closed or self._claimed is not None:
                return False
            self._claimed = run
            return True

    def close(self) -> None:
        """
        Nobody waits for an answer any more: no run wins from now on.
        """
        with self._lock:
            self._closed = True

    def notify(self, wake: Callable[[], object]) -> None:
        """
        Have ``wake`` called when the race is over, at once if it is.
        """
        with self._lock:
            self._wake = wake
        self._wake_if_over()

    @property
    def winner(self) -> Run | None:
        """
        Return the run whose answer counts, once its read is closed.
        """
        won = self._claimed
        return won if won is not None and won.left else None

    @property
    def is_decided(self) -> bool:
        """
        Tell whether an answer would come too late.
        """
        return self._closed or self._claimed is not None

    @property
    def is_over(self) -> bool:
        """
        Tell whether there is nothing to wait for.
        """
        return self.winner is not None or all(run.left for run in self.runs)

    @property
    def losers(self) -> list[Run]:
        """
        Return the runs that go on although their answer does not count.
        """
        return [run for run in self.runs if run is not self._claimed and not run.left]

    def leave(self, run: Run) -> None:
        """
        Note that a run has ended and given back what it held.
        """
        run.left = True
        self._wake_if_over()

    def _wake_if_over(self) -> None:
        if self._wake is not None and self.is_over:
            self._wake()


class Run:
    """
    Stand for one run of the function in a race.

    ``lease`` is the connection that it got, ``ended`` how it ended, ``task`` what the driver may
    cancel. Between `begin` and `end` the function uses the connection, and another thread may
    interrupt it. A run that ``is_withdrawn`` does not begin.
    """

    def __init__(self, race: Race) -> None:
        self.race = race
        self.lease: Any = None
        self.ended: Ended | None = None
        self.task: Any = None
        self.left = False
        self._lock = threading.Lock()
        self._conn: Any = None
        self._is_cut = False
        self._over = threading.Event()
        self._interrupted: threading.Event | None = None
        self.is_withdrawn = False
        self.has_begun = False

    @property
    def is_over(self) -> bool:
        """
        Tell whether the function has ended, or never will begin.
        """
        return self._over.is_set()

    def withdraw(self) -> bool:
        """
        Keep a run from beginning; False if it has begun. Its lease is the caller's then.
        """
        with self._lock:
            self.is_withdrawn = not self.has_begun and not self._over.is_set()
            return self.is_withdrawn

    def begin(self, conn: Any) -> bool:
        """
        Note that the function starts to use ``conn``; False if its answer would come too late.
        """
        with self._lock:
            if self.is_withdrawn or self.race.is_decided:
                self._over.set()
                return False
            self._conn, self.has_begun = conn, True
            return True

    def end(self, seconds: float) -> bool:
        """
        Note that the function has ended, and tell whether its connection may be used again.

        An interruption under way has ``seconds`` to end: it must not hit the next user.
        """
        with self._lock:
            self._conn = None
            self._over.set()
            interrupted = self._interrupted
        if interrupted is not None and not interrupted.wait(seconds):
            return False
        return not self._is_cut

    def wait(self, seconds: float) -> bool:
        """
        Wait for the end of the function; False if it has not ended after ``seconds``.
        """
        return self._over.wait(seconds)

    @contextmanager
    def interrupting(self) -> Iterator[Any]:
        """
        Yield the connection to interrupt, or None if the function does not use it.

        The connection is not given back before the block has ended.
        """
        with self._lock:
            conn = self._conn
            if conn is not None:
                self._interrupted = threading.Event()
        try:
            yield conn
        finally:
            if conn is not None and self._interrupted is not None:
                self._interrupted.set()

    @contextmanager
    def cutting(self) -> Iterator[Any]:
        """
        Yield the connection to cut off, or None if the function does not use it.

        The connection is not given back before the block has ended, and not used again.
        """
        with self._lock:
            self._is_cut = self._is_cut or self._conn is not None
            yield self._conn
