"""
What one decision costs: `Router.choose()` against the routers of others, and against the floor.

No server is involved: `offline` makes the state, `peers` the peers. Times are of this thread's CPU.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, Final

from lsn_consistency import Consistency, Reason, Router, Session, Token
from tests.benchmarks import offline, peers
from tests.benchmarks.findings import Bench
from tests.benchmarks.measuring import Comparison, compare

OURS: Final = "choose"
FLOOR: Final = "floor"
LEAST: Final = "least choice"
REPLICAS: Final = (1, 2, 8, 64)
_BATCH: Final = 100
_NO_TOKEN: Final = Token()


@dataclass(slots=True)
class Held:
    """
    Be the least that a token could be.
    """

    timeline: int
    lsn: int
    route: str = ""


_held: ContextVar[Held] = ContextVar("held")
_level: ContextVar[Level | None] = ContextVar("level", default=None)
_replayed: Final = Held(offline.TIMELINE, offline.LAST_LSN)


def floor() -> str:
    """
    Do the least that a routing by LSN can do: a ContextVar and two integer comparisons.
    """
    held = _held.get()
    if held.timeline == _replayed.timeline and held.lsn <= _replayed.lsn:
        return "replica_1"
    return "primary"


@dataclass(slots=True)
class Level:
    """
    Be the least that a level could be.
    """

    uses_token: bool = True


@dataclass(slots=True)
class Replica:
    """
    Be the least that could be known of a replica: how far it is, and until when its lag is bounded.
    """

    route: str
    lsn: int
    until: float


@dataclass(slots=True)
class State:
    """
    Be the least that could be known of a cluster. News replace it, so it is looked up each time.
    """

    timeline: int
    replicas: dict[str, Replica]


class Least:
    """
    Do what no choice with its promises can leave out, and not more.

    Besides the two comparisons: the call with its parameters, the context variable of the level and
    what the level says, the present state, the session's own replica among several, a clock for the
    lag bound, and the route for the session.
    """

    def __init__(self) -> None:
        until = time.monotonic() + offline.LAG_LIMIT_SECONDS
        self.level = Level()
        self.state = State(
            offline.TIMELINE,
            {name: Replica(name, offline.LAST_LSN, until) for name in offline.replica_names(2)},
        )

    def choose(
        self,
        token: Held | None = None,
        *,
        consistency: Level | None = None,
        timeout: float | None = None,
    ) -> str:
        held = _held.get() if token is None else token
        level = (_level.get() or self.level) if consistency is None else consistency
        state = self.state
        replica = state.replicas.get(held.route)
        if (
            replica is not None
            and level.uses_token
            and held.timeline == state.timeline
            and held.lsn <= replica.lsn
            and time.monotonic() <= replica.until
        ):
            held.route = replica.route
            return held.route
        return "primary"


def run(bench: Bench) -> None:
    """
    Measure the decision.
    """
    _held.set(Held(offline.TIMELINE, offline.FIRST_LSN, "replica_1"))
    assert floor() == Least().choose() == "replica_1"
    with Session(offline.token_at(offline.LAST_LSN)) as session:
        _against_others(bench, session)
        _many_replicas(bench, session)
        _own_ways(bench, session)
    _in_changing_times(bench)


def _against_others(bench: Bench, session: Session) -> None:
    router = offline.blocking_router(2)
    _check(router)
    others = peers.routing_peers()
    djanorm = others[0].label
    ways: dict[str, Callable[[], Any]] = {
        FLOOR: floor,
        LEAST: Least().choose,
        OURS: router.choose,
        f"{OURS}, first of a session": _fresh(router, session),
    }
    ways.update({each.label: each.decide for each in others})
    compared = _compare(bench, "one decision, 2 replicas", ways)
    least = statistics.median(compared.ratios(LEAST, FLOOR))
    bench.find(
        "decision.djanorm",
        f"choose() over {djanorm}",
        compared.ratios(OURS, djanorm),
        at_most=0.5,
    )
    bench.find(
        "decision.floor",
        "choose() over the floor",
        compared.ratios(OURS, FLOOR),
        at_most=3.0,
        floor=f"The floor calls nothing but ContextVar.get. What a choice cannot leave out, the "
        "call with its parameters, the level, the state that news replace, the session's own "
        "replica, a clock for the lag bound and the route for the session, takes "
        f"{least:.1f} x the floor by itself.",
    )
    bench.find(
        "decision.least",
        "choose() over the least that a choice can do",
        compared.ratios(OURS, LEAST),
    )
    bench.find(
        "decision.djanorm_first",
        f"choose(), first of a session, over {djanorm}",
        compared.ratios(f"{OURS}, first of a session", djanorm),
    )
    rows = [
        [label, _nanoseconds(compared, label), f"{compared.median(label) / fastest:.1f}", note]
        for fastest in [compared.median(FLOOR)]
        for label, note in [
            (FLOOR, "a ContextVar and two integer comparisons; promises nothing"),
            (LEAST, "what a choice cannot leave out"),
            (OURS, "the token is satisfied, the session has its replica"),
            (f"{OURS}, first of a session", "the token is satisfied, a replica is drawn"),
            *((each.label, each.note) for each in others),
        ]
    ]
    bench.table(
        "Routers side by side, 2 replicas, warm",
        ["router", "ns", "x floor", "what it does, and what is stubbed"],
        rows,
        note="No peer looks at a token; the time is the CPU time of one thread.",
    )


def _many_replicas(bench: Bench, session: Session) -> None:
    routers = {number: offline.blocking_router(number) for number in REPLICAS}
    for router in routers.values():
        _check(router)
    ways: dict[str, Callable[[], Any]] = {}
    for number, router in routers.items():
        ways[f"{number}, first"] = _fresh(router, session)
        ways[f"{number}, later"] = _later(router, session)
    compared = _compare(bench, "replicas", ways)
    for each, what in (("later", "a session's later reads"), ("first", "a session's first read")):
        bench.find(
            f"decision.64.{each}",
            f"64 replicas over 2, {what}",
            compared.ratios(f"64, {each}", f"2, {each}"),
            at_most=6.0,
        )
    bench.table(
        "choose() by the number of replicas",
        ["replicas", "a session's first read, ns", "its later reads, ns"],
        [
            [str(n), _nanoseconds(compared, f"{n}, first"), _nanoseconds(compared, f"{n}, later")]
            for n in REPLICAS
        ],
    )


def _own_ways(bench: Bench, session: Session) -> None:
    router = offline.blocking_router(2)
    token = session.token
    ryw, eventual = Consistency.READ_YOUR_WRITES, Consistency.EVENTUAL
    ways: dict[str, Callable[[], Any]] = {
        "session's token, CAUSAL": router.choose,
        "session's token, READ_YOUR_WRITES": partial(router.choose, consistency=ryw),
        "session's token, EVENTUAL": partial(router.choose, consistency=eventual),
        "token as an argument": partial(router.choose, token),
        "no token": partial(router.choose, _NO_TOKEN),
    }
    compared = _compare(bench, "ways to choose", ways)
    rows = [[label, _nanoseconds(compared, label)] for label in ways]
    blocking = f"Router.choose, {_BATCH} calls in a coroutine"
    awaited = f"AsyncRouter.choose, {_BATCH} awaits in a coroutine"
    both = _async_pair(bench, blocking, awaited)
    rows += [[label, f"{both.median(label) / _BATCH * 1e9:.0f}"] for label in (blocking, awaited)]
    bench.table("Ways to choose, 2 replicas", ["way", "ns"], rows)


def _in_changing_times(bench: Bench) -> None:
    """Measure choices for which nothing can be remembered from the one before."""
    router = offline.blocking_router(2)
    core, choose = offline.core_of(router), router.choose
    tokens = cycle([offline.token_at(offline.LAST_LSN - 8 * each) for each in range(4096)])
    seen = offline.seen_at(offline.LAST_LSN, replica=1)
    session = Session(offline.token_at(offline.LAST_LSN))
    djanorm = peers.djanorm()

    def block() -> None:
        with Session(next(tokens)):
            pass

    def block_choose() -> None:
        with Session(next(tokens)):
            choose()

    def observe() -> None:
        core.observed("replica_1", seen, sample=True)

    def observe_choose() -> None:
        core.observed("replica_1", seen, sample=True)
        choose()

    ways = {
        djanorm.label: djanorm.decide,
        "session block": block,
        "session block with choose()": block_choose,
        "observation": observe,
        "observation, then choose()": observe_choose,
    }
    with session:
        compared = _compare(bench, "nothing remembered", ways)
    for key, title, whole, part in (
        ("new_session", "choose() of a new session with a token of its own", *_BLOCKS),
        ("new_observation", "choose() after a new observation", *_OBSERVATIONS),
    ):
        if bench.quick and part == "observation":
            # The difference of two times that are much greater: few rounds say nothing.
            continue
        extras = compared.extras(whole, part)
        peer = compared.series[djanorm.label].rounds
        bench.find(
            f"decision.{key}",
            f"{title}, over {djanorm.label}",
            [ours / theirs for ours, theirs in zip(extras, peer, strict=True)],
        )


_BLOCKS: Final = ("session block with choose()", "session block")
_OBSERVATIONS: Final = ("observation, then choose()", "observation")


def _async_pair(bench: Bench, blocking: str, awaited: str) -> Comparison:
    """Compare both routers on one event loop, so that only what they do differs."""
    router, async_router = offline.blocking_router(2), offline.async_router(2)
    loop = asyncio.new_event_loop()

    async def block() -> None:
        for _ in range(_BATCH):
            router.choose()

    async def wait() -> None:
        for _ in range(_BATCH):
            await async_router.choose()

    try:
        return _compare(
            bench,
            "blocking and async",
            {
                blocking: lambda: loop.run_until_complete(block()),
                awaited: lambda: loop.run_until_complete(wait()),
            },
        )
    finally:
        loop.close()


def _compare(bench: Bench, name: str, ways: dict[str, Callable[[], Any]]) -> Comparison:
    rounds = bench.rounds(41, 9)
    seconds = 0.015 if bench.quick else 0.05
    return bench.add(compare(name, ways, rounds=rounds, seconds=seconds, clock=time.thread_time))


def _fresh(router: Router, session: Session) -> Callable[[], object]:
    """Return a choice for a session that has no replica yet."""
    choose = router.choose

    def fresh() -> object:
        session.node = session.choice = None
        return choose()

    return fresh


def _later(router: Router, session: Session) -> Callable[[], object]:
    """Return a choice for a session that has its replica, a different one for each router."""
    choose = router.choose
    node = f"replica_{len(offline.core_of(router).cluster.nodes) // 2 or 1}"

    def later() -> object:
        session.node, session.choice = node, None
        return choose()

    return later


def _check(router: Router) -> None:
    """Hold that what is measured is the decision for a satisfied token."""
    route = router.choose()
    assert route.reason is Reason.CAUGHT_UP, route
    assert route.lag_seconds is not None, route


def _nanoseconds(compared: Comparison, label: str) -> str:
    low, high = compared.series[label].spread
    return f"{compared.median(label) * 1e9:.0f} ({low * 1e9:.0f} to {high * 1e9:.0f})"
