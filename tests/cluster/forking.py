"""
Scenarios that fork, each run in a process of its own: ``python -m tests.cluster.forking NAME``.

The nodes come as JSON on standard input, and what was found goes as JSON to standard output. A
test process has threads of its own, which a fork would leave behind half-way.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from psycopg_pool import ConnectionPool

from lsn_consistency import AsyncRouter, ConfigurationError, Router, Session
from tests.cluster.harness import wait_until

CHILDREN = 5
CHILD_SECONDS = 20.0
"""A child that takes longer is stuck: it is ended, and the scenario fails."""

INSERT = "INSERT INTO items (id) VALUES (%s)"
COUNT = "SELECT count(*) FROM items WHERE id = %s"
MONITORS = (
    "SELECT pid FROM pg_stat_activity"
    " WHERE application_name = 'lsn_consistency' AND backend_type = 'client backend'"
)
"""Where the cluster was promoted before, a monitor also asks a walsender for the history, once."""

POOL = {"min_size": 2, "max_size": 2}

Nodes = dict[str, Any]
Found = dict[str, Any]


def in_child(work: Callable[[], Any], *, exits: bool = False) -> Any:
    """
    Return what ``work`` gives in a forked child.

    The child ends at once, or with ``exits`` as a worker does: out of every block, through the
    end of the interpreter.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writer, json.dumps(_outcome(work)).encode())
            status = 0
        finally:
            if not exits or status:
                os._exit(status)
        sys.exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], CHILD_SECONDS)
    text = os.read(reader, 1 << 16) if ready else b""
    os.close(reader)
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text and status == 0 else f"stuck, status {status}"


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception:
        return traceback.format_exc()


# Blocking


def write_and_read(router: Router, number: int) -> int:
    """Return how many rows of its own a new client reads."""
    with Session():
        with router.write() as conn:
            conn.execute(INSERT, [number])
        with router.read() as conn:
            row = conn.execute(COUNT, [number]).fetchone()
    assert row is not None
    return int(row[0])


def pool_pids(router: Router) -> list[int]:
    """Return the backends of every connection of every pool."""
    size = router.settings.pool_options["max_size"]
    with ExitStack() as stack:
        names = [name for name in router.snapshot() for _ in range(size)]
        conns = [stack.enter_context(router.read(node=name)) for name in names]
        return sorted(conn.info.backend_pid for conn in conns)


def monitor_pids(router: Router) -> list[int]:
    """Return the backends of the monitors of every process, on every node."""
    pids: list[int] = []
    for name in router.snapshot():
        with router.read(node=name) as conn:
            pids += [row[0] for row in conn.execute(MONITORS)]
    return sorted(pids)


def look_around(router: Router, number: int) -> Found:
    return {
        "rows": write_and_read(router, number),
        "pools": pool_pids(router),
        "monitors": monitor_pids(router),
    }


def blocking(nodes: Nodes) -> Found:
    """An open router is used in two children, and again in the parent."""
    with Router(**nodes, pool_options=POOL) as router:
        wait_until(lambda: len(monitor_pids(router)) == len(nodes["replicas"]) + 1)
        before = look_around(router, 1)
        quick = in_child(lambda: look_around(router, 2))
        # The backends of a process that has ended go a moment later.
        wait_until(lambda: monitor_pids(router) == before["monitors"])
        exits = in_child(lambda: look_around(router, 3), exits=True)
        wait_until(lambda: monitor_pids(router) == before["monitors"])
        return {"before": before, "children": [quick, exits], "after": look_around(router, 4)}


def blocking_grandchild(nodes: Nodes) -> Found:
    """A child forks once more; closing in one process closes nothing in another."""

    def child(router: Router) -> list[int]:
        mine = write_and_read(router, 2)
        grandchild = in_child(lambda: write_and_read(router, 3))
        router.close()
        return [mine, grandchild]

    with Router(**nodes) as router:
        write_and_read(router, 1)
        children = in_child(lambda: child(router))
        return {"children": children, "parent": write_and_read(router, 4)}


def given_pool(nodes: Nodes) -> Found:
    """A router with a pool of the application's own is used in a child."""

    def child(router: Router) -> list[str]:
        said = []
        for use in (lambda: write_and_read(router, 2), router.open, router.snapshot):
            try:
                use()
            except ConfigurationError as error:
                said.append(str(error))
        return said

    with (
        ConnectionPool(nodes["primary"], min_size=1, open=True) as pool,
        Router(primary=pool, replicas=nodes["replicas"]) as router,
    ):
        before = write_and_read(router, 1)
        said = in_child(lambda: child(router))
        return {"before": before, "said": said, "after": write_and_read(router, 3)}


