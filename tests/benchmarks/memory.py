"""
What a waiting read holds, and what a million tokens leave behind.

A waiting read is a task of the async router whose position no replica has. It is compared with a
task that awaits a bare future, since any read of any library has a task and something to wait for.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from lsn_consistency import AsyncRouter, Reason, Session, TokenCodec
from tests.benchmarks import offline
from tests.benchmarks.findings import Bench

WAITING: Final = 2000
TOKENS: Final = 1_000_000
WARM_TOKENS: Final = 50_000
STEPS: Final = 20
_LONG_SECONDS: Final = 600.0
_AHEAD: Final = offline.LAST_LSN + 1000
_SECRET: Final = "a key that only the benchmarks know, 32 bytes or more"
_TOKEN: Final = offline.token_at(_AHEAD)

Wait = Callable[[AsyncRouter], Awaitable[Any]]


def run(bench: Bench) -> None:
    """
    Measure the memory.
    """
    _waiting_reads(bench)
    _many_tokens(bench)


# Waiting reads


def _waiting_reads(bench: Bench) -> None:
    bare = _held(_future)
    held = {
        "a task that awaits a bare future": bare,
        "a task in AsyncRouter.choose()": _held(_choose),
        "a task in AsyncRouter.read()": _held(_read),
        "the same, each with a session and a token of its own": _held(_read_in_session),
    }
    bench.table(
        "What a waiting read holds",
        ["what", "bytes in all", "beyond the bare future"],
        [[what, f"{each:,.0f}", f"{each - bare:,.0f}"] for what, each in held.items()],
        note=f"By tracemalloc, of {WAITING:,} that wait at once, after the first ones.",
    )
    reads = held["a task in AsyncRouter.read()"]
    bench.find(
        "memory.waiting_read",
        "a waiting read() beyond a task that awaits a bare future",
        (reads - bare) / 1024,
        "KiB",
        at_most=2.0,
        floor="Each awaited coroutine keeps its frame: the context manager, the read, the plan, "
        "the wait, and the time-out with its timer. What is left without them is the waiter and "
        "its place in the queue.",
    )
    bench.find(
        "memory.waiting_read_whole", "a waiting read(), its task included", reads / 1024, "KiB"
    )


async def _future(router: AsyncRouter) -> None:
    await asyncio.get_running_loop().create_future()


async def _choose(router: AsyncRouter) -> None:
    await router.choose(_TOKEN, timeout=_LONG_SECONDS)


async def _read(router: AsyncRouter) -> None:
    # The token is the caller's, and only referred to.
    async with router.read(_TOKEN):
        raise AssertionError("nothing can serve this read")


async def _read_in_session(router: AsyncRouter) -> None:
    with Session(offline.token_at(_AHEAD)):
        async with router.read():
            raise AssertionError("nothing can serve this read")


def _held(wait: Wait) -> float:
    """Return how many bytes one more that waits takes."""
    return asyncio.run(_held_by(wait))


async def _held_by(wait: Wait) -> float:
    router = offline.async_router(2, wait_seconds=_LONG_SECONDS)
    # What is made once, by the first of all, is not part of what each holds.
    with Session():
        tasks = [asyncio.ensure_future(wait(router)) for _ in range(100)]
        await _settle()
        tracemalloc.start()
        try:
            before = _traced()
            tasks += [asyncio.ensure_future(wait(router)) for _ in range(WAITING)]
            await _settle()
            taken = _traced() - before
        finally:
            tracemalloc.stop()
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return taken / WAITING


async def _settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


# Tokens


def _many_tokens(bench: Bench) -> None:
    number = bench.rounds(TOKENS, TOKENS // 10)
    router, codec, session = offline.blocking_router(2), TokenCodec(_SECRET), Session()
    first = offline.LAST_LSN - WARM_TOKENS - number
    lsn = iter(range(first, offline.LAST_LSN))

    def use(tokens: int) -> None:
        for _ in range(tokens):
            token = codec.decode(codec.encode(offline.token_at(next(lsn))))
            session.advance(token)
            with Session(token):
                route = router.choose()
            assert route.reason is Reason.CAUGHT_UP

    use(WARM_TOKENS)
    resident, blocks = [_resident_bytes()], [_blocks()]
    for step in range(1, STEPS + 1):
        use(number // STEPS)
        resident.append(_resident_bytes())
        blocks.append(_blocks())
        if step % 5 == 0:
            bench.say(f"{number * step // STEPS:,} tokens, {resident[-1] / 2**20:.1f} MiB")
    bench.find(
        "memory.tokens_blocks",
        f"blocks of memory that {number:,} tokens leave behind",
        blocks[-1] - blocks[0],
        "blocks",
        at_most=1000,
    )
    bench.find(
        "memory.tokens_resident",
        f"growth of the process over {number:,} tokens",
        (resident[-1] - resident[0]) / 2**20,
        "MiB",
        at_most=1.0,
    )
    bench.data["memory.tokens"] = {"resident_bytes": resident, "blocks": blocks}
    if not bench.quick:
        bench.figure(
            "memory-tokens",
            "Memory of the process over a million tokens",
            lambda _, axes: _draw(axes, number, resident),
        )


def _blocks() -> int:
    gc.collect()
    return sys.getallocatedblocks()


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _draw(axes: Any, number: int, resident: list[int]) -> None:
    steps = [number / STEPS * step / 1000 for step in range(STEPS + 1)]
    axes.plot(steps, [each / 2**20 for each in resident], label="resident memory")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("thousands of tokens, each signed, verified, merged and routed by")
    axes.set_ylabel("MiB")
    axes.legend(loc="lower right")
