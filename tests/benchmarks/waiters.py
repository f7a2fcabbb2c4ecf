"""
Reads that wait for a position: how soon all are woken, and what an observation costs meanwhile.

No server is involved: an observation is handed to the core as the monitor does with its probe's.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

from lsn_consistency import AsyncRouter
from lsn_consistency._core import Core
from lsn_consistency._steps import AwaitPosition
from tests.benchmarks import offline
from tests.benchmarks.findings import Bench
from tests.benchmarks.measuring import compare

WAITING: Final = 10_000
RELEASED: Final = (1, 10, 100, 1000, 10_000)
_REPLICA: Final = "replica_1"
_AHEAD: Final = offline.LAST_LSN + 1000
_FAR: Final = offline.LAST_LSN + 1_000_000_000
_LONG_SECONDS: Final = 600.0


def run(bench: Bench) -> None:
    """
    Measure the waiting.
    """
    asyncio.run(_woken(bench))
    _idle_observations(bench)
    _releasing_observations(bench)


# Woken


async def _woken(bench: Bench) -> None:
    waits, floors, reads = [], [], []
    for _ in range(bench.rounds(9, 3)):
        waits.append(await _until_all(_waiting))
        floors.append(await _until_floor())
    for _ in range(bench.rounds(9, 1)):
        reads.append(await _until_all(_choosing))
    bench.find(
        "waiters.woken",
        f"{WAITING:,} waiters run again after the observation",
        [seconds * 1000 for seconds in waits],
        "ms",
        at_most=50.0,
        floor=f"The same number of tasks that await a bare future and do nothing else take "
        f"{statistics.median(floors) * 1000:.1f} ms: asyncio runs them one after the other.",
    )
    bench.find(
        "waiters.woken_over_floor",
        "the same over as many tasks that await a bare future",
        [ours / least for ours, least in zip(waits, floors, strict=True)],
    )
    bench.find(
        "waiters.chosen",
        f"{WAITING:,} waiting choose() have their answer",
        [seconds * 1000 for seconds in reads],
        "ms",
    )


async def _waiting(router: AsyncRouter) -> float:
    required, since = offline.position_at(_AHEAD), time.monotonic()
    await router._await_position(AwaitPosition(required, _LONG_SECONDS, since))
    return time.perf_counter()


async def _choosing(router: AsyncRouter) -> float:
    route = await router.choose(offline.token_at(_AHEAD), timeout=_LONG_SECONDS)
    ended = time.perf_counter()
    assert route.waited_seconds > 0, route
    return ended


async def _until_all(wait: Callable[[AsyncRouter], Any]) -> float:
    """Return how long after the observation the last one ran again, in seconds."""
    router = offline.async_router(2)
    core = offline.core_of(router)
    with _Calm():
        tasks = [asyncio.create_task(wait(router)) for _ in range(WAITING)]
        await asyncio.sleep(0)
        assert len(core.cluster.positions) == WAITING, "not everybody waits"
        everybody = asyncio.gather(*tasks)
        began = time.perf_counter()
        core.observed(_REPLICA, offline.seen_at(_AHEAD, replica=1), sample=True)
        ended = max(await everybody)
    assert len(core.cluster.positions) == 0
    return float(ended - began)


async def _until_floor() -> float:
    futures = [asyncio.get_running_loop().create_future() for _ in range(WAITING)]

    async def wait(future: asyncio.Future[None]) -> float:
        await future
        return time.perf_counter()

    with _Calm():
        tasks = [asyncio.create_task(wait(future)) for future in futures]
        await asyncio.sleep(0)
        everybody = asyncio.gather(*tasks)
        began = time.perf_counter()
        for future in futures:
            future.set_result(None)
        return max(await everybody) - began


class _Calm:
    """
    Keep the garbage collector away, as `measuring` does.
    """

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *exc_info: object) -> None:
        gc.enable()


# Observations


def _idle_observations(bench: Bench) -> None:
    numbers = (0, 10, 1000, WAITING)
    ways: dict[str, Callable[[], object]] = {}
    for number in numbers:
        core = _core_with(number, _FAR)
        seen = offline.seen_at(offline.LAST_LSN + 1, replica=1)
        ways[f"{number:,} waiting"] = _observation(core, seen)
    compared = bench.add(
        compare(
            "an observation that releases nobody",
            ways,
            rounds=bench.rounds(31, 11),
            seconds=0.01,
            clock=time.thread_time,
        )
    )
    bench.find(
        "waiters.idle_observation",
        "an observation that releases nobody, 10 000 waiting over 10",
        compared.ratios("10,000 waiting", "10 waiting"),
        at_most=2.0,
    )


def _observation(core: Core, seen: Any) -> Callable[[], object]:
    return lambda: core.observed(_REPLICA, seen, sample=True)


def _core_with(number: int, lsn: int, core: Core | None = None) -> Core:
    core = core or offline.core_of(offline.blocking_router(2))
    for _ in range(number):
        core.cluster.wait_for_position(offline.position_at(lsn), _nothing, time.monotonic())
    return core


def _nothing() -> None:
    return None


def _releasing_observations(bench: Bench) -> None:
    turns = bench.rounds(15, 2)
    taken: dict[int, list[float]] = {number: [] for number in RELEASED}
    crowded: list[float] = []
    for _ in range(turns):
        for number in RELEASED:
            taken[number].append(_release(number, 0))
        crowded.append(_release(100, WAITING))
    rows = [
        [
            f"{number:,}",
            f"{statistics.median(seconds) * 1e6:.1f}",
            f"{statistics.median(seconds) * 1e6 / number:.2f}",
        ]
        for number, seconds in taken.items()
    ]
    bench.table("An observation that releases waiters", ["released", "us", "us each"], rows)
    if bench.quick:
        # In few rounds these move by more than half from run to run.
        return
    bench.find(
        "waiters.release_each",
        "the cost of each that is released, 10 000 at once over 100",
        [
            (many / 10_000) / (few / 100)
            for many, few in zip(taken[10_000], taken[100], strict=True)
        ],
    )
    bench.find(
        "waiters.release_crowded",
        f"releasing 100, {WAITING:,} others waiting on over none (a heap twice as deep)",
        [many / few for many, few in zip(crowded, taken[100], strict=True)],
    )
    means = {number: statistics.median(seconds) for number, seconds in taken.items()}
    bench.figure(
        "waiters",
        "What an observation costs that releases waiters",
        lambda _, axes: _draw(axes, means),
    )


def _release(number: int, others: int) -> float:
    """Return the CPU time of the observation that releases ``number`` waiters."""
    core = _core_with(others, _FAR, _core_with(number, _AHEAD))
    seen = offline.seen_at(_AHEAD, replica=1)
    with _Calm():
        began = time.thread_time()
        core.observed(_REPLICA, seen, sample=True)
        taken = time.thread_time() - began
    assert others == len(core.cluster.positions)
    return taken


def _draw(axes: Any, means: dict[int, float]) -> None:
    axes.plot(list(means), [seconds * 1e6 for seconds in means.values()], label="measured")
    each = means[max(means)] / max(means)
    axes.plot(list(means), [each * number * 1e6 for number in means], label="proportional")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("waiters released by one observation")
    axes.set_ylabel("CPU time, microseconds")
    axes.legend()