def given_pool_not_open(nodes: Nodes) -> Found:
    """Pool and router are made before the fork; every process opens both."""
    pool = ConnectionPool(nodes["primary"], min_size=1, open=False)
    router = Router(primary=pool, replicas=nodes["replicas"])

    def serve(number: int) -> int:
        with pool, router:
            return write_and_read(router, number)

    children = [in_child(partial(serve, number)) for number in (1, 2)]
    return {"children": children, "parent": serve(3)}


def wait_for_reads(reads: list[int]) -> None:
    seen = len(reads)
    wait_until(lambda: len(reads) > seen + 20)


def under_load(nodes: Nodes) -> Found:
    """Children are forked while many threads read, and each works by itself."""
    ended = threading.Event()
    reads: list[int] = []

    def read_on() -> None:
        with Session():
            while not ended.is_set():
                with router.read() as conn:
                    conn.execute("SELECT 1")
                reads.append(1)

    def child(number: int) -> Found:
        return {"rows": write_and_read(router, number), "pools": pool_pids(router)}

    with Router(**nodes, pool_options={"min_size": 8, "max_size": 8}) as router:
        before = pool_pids(router)
        threads = [threading.Thread(target=read_on) for _ in range(8)]
        for thread in threads:
            thread.start()
        found = []
        for number in range(CHILDREN):
            wait_for_reads(reads)
            found.append(in_child(partial(child, number)))
        ended.set()
        for thread in threads:
            thread.join(CHILD_SECONDS)
        return {"before": before, "children": found, "parent": write_and_read(router, 100)}


# Async


async def write_and_read_async(router: AsyncRouter, number: int) -> int:
    with Session():
        async with router.write() as conn:
            await conn.execute(INSERT, [number])
        async with router.read() as conn:
            row = await (await conn.execute(COUNT, [number])).fetchone()
    assert row is not None
    return int(row[0])


async def monitor_pids_async(router: AsyncRouter) -> list[int]:
    pids: list[int] = []
    for name in router.snapshot():
        async with router.read(node=name) as conn:
            pids += [row[0] for row in await (await conn.execute(MONITORS)).fetchall()]
    return sorted(pids)


def open_async(nodes: Nodes) -> Found:
    """An open async router is used in two children: as it is, and opened anew."""

    async def child(router: AsyncRouter, number: int) -> Found:
        try:
            await write_and_read_async(router, number)
        except ConfigurationError as error:
            said = str(error)
        async with router:
            return {"said": said, "rows": await write_and_read_async(router, number)}

    router = AsyncRouter(**nodes)
    # No Runner: a child that leaves its block would run the parent's loop to an end.
    loop = asyncio.new_event_loop()
    run = loop.run_until_complete
    run(router.open())
    run(write_and_read_async(router, 1))
    # A router that was closed a moment ago may still have its backends.
    wait_until(lambda: len(run(monitor_pids_async(router))) == len(nodes["replicas"]) + 1)
    before = run(monitor_pids_async(router))
    quick = in_child(lambda: asyncio.run(child(router, 2)))
    exits = in_child(lambda: asyncio.run(child(router, 3)), exits=True)
    rows = run(write_and_read_async(router, 4))
    wait_until(lambda: len(run(monitor_pids_async(router))) == len(before))
    after = run(monitor_pids_async(router))
    run(router.close())
    loop.close()
    return {"before": before, "after": after, "children": [quick, exits], "parent": rows}


# Made before, opened after


def worker(kind: str, router: Any, number: int, answers: Any) -> None:
    async def serve() -> int:
        async with router:
            return await write_and_read_async(router, number)

    if kind == "async":
        answers.put(asyncio.run(serve()))
    else:
        with router:
            answers.put(write_and_read(router, number))


def opened_in_children(nodes: Nodes, kind: str) -> Found:
    """A router is made at import, and each forked worker opens it."""
    context = multiprocessing.get_context("fork")
    router: Any = Router(**nodes) if kind == "blocking" else AsyncRouter(**nodes)
    answers = context.SimpleQueue()
    workers = [
        context.Process(target=worker, args=[kind, router, number, answers]) for number in range(3)
    ]
    for each in workers:
        each.start()
    for each in workers:
        each.join(CHILD_SECONDS)
    codes = [each.exitcode for each in workers]
    rows = [answers.get() for code in codes if code == 0]
    return {"codes": codes, "rows": rows}


SCENARIOS: dict[str, Callable[..., Found]] = {
    each.__name__: each
    for each in (
        blocking,
        blocking_grandchild,
        given_pool,
        given_pool_not_open,
        under_load,
        open_async,
        opened_in_children,
    )
}

if __name__ == "__main__":
    print(json.dumps(SCENARIOS[sys.argv[1]](json.load(sys.stdin), *sys.argv[2:])))
