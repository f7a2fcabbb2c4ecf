"""
A loop on a virtual clock: tasks are generators, and time is what the next entry says.

A task yields the seconds that it sleeps, or a `Signal` and the seconds that it waits for it at
most; it is sent whether the signal came. Entries of the same moment run in the order in which they
were made, so a run depends on nothing but what its tasks do.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from typing import Any, Final, TypeAlias

Wait: TypeAlias = "float | tuple[Signal, float]"
Steps: TypeAlias = Generator[Wait, Any, Any]
"""What a task, or a part of one, is made of."""


MAX_CLEANUP: Final = 100
TICK_SECONDS: Final = 1e-6


class Signal:
    """Wake the one task that waits for it."""

    __slots__ = ("_loop", "_task", "_ticket", "is_set")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._task: Task | None = None
        self._ticket = 0
        self.is_set = False

    def set(self) -> None:
        self.is_set = True
        # One that has gone on since, by its time or a cancellation, waits for something else.
        if self._task is not None and self._task.ticket == self._ticket:
            self._loop.resume_at(self._loop.now, self._task, True)
        self._task = None

    def clear(self) -> None:
        self.is_set = False

    def await_by(self, task: Task) -> None:
        self._task, self._ticket = task, task.ticket


class Task:
    """Run one generator; ``ticket`` tells its pending entry from those that came to nothing."""

    __slots__ = ("_steps", "done", "error", "result", "running", "ticket")

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.ticket = 0
        self.running = False
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def go(self, loop: Loop, value: Any, error: BaseException | None = None) -> None:
        self.ticket += 1
        self.running = True
        try:
            asked = self._steps.send(value) if error is None else self._steps.throw(error)
        except StopIteration as finished:
            self.done, self.result = True, finished.value
            return
        except BaseException as failure:
            self.done, self.error = True, failure
            loop.ended_with(failure)
            return
        finally:
            self.running = False
        if not isinstance(asked, tuple):
            loop.resume_at(loop.now + asked, self, None)
            return
        signal, seconds = asked
        if signal.is_set:
            loop.resume_at(loop.now, self, True)
            return
        signal.await_by(self)
        # Less would not move a clock that stands at a greater number.
        loop.resume_at(loop.now + max(TICK_SECONDS, seconds), self, False)

    def close(self) -> None:
        """End it; what it does to clean up is done at once."""
        self.ticket += 1
        self.done = True
        for _ in range(MAX_CLEANUP):
            try:
                self._steps.close()
            except RuntimeError:
                # It yields while it cleans up.
                continue
            return


class Loop:
    """Hold what is to come, and the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self._entries: list[tuple[float, int, Task | None, int, Any]] = []
        self._count = 0
        self._failure: BaseException | None = None
        self._tasks: list[Task] = []

    def start(self, steps: Steps) -> Task:
        task = Task(steps)
        self._tasks.append(task)
        self.resume_at(self.now, task, None)
        return task

    def resume_at(self, when: float, task: Task, value: Any) -> None:
        self._count += 1
        heapq.heappush(self._entries, (when, self._count, task, task.ticket, value))

    def call_later(self, seconds: float, call: Callable[[], object]) -> None:
        self._count += 1
        heapq.heappush(self._entries, (self.now + seconds, self._count, None, 0, call))

    def cancel(self, task: Task, error: BaseException) -> None:
        """Throw an error into a task that sleeps or waits."""
        if not task.done and not task.running:
            task.go(self, None, error)

    def ended_with(self, error: BaseException) -> None:
        # A task that ends with an error is a fault of the simulation, or of the core.
        if self._failure is None:
            self._failure = error

    def close(self) -> None:
        for task in self._tasks:
            if not task.done:
                task.close()

    def run(self, steps: Steps, *, limit: int) -> None:
        """Run one task to its end; raises what any task raised, and past ``limit`` steps."""
        main = self.start(steps)
        entries = self._entries
        while not main.done:
            when, _, task, ticket, value = heapq.heappop(entries)
            if task is None:
                self.now = when
                value()
            elif task.ticket == ticket and not task.done:
                self.now = when
                task.go(self, value)
            else:
                continue
            self.steps += 1
            if self._failure is not None:
                raise self._failure
            if self.steps > limit:
                raise AssertionError(f"the end is not reached in {limit} steps")
